"""Losses of the two heads (docs/reference.md, Losses). All are sums: the caller divides by the normaliser."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from effdet_jax.detection import boxes as box_ops
from effdet_jax.kernels import focal
from effdet_jax.kernels.dispatch import runs_as


@runs_as(focal.focal_loss)
def focal_loss(
    logits: Float[Array, '*n K'],
    classes: Int[Array, '*n'],
    alpha: float = 0.25,
    gamma: float = 1.5,
    label_smoothing: float = 0.0,
) -> Float[Array, '*n K']:
    """-alpha_t (1 - p_t)^gamma log(p_t) on sigmoid outputs, with classes in 0..K-1 and -1 for background.

    Lin et al. 2017, equation 5. Label smoothing moves the target of the logarithm towards one half; alpha_t and p_t see
    the unsmoothed target. Training passes the values of `config.loss`.
    """
    positive = classes[..., None] == jnp.arange(logits.shape[-1])
    p = jax.nn.sigmoid(logits)
    p_t, alpha_t = jnp.where(positive, p, 1 - p), jnp.where(positive, alpha, 1 - alpha)
    smoothed = jnp.where(positive, 1 - label_smoothing / 2, label_smoothing / 2)
    cross_entropy = optax.losses.sigmoid_binary_cross_entropy(logits, smoothed)
    return alpha_t * (1 - p_t) ** gamma * cross_entropy


def huber_loss(
    regressions: Float[Array, '*n 4'], targets: Float[Array, '*n 4'], delta: float = 0.1
) -> Float[Array, '*n 4']:
    """0.5 e^2 up to |e| = delta, then delta |e| - 0.5 delta^2. `delta=1` is smooth-L1.

    A coordinate whose target is exactly zero counts nothing: this is how background rows are masked, and it also drops
    the rare exact zero of a positive, as in the official code.
    """
    return jnp.where(targets != 0, optax.losses.huber_loss(regressions, targets, delta=delta), 0)


def iou_loss(
    regressions: Float[Array, '*n 4'], targets: Float[Array, '*n 4'], anchors: Float[Array, '*#n 4'], kind: str = 'ciou'
) -> Float[Array, '*n']:
    """1 - IoU of decoded predictions and targets, or one of its descendants; background rows (all zero) count nothing.

    kinds: 'iou'; 'giou' (Rezatofighi et al. 2019); 'diou' and 'ciou' (Zheng et al. 2020).
    """
    positive = (targets != 0).any(axis=-1)
    # Background rows are given the anchor itself on both sides, so that their gradient is zero rather than undefined.
    predicted = box_ops.decode(jnp.where(positive[..., None], regressions, 0), anchors)
    wanted = box_ops.decode(targets, anchors)
    return jnp.where(positive, IOU_PENALTIES[kind](predicted, wanted), 0)


def _iou(a: Array, b: Array) -> Array:
    return 1 - box_ops.iou(a, b)


def _giou(a: Array, b: Array) -> Array:
    """IoU loss + share of the smallest enclosing box that neither covers."""
    enclosing = box_ops.areas(_enclosing(a, b))
    union = box_ops.areas(a) + box_ops.areas(b) - box_ops.intersections(a, b)
    return _iou(a, b) + (enclosing - union) / jnp.maximum(enclosing, box_ops.SMALLEST_SIDE)


def _diou(a: Array, b: Array) -> Array:
    """IoU loss + squared distance of the centres over the squared diagonal of the enclosing box."""
    _, _, height, width = box_ops.centers_and_sides(_enclosing(a, b))
    diagonal = height**2 + width**2
    (ya, xa, _, _), (yb, xb, _, _) = box_ops.centers_and_sides(a), box_ops.centers_and_sides(b)
    return _iou(a, b) + ((ya - yb) ** 2 + (xa - xb) ** 2) / jnp.maximum(diagonal, box_ops.SMALLEST_SIDE)


def _ciou(a: Array, b: Array) -> Array:
    """DIoU loss + a penalty for another aspect ratio, whose weight is held constant in the gradient."""
    (_, _, ha, wa), (_, _, hb, wb) = box_ops.centers_and_sides(a), box_ops.centers_and_sides(b)
    v = (4 / math.pi**2) * (jnp.arctan2(wb, hb) - jnp.arctan2(wa, ha)) ** 2
    loss = _iou(a, b)
    weight = jax.lax.stop_gradient(v / jnp.maximum(loss + v, box_ops.SMALLEST_SIDE))
    return _diou(a, b) + weight * v


def _enclosing(a: Array, b: Array) -> Array:
    return jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)


IOU_PENALTIES = {'iou': _iou, 'giou': _giou, 'diou': _diou, 'ciou': _ciou}
