"""Focal loss with a gradient of its own. Definition: `detection.losses.focal_loss`.

Autodiff keeps five arrays of the size of the logits for the backward pass; this keeps the logits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def focal_loss(
    logits: Float[Array, '*n K'], classes: Int[Array, '*n'], alpha: float, gamma: float, label_smoothing: float
) -> Float[Array, '*n K']:
    return _forward(logits, classes, alpha, gamma, label_smoothing)[0]


def _forward(logits: Array, classes: Array, *constants: float) -> tuple[Array, tuple[Array, Array]]:
    _, weight, cross_entropy, _ = _terms(logits, classes, *constants)
    return weight * cross_entropy, (logits, classes)


def _backward(
    alpha: float, gamma: float, label_smoothing: float, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, None]:
    """d/dx of weight * cross entropy, with d log(1 - p_t) / dx = 1 - p for a negative and -p for a positive."""
    logits, classes = residuals
    positive, weight, cross_entropy, target = _terms(logits, classes, alpha, gamma, label_smoothing)
    p = jax.nn.sigmoid(logits)
    log_miss_slope = jnp.where(positive, -p, jax.nn.sigmoid(-logits))
    return gradient * weight * (gamma * log_miss_slope * cross_entropy + p - target), None


focal_loss.defvjp(_forward, _backward)


def _terms(
    logits: Array, classes: Array, alpha: float, gamma: float, label_smoothing: float
) -> tuple[Array, Array, Array, Array]:
    """(which entries are positive, alpha_t (1 - p_t)^gamma, cross entropy, its smoothed targets)."""
    positive = classes[..., None] == jnp.arange(logits.shape[-1])
    target = jnp.where(positive, 1.0 - 0.5 * label_smoothing, 0.5 * label_smoothing)
    # -log p = max(-x, 0) + tail and -log(1 - p) = max(x, 0) + tail, where tail = log(1 + exp(-|x|)).
    tail = _log1p(_exp(-jnp.abs(logits)))
    cross_entropy = tail + (1 - target) * jnp.maximum(logits, 0) + target * jnp.maximum(-logits, 0)
    log_miss = -(jnp.maximum(jnp.where(positive, logits, -logits), 0) + tail)
    return positive, jnp.where(positive, alpha, 1.0 - alpha) * _exp(gamma * log_miss), cross_entropy, target


def _exp(x: Array) -> Array:
    """XLA's exp is twice as slow as its exp2 on CPU, and this loss is all exp and log."""
    return jnp.exp2(x * math.log2(math.e))


def _log1p(x: Array) -> Array:
    """log(1 + x) for x >= 0, corrected for the rounding of 1 + x (Goldberg 1991, theorem 4); XLA's is slow on CPU."""
    sum_ = 1.0 + x
    return jnp.where(sum_ == 1.0, x, jnp.log(sum_) * (x / jnp.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
