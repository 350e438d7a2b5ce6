"""Packs images of any sizes into buffers of few sizes, so that few programs are compiled. Host side, NumPy."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from effdet_jax.errors import UserError

# The images of a batch lie end to end in one buffer of 1, 4, 16, ... megapixels per place in the batch. Each size is a
# program of its own. Images of COCO and VOC have less than one megapixel, most photographs less than 16. The steps are
# coarse because another compilation costs more than hours of copying unused bytes.
MEGAPIXEL, BUFFER_STEP = 2**20, 4
MAX_BATCH_PIXELS = 128 * MEGAPIXEL  # 400 MB; larger batches are divided


def batches(images: Iterable[Any], batch_size: int) -> Iterator[tuple[list[np.ndarray], int]]:
    """Yields (images, places): at most `batch_size` images, and the batch size of the program that runs them.

    A last batch that is not full uses the program of the full batches. If there were none, it uses the next power of
    two. So any number of images compiles one program, and a few images waste less than half of it.

    Raises:
      UserError: for anything but uint8 [H, W, 3].
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
    """(pixels of all images, row by row, in the smallest buffer that fits; (height, width) of each of the `places`).

    An empty place counts as one pixel of arbitrary content. `flip` mirrors every image left to right.
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
    """The number of pixels in the smallest buffer for `places` images with `pixels` pixels in total."""
    size = places * MEGAPIXEL
    while size < pixels:
        size *= BUFFER_STEP
    return size


def _check(image: Any) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f'{image.dtype} {list(image.shape)}' if hasattr(image, 'dtype') else type(image).__name__
        raise UserError(
            f'{what} is not an image: give a uint8 array [height, width, 3] in RGB, a PIL image or a path, or a list '
            'of them'
        )
    if not image.size:
        raise UserError(f'an image of {image.shape[0]} x {image.shape[1]} pixels is empty: leave it out')
