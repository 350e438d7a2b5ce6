"""Images of any sizes -> buffers of few sizes, so that few programs are compiled. Host side, NumPy."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from effdet_jax.errors import UserError

# The images of a batch lie end to end in one buffer, which has 1, 4, 16, ... megapixels for each place of the batch,
# every size a program of its own. Any picture of COCO or VOC has less than one megapixel, a photograph less than 16;
# steps of 4, because to compile once more costs more than to send unused bytes for hours.
MEGAPIXEL, BUFFER_STEP = 2**20, 4
MAX_BATCH_PIXELS = 128 * MEGAPIXEL  # 400 MB: a batch with more is divided


def batches(images: Iterable[Any], batch_size: int) -> Iterator[tuple[list[np.ndarray], int]]:
    """(images, places): at most `batch_size` images, and for how many the program is made.

    A last batch that is not full uses the program of the full ones before it; where there are none, the next power of
    two. So any number of images compiles one program, and few images waste less than half.

    Raises:
      UserError: for anything that is no uint8 [H, W, 3].
    """
    batch: list[np.ndarray] = []
    pixels, divided = 0, False
    for image in images:
        _check(image)
        area = image.shape[0] * image.shape[1]
        if batch and (len(batch) == batch_size or pixels + area > MAX_BATCH_PIXELS):
            yield batch, batch_size
            batch, pixels, divided = [], 0, True
        batch.append(image)
        pixels += area
    if batch:
        power_of_two = 1 << (len(batch) - 1).bit_length()
        yield batch, batch_size if divided else min(batch_size, power_of_two)


def pack(
    images: Sequence[UInt8[np.ndarray, '_ _ 3']], places: int, *, flip: bool = False
) -> tuple[UInt8[np.ndarray, 'P 3'], Int[np.ndarray, 'B 2']]:
    """(pixels of all images, row by row, in a buffer of the next size; (height, width) of each of the `places`).

    A place without image is one pixel, whatever lies in the buffer. `flip` mirrors every image left to right.
    """
    sizes_B2 = np.ones((places, 2), np.int32)
    sizes_B2[: len(images)] = [image.shape[:2] for image in images]
    pixels = np.empty((buffer_size(int(sizes_B2.prod(axis=1, dtype=np.int64).sum()), places), 3), np.uint8)
    start = 0
    for image in images:
        height, width, _ = image.shape
        pixels[start : start + height * width].reshape(image.shape)[...] = image[:, ::-1] if flip else image
        start += height * width
    return pixels, sizes_B2


def buffer_size(pixels: int, places: int) -> int:
    """The smallest buffer for a batch of so many places that holds so many pixels."""
    size = places * MEGAPIXEL
    while size < pixels:
        size *= BUFFER_STEP
    return size


def _check(image: Any) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f'{image.dtype} {list(image.shape)}' if hasattr(image, 'dtype') else type(image).__name__
        raise UserError(
            f'an image is an array uint8 [height, width, 3] in RGB, a PIL image or a path, and this is {what}: convert '
            'it, and give several images as a list'
        )
    if not image.size:
        raise UserError(f'an image of {image.shape[0]} x {image.shape[1]} pixels is empty: leave it out')
