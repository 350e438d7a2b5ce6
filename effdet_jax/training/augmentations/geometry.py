"""Flips, affine maps and erasing: pixels move or disappear, and boxes follow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from effdet_jax.training.augmentations.sample import MIN_VISIBLE, Sample, areas, cut, inside, intersections, largest

Fill = tuple[int, int, int]  # RGB of uncovered pixels


def random_flip(key: Array, sample: Sample) -> Sample:
    """Flips the image horizontally with probability 1/2; the padding stays on the right."""
    image, boxes, _, valid_size = sample
    width = valid_size[1]
    x = jnp.arange(image.shape[1])
    mirrored = image[:, jnp.where(x < width, width - 1 - x, x)]
    y1, x1, y2, x2 = jnp.moveaxis(boxes, -1, 0)
    # The official code flips first and then cuts boxes at the last pixel (docs/reference.md, Data pipeline).
    x1, x2 = (jnp.minimum(width - x, image.shape[1] - 1) for x in (x2, x1))
    mirrored_boxes = jnp.stack([y1, x1, y2, x2], axis=-1)
    flip = jax.random.bernoulli(key)
    return sample._replace(image=jnp.where(flip, mirrored, image), boxes=jnp.where(flip, mirrored_boxes, boxes))


def warp(sample: Sample, linear: Float[Array, '2 2'], shift: Float[Array, '2'], fill: Fill) -> Sample:
    """Moves each point p = (y, x) to `c + linear (p - c) + shift`, where c is the image's centre.

    Pixels are interpolated bilinearly. A box becomes the box around its moved corners (Zoph et al. 2019, "Learning Data
    Augmentation Strategies for Object Detection"), so it may be larger than the object. It is then clipped to the image
    and dropped by the rule of `cut`.
    """
    image, boxes, labels, valid_size = sample
    height, width, _ = image.shape
    size_2 = valid_size.astype(jnp.float32)
    offset_2 = shift + size_2 / 2 - linear @ (size_2 / 2)

    (a, b), (c, d) = linear
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    y_H1, x_W = jnp.arange(height)[:, None] + 0.5 - offset_2[0], jnp.arange(width) + 0.5 - offset_2[1]
    y_HW, x_HW = (row[0] * y_H1 + row[1] * x_W for row in inverse)
    moved = interpolate(image.reshape(-1, 3), jnp.int32(0), width, y_HW, x_HW, valid_size)
    covered_HW = (y_HW >= 0) & (y_HW < size_2[0]) & (x_HW >= 0) & (x_HW < size_2[1])
    moved = jnp.where(covered_HW[..., None], moved, jnp.asarray(fill, jnp.uint8))

    y1, x1, y2, x2 = jnp.moveaxis(boxes, -1, 0)
    corners_M42 = jnp.stack([jnp.stack([y, x], axis=-1) for y in (y1, y2) for x in (x1, x2)], axis=1)
    corners_M42 = (corners_M42[..., None, :] * linear).sum(axis=-1) + offset_2  # exact, unlike a dot product on TPU
    around_M4 = jnp.concatenate([corners_M42.min(axis=1), corners_M42.max(axis=1)], axis=-1)
    window_4 = jnp.concatenate([jnp.zeros(2), size_2])
    boxes, labels = largest(*cut(around_M4, labels, window_4[None]), most=len(labels))
    return Sample(jnp.where(inside(sample), moved, image), boxes, labels, valid_size)


def interpolate(
    pixels: UInt8[Array, 'P 3'],
    start: Int[Array, '*#S'],
    row: int,
    y: Float[Array, '*S'],
    x: Float[Array, '*S'],
    size: Int[Array, '*#S 2'],
) -> UInt8[Array, '*S 3']:
    """Bilinear interpolation at points (y, x) of images stored in `pixels`.

    An image begins at `pixels[start]`, has `row` pixels in a row, and `size` (height, width) of it are valid. The
    centre of the first pixel is (0.5, 0.5). Beyond the outermost centres, edge pixels are repeated.
    """
    (top, share_y), (left, share_x) = ((jnp.floor(p - 0.5), (p - 0.5) % 1) for p in (y, x))

    def add(total: Array, corner: tuple[Array, Array]) -> tuple[Array, None]:
        dy, dx = corner
        weight = (1 - dy + (2 * dy - 1) * share_y) * (1 - dx + (2 * dx - 1) * share_x)
        # Clipped as floats, because integers would overflow far outside.
        i = jnp.clip(top + dy, 0, size[..., 0] - 1.0).astype(jnp.int32)
        j = jnp.clip(left + dx, 0, size[..., 1] - 1.0).astype(jnp.int32)
        return total + weight[..., None] * pixels.at[start + i * row + j].get(mode='promise_in_bounds'), None

    # A loop, so that XLA computes `pixels` before it, and not once for each of the four corners.
    corners = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([0.0, 1.0, 0.0, 1.0])
    return jnp.round(jax.lax.scan(add, jnp.zeros((*y.shape, 3)), corners)[0]).astype(jnp.uint8)


def erase(key: Array, sample: Sample, area: Sequence[float], aspect: Sequence[float]) -> Sample:
    """Random erasing (Zhong et al. 2020; image-aware, random values): fills one rectangle with noise.

    `area`: range of its share of the image. `aspect`: range of height / width, log-uniform. Sides are clipped to the
    image. Boxes keep their place; a box with less than a quarter visible is dropped.
    """
    image, boxes, labels, valid_size = sample
    of_area, of_aspect, of_corner, of_noise = jax.random.split(key, 4)
    size_2 = valid_size.astype(jnp.float32)
    pixels = jax.random.uniform(of_area, minval=area[0], maxval=area[1]) * size_2.prod()
    low, high = jnp.log(jnp.asarray(aspect, jnp.float32))
    ratio = jnp.exp(jax.random.uniform(of_aspect, minval=low, maxval=high))
    sides_2 = jnp.clip(jnp.round(jnp.sqrt(pixels * jnp.stack([ratio, 1 / ratio]))), 1, size_2)
    corner_2 = jnp.floor(jax.random.uniform(of_corner, (2,)) * (size_2 - sides_2 + 1))
    rectangle_4 = jnp.concatenate([corner_2, corner_2 + sides_2])

    y_H1, x_W = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])
    y1, x1, y2, x2 = rectangle_4
    erased_HW = (y_H1 >= y1) & (y_H1 < y2) & (x_W >= x1) & (x_W < x2)
    words = jax.random.bits(
        of_noise, (-(-image.size // 4),), 'uint32'
    )  # jax spends a word on a byte if asked for bytes
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: image.size].reshape(image.shape)
    hidden_M = areas(intersections(boxes, rectangle_4[None]))
    labels = jnp.where(areas(boxes) - hidden_M >= MIN_VISIBLE * areas(boxes), labels, -1)
    boxes, labels = largest(boxes, labels, most=len(labels))
    return Sample(jnp.where(erased_HW[..., None], noise, image), boxes, labels, valid_size)
