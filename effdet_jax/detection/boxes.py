"""Boxes as (y1, x1, y2, x2) in pixels, and the regression that relates them to anchors."""

import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST_SIDE = 1e-8  # before a logarithm or a division


def areas(boxes: Float[Array, '*n 4']) -> Float[Array, '*n']:
    """Square pixels; an inverted box has none."""
    return jnp.maximum(boxes[..., 2] - boxes[..., 0], 0) * jnp.maximum(boxes[..., 3] - boxes[..., 1], 0)


def intersections(a: Float[Array, '*#n 4'], b: Float[Array, '*#n 4']) -> Float[Array, '*n']:
    """Area shared by a and b, element by element with broadcasting."""
    height = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    width = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    return jnp.maximum(height, 0) * jnp.maximum(width, 0)


def iou(a: Float[Array, '*#n 4'], b: Float[Array, '*#n 4']) -> Float[Array, '*n']:
    """Intersection over union in 0..1, element by element with broadcasting; 0 where nothing is shared."""
    shared = intersections(a, b)
    union = areas(a) + areas(b) - shared
    return jnp.where(shared > 0, shared / jnp.where(shared > 0, union, 1), 0)


def centers_and_sides(boxes: Float[Array, '*n 4']) -> tuple[Array, Array, Array, Array]:
    """(yc, xc, h, w), each `[*n]`."""
    y1, x1, y2, x2 = jnp.moveaxis(boxes, -1, 0)
    return (y1 + y2) / 2, (x1 + x2) / 2, y2 - y1, x2 - x1


def encode(boxes: Float[Array, '*n 4'], anchors: Float[Array, '*n 4']) -> Float[Array, '*n 4']:
    """Box -> regression (ty, tx, th, tw): offset of the centre in anchor sides, logarithm of the ratio of sides.

    Ren et al. 2015 (Faster R-CNN), equation 2, without scale factors. Sides are floored at 1e-8.
    """
    yc, xc, h, w = centers_and_sides(boxes)
    ya, xa, ha, wa = centers_and_sides(anchors)
    h, w, ha, wa = (jnp.maximum(side, SMALLEST_SIDE) for side in (h, w, ha, wa))
    return jnp.stack([(yc - ya) / ha, (xc - xa) / wa, jnp.log(h / ha), jnp.log(w / wa)], axis=-1)


def decode(regressions: Float[Array, '*#n 4'], anchors: Float[Array, '*#n 4']) -> Float[Array, '*n 4']:
    """The inverse of `encode`. The exponential is not clamped (docs/reference.md, Anchors)."""
    ty, tx, th, tw = jnp.moveaxis(regressions, -1, 0)
    ya, xa, ha, wa = centers_and_sides(anchors)
    yc, xc, h, w = ty * ha + ya, tx * wa + xa, jnp.exp(th) * ha, jnp.exp(tw) * wa
    return jnp.stack([yc - h / 2, xc - w / 2, yc + h / 2, xc + w / 2], axis=-1)


Side = float | Float[Array, '']


def clip(boxes: Float[Array, '*n 4'], height: Side, width: Side) -> Float[Array, '*n 4']:
    """Boxes cut at 0 and at (height, width)."""
    return jnp.clip(boxes, 0, jnp.asarray([height, width, height, width], boxes.dtype))
