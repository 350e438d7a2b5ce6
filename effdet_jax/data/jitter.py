"""Random scale and crop for training (docs/reference.md, Data pipeline).

The steps are separate: draw random numbers, place the image, fill in its pixels, move its boxes. Placing an image needs
only its size, so the resolution to decode at is known before decoding.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from effdet_jax.data import transforms


class Jitter(NamedTuple):
    """factor: scale relative to the size that fits the network input. shifts: y and x in [0, 1), the crop position."""

    factor: np.float32
    shifts: Float[np.ndarray, '2']


class Place(NamedTuple):
    """An image of `size` is resized to `scaled` and cropped from `corner` on; all are (y, x).

    reduction: 1, 2, 4 or 8, the factor by which the image may be reduced while decoding.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    reduction: int


def draw(scale_range: tuple[float, float], rng: np.random.Generator) -> Jitter:
    """Draws the random numbers of one image."""
    return Jitter(np.float32(rng.uniform(*scale_range)), rng.random(2, np.float32))


def place(size: tuple[int, int], image_size: tuple[int, int], jitter: Jitter) -> Place:
    """Scales an image of `size` by the jitter's factor and crops it to `image_size`; both are (height, width)."""
    factor, (height, width) = jitter.factor, image_size
    target = max(1, int(factor * np.float32(height))), max(1, int(factor * np.float32(width)))
    scaled, _ = transforms.scaled_size(*size, target)
    top, left = (
        int(np.float32(max(0, s - out)) * u) for s, out, u in zip(scaled, image_size, jitter.shifts, strict=True)
    )
    # Only below the scale of evaluation: reduced decoding averages pixels, the resize of evaluation does not.
    reductions = (1, 2, 4, 8) if factor < 1 else (1,)
    allowed = [r for r in reductions if size[0] // r >= scaled[0] and size[1] // r >= scaled[1]]
    return Place(size, scaled, (top, left), max(allowed, default=1))


def move_boxes(
    boxes: Float[np.ndarray, 'M 4'], where: Place, image_size: tuple[int, int]
) -> tuple[Float[np.ndarray, 'K 4'], Bool[np.ndarray, 'M']]:
    """yxyx pixels of the image -> (yxyx pixels of the network input in [0, side - 1], bool [M] mask of kept boxes).

    Scales by the ratio of the integer sizes, so that boxes stay on their pixels (docs/reference.md, Data pipeline).
    """
    normalized_M4 = boxes / np.array(where.size * 2, np.float32)
    boxes_M4 = normalized_M4 * np.array(where.scaled * 2, np.float32) - np.array(where.corner * 2, np.float32)
    # As in the official code, clip to the last pixel, not to the edge (docs/reference.md, Data pipeline).
    boxes_M4 = np.clip(boxes_M4, np.float32(0), np.array(image_size * 2, np.float32) - 1)
    keep_M = np.all(boxes_M4[:, 2:] > boxes_M4[:, :2], axis=1)
    return boxes_M4[keep_M], keep_M
