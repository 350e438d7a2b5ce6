"""Training's random scale and crop (docs/reference.md, Data pipeline).

In steps: what is drawn, where the image goes, its pixels, its boxes. The draws do not depend on the image and the
place needs no more than its size, so it is known before anything is decoded how large the image has to be decoded.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from effdet_jax.data import transforms


class Jitter(NamedTuple):
    """factor: of the size that fits into the network's input. shifts: in [0, 1), of what is left to shift, y and x."""

    factor: np.float32
    shifts: Float[np.ndarray, '2']


class Place(NamedTuple):
    """An image of `size` is scaled to `scaled`, and shown from its pixel `corner` on; all (y, x).

    reduction: 1, 2, 4 or 8, by which it may be decoded smaller.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    reduction: int


def draw(scale_range: tuple[float, float], rng: np.random.Generator) -> Jitter:
    """One image's random numbers."""
    return Jitter(np.float32(rng.uniform(*scale_range)), rng.random(2, np.float32))


def place(size: tuple[int, int], image_size: tuple[int, int], jitter: Jitter) -> Place:
    """Scales by `factor`, crops at random what does not fit into `image_size` (height, width)."""
    factor, (height, width) = jitter.factor, image_size
    target = max(1, int(factor * np.float32(height))), max(1, int(factor * np.float32(width)))
    scaled, _ = transforms.scaled_size(*size, target)
    top, left = (
        int(np.float32(max(0, s - out)) * u) for s, out, u in zip(scaled, image_size, jitter.shifts, strict=True)
    )
    # Only what becomes smaller than evaluation shows it: evaluation's resize does not average, small decoding does.
    reductions = (1, 2, 4, 8) if factor < 1 else (1,)
    enough = [r for r in reductions if size[0] // r >= scaled[0] and size[1] // r >= scaled[1]]
    return Place(size, scaled, (top, left), max(enough, default=1))


def move_boxes(
    boxes: Float[np.ndarray, 'M 4'], where: Place, image_size: tuple[int, int]
) -> tuple[Float[np.ndarray, 'K 4'], Bool[np.ndarray, 'M']]:
    """yxyx pixels of the image -> (those left in yxyx pixels of the network input, in [0, side - 1]; which they are).

    By the integer sizes, not by the scale they were truncated from: boxes stay on their pixels
    (docs/reference.md, Data pipeline).
    """
    normalized_M4 = boxes / np.array(where.size * 2, np.float32)
    boxes_M4 = normalized_M4 * np.array(where.scaled * 2, np.float32) - np.array(where.corner * 2, np.float32)
    # official clips to the last pixel, not to the edge (docs/reference.md, Data pipeline)
    boxes_M4 = np.clip(boxes_M4, np.float32(0), np.array(image_size * 2, np.float32) - 1)
    keep_M = np.all(boxes_M4[:, 2:] > boxes_M4[:, :2], axis=1)
    return boxes_M4[keep_M], keep_M
