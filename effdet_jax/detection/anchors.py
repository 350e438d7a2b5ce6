"""Anchors: boxes of set sizes and shapes at every position of every feature level (docs/reference.md, Anchors)."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# The ratio r = width / height as one number gives (sqrt r, 1 / sqrt r); a pair gives (width, height) factors outright.
AspectRatio = float | tuple[float, float]

SQRT_RATIOS: tuple[AspectRatio, ...] = (1.0, 2.0, 0.5)
MIN_LEVEL = 3  # the finest feature level
PAIR_RATIOS: tuple[AspectRatio, ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))  # early releases and PyTorch ports


def make_anchors(
    level_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    scale: float = 4.0,
    scales_per_octave: int = 3,
    aspect_ratios: Sequence[AspectRatio] = SQRT_RATIOS,
) -> Float[np.ndarray, 'N 4']:
    """All anchors of an image, yxyx pixels, float32, not clipped; ordered level, y, x, octave, ratio.

    A level's stride is the *ratio* of image to feature size, per axis, not a power of two. The anchor of octave o has
    the side `scale * stride * 2^(o / scales_per_octave)` times the factors of its aspect ratio.
    """
    height_A, width_A = _sides(scale, scales_per_octave, aspect_ratios)
    levels = []
    for rows, columns in level_sizes:
        stride_y, stride_x = image_size[0] / rows, image_size[1] / columns
        y, x = np.meshgrid((np.arange(rows) + 0.5) * stride_y, (np.arange(columns) + 0.5) * stride_x, indexing='ij')
        y, x = y[..., None], x[..., None]
        half_height, half_width = height_A * stride_y / 2, width_A * stride_x / 2
        boxes = np.stack(np.broadcast_arrays(y - half_height, x - half_width, y + half_height, x + half_width), axis=-1)
        levels.append(boxes.reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def best_ious(
    boxes: Float[np.ndarray, 'M 4'],
    level_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    scale: float = 4.0,
    scales_per_octave: int = 3,
    aspect_ratios: Sequence[AspectRatio] = SQRT_RATIOS,
) -> Float[np.ndarray, 'M']:
    """For each box yxyx the IoU with the best of all anchors that `make_anchors` gives for these arguments.

    Takes time and memory O(M), not O(M x N): of the anchors of one shape the nearest overlaps most, along each axis.
    """
    center_M2, side_M2 = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best_M = np.zeros(len(boxes), np.float32)
    for size in level_sizes:
        stride_2 = np.array(image_size, np.float32) / np.array(size, np.float32)
        nearest_M2 = np.clip(np.floor(center_M2 / stride_2), 0, np.array(size, np.float32) - 1)
        offset_M2 = np.abs(center_M2 - (nearest_M2 + 0.5) * stride_2)
        for sides in zip(*_sides(scale, scales_per_octave, aspect_ratios), strict=True):
            anchor_2 = stride_2 * np.array(sides, np.float32)
            overlap_M2 = np.minimum((side_M2 + anchor_2) / 2 - offset_M2, np.minimum(side_M2, anchor_2))
            shared_M = np.maximum(overlap_M2, 0).prod(1)
            union_M = side_M2.prod(1) + anchor_2.prod() - shared_M
            best_M = np.maximum(best_M, shared_M / union_M)
    return best_M.astype(np.float32)


def level_sizes(image_size: tuple[int, int], min_level: int, max_level: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of each feature level from `min_level` up: every level is half of the one below, rounded up."""

    def halved(n: int, times: int) -> int:
        for _ in range(times):
            n = (n + 1) // 2
        return n

    height, width = image_size
    return tuple((halved(height, level), halved(width, level)) for level in range(min_level, max_level + 1))


def _sides(
    scale: float, scales_per_octave: int, aspect_ratios: Sequence[AspectRatio]
) -> tuple[Float[np.ndarray, 'A'], Float[np.ndarray, 'A']]:
    """(heights, widths) of the anchors of one position, in strides."""
    factors = [r if isinstance(r, Sequence) else (math.sqrt(r), 1 / math.sqrt(r)) for r in aspect_ratios]
    octave_A = np.repeat(2 ** (np.arange(scales_per_octave) / scales_per_octave), len(factors))
    width_A, height_A = np.tile(np.asarray(factors, np.float64).T, scales_per_octave) * scale * octave_A
    return height_A, width_A
