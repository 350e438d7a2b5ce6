"""Anchor scale and aspect ratios that suit given boxes: k-means on IoU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

ROUNDS = 50  # it converges in about ten
DIGITS = 2  # of what is proposed: people read it


class Anchors(NamedTuple):
    """`config.model.anchors`, as `anchors.make_anchors` takes them; ratios are width / height."""

    scale: float
    aspect_ratios: tuple[float, ...]


def fit(
    sides: Float[np.ndarray, 'M 2'], strides: Sequence[tuple[float, float]], scales_per_octave: int, start: Anchors
) -> Anchors:
    """The nearest local optimum for boxes of these (heights, widths) > 0, in pixels; `strides` (y, x) of the levels.

    Redmon & Farhadi, "YOLO9000" (2017), section 2: k-means in which a box belongs to the centroid that it overlaps
    most when both have one centre, and a centroid becomes the mean (height, width) of its boxes. Here centroids are
    tied: those of one ratio are copies of one shape at all levels and octaves, and one scale serves all. So a round
    takes the mean shape of each ratio relative to stride and octave, and of their sizes the mean for the scale.
    """
    size_S2 = np.concatenate(
        [np.asarray(strides) * 2 ** (octave / scales_per_octave) for octave in range(scales_per_octave)]
    )
    scale, ratio_R = start.scale, np.asarray(start.aspect_ratios, np.float64)
    before = None
    for _ in range(ROUNDS):
        size_M, ratio_M = _nearest(sides, size_S2, scale, ratio_R)
        belongs_M = size_M * len(ratio_R) + ratio_M
        if before is not None and (belongs_M == before).all():
            break
        before = belongs_M
        shape_M2 = sides / size_S2[size_M]
        used = np.unique(ratio_M)  # a ratio without boxes stays as it is
        mean_U2 = np.array([shape_M2[ratio_M == ratio].mean(0) for ratio in used])
        ratio_R[used] = mean_U2[:, 1] / mean_U2[:, 0]
        scale = float(np.average(np.sqrt(mean_U2.prod(1)), weights=np.bincount(ratio_M)[used]))
    return Anchors(round(scale, DIGITS), tuple(sorted(np.round(ratio_R, DIGITS).tolist())))


def _nearest(
    sides: Float[np.ndarray, 'M 2'], size_S2: Float[np.ndarray, 'S 2'], scale: float, ratio_R: Float[np.ndarray, 'R']
) -> tuple[Int[np.ndarray, 'M'], Int[np.ndarray, 'M']]:
    """Which (size, ratio) each box overlaps most, were both at one place."""
    factor_R2 = np.stack([1 / np.sqrt(ratio_R), np.sqrt(ratio_R)], axis=1)
    anchor_A2 = (scale * size_S2[:, None] * factor_R2).reshape(-1, 2)
    shared_MA = np.minimum(sides[:, None], anchor_A2).prod(2)
    iou_MA = shared_MA / (sides.prod(1)[:, None] + anchor_A2.prod(1) - shared_MA)
    return np.divmod(iou_MA.argmax(1), len(ratio_R))
