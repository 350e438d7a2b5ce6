"""Batch norm and the activation behind it, as one function with a gradient of its own.

Autodiff would keep the centred input, the normalised one and the sigmoid of a swish for the backward pass: four arrays
of the size of the input, where two sums over it and the input itself are enough.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

EPSILON = 1e-3  # everywhere (docs/reference.md, Backbone)
FOLDED = 'folded'  # the collection in which `fold` leaves scale and shift


class Activation(NamedTuple):
    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]


def _swish_slope(x: Array) -> Array:
    sigmoid = nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS = {
    'swish': Activation(nn.swish, _swish_slope),
    'relu6': Activation(nn.relu6, lambda x: ((x > 0) & (x < 6)).astype(x.dtype)),
    'none': Activation(lambda x: x, jnp.ones_like),
}


class BatchNorm(nn.Module):
    """`activation((x - mean) / sqrt(variance + epsilon) * scale + bias)`; statistics over all axes but the last.

    In training they are those of the batch, over all devices of `axis_name`, and are left in `batch_stats`: to average
    them over the steps is the training step's business (training/state.py). Otherwise they are taken from there, or,
    where `fold` has been at work, `scale * x + shift` from the collection `folded`. float32 inside.
    """

    activation: str = 'none'
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, '*b C'], train: bool) -> Float[Array, '*b C']:
        channels = x.shape[-1:]
        if self.has_variable(FOLDED, 'scale'):
            y = x * self.get_variable(FOLDED, 'scale') + self.get_variable(FOLDED, 'shift')
            return ACTIVATIONS[self.activation].value(y).astype(self.dtype)
        scale = self.param('scale', nn.initializers.ones, channels, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, channels, jnp.float32)
        variance = self.variable('batch_stats', 'var', jnp.ones, channels, jnp.float32)
        if not train:
            y = (x - mean.value) * (scale * jax.lax.rsqrt(variance.value + EPSILON)) + bias
            return ACTIVATIONS[self.activation].value(y).astype(self.dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, *statistics = batch_norm(x, scale, bias, self.activation, axis_name)
        if not self.is_initializing():
            mean.value, variance.value = statistics
        return y.astype(self.dtype)


def fold(variables: dict) -> dict:
    """Variables for inference alone: every batch norm is one multiply-add, worked out here and not in every call."""
    params: dict[tuple, Any] = traverse_util.flatten_dict(variables['params'])
    statistics: dict[tuple, Any] = traverse_util.flatten_dict(variables['batch_stats'])
    folded = {}
    for layer in (path[:-1] for path in statistics if path[-1] == 'mean'):
        scale = params.pop((*layer, 'scale')) * jax.lax.rsqrt(statistics[*layer, 'var'] + EPSILON)
        folded[*layer, 'scale'] = scale
        folded[*layer, 'shift'] = params.pop((*layer, 'bias')) - statistics[*layer, 'mean'] * scale
    return {'params': traverse_util.unflatten_dict(params), FOLDED: traverse_util.unflatten_dict(folded)}


def batch_norm(
    x: Float[Array, '*b C'],
    scale: Float[Array, 'C'],
    bias: Float[Array, 'C'],
    activation: str = 'none',
    axis_name: str | None = None,
) -> tuple[Float[Array, '*b C'], Float[Array, 'C'], Float[Array, 'C']]:
    """(normalised with its own statistics and activated, mean, biased variance). No gradient passes the last two."""
    return _batch_norm(x, scale, bias, activation, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(
    x: Array, scale: Array, bias: Array, activation: str, axis_name: str | None
) -> tuple[Array, Array, Array]:
    return _forward(x, scale, bias, activation, axis_name)[0]


@functools.partial(jax.jit, static_argnums=(3, 4))  # so that it is traced once for each shape, as the gradient is
def _forward(
    x: Array, scale: Array, bias: Array, activation: str, axis_name: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    mean, mean_square = _mean(axis_name, x, jnp.square(x.astype(jnp.float32)))
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + EPSILON)  # of the standard deviation
    y = ACTIVATIONS[activation].value((x - mean) * (scale * inverse) + bias)
    return (y.astype(x.dtype), mean, variance), (x, scale, bias, mean, inverse)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    activation: str, axis_name: str | None, residuals: tuple[Array, ...], gradients: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """With h = (x - mean) * inverse and dz the gradient before the activation (Ioffe, Szegedy 2015, section 3):

    dx = scale * inverse * (dz - mean(dz) - h * mean(dz * h)).
    """
    x, scale, bias, mean, inverse = residuals
    h = (x - mean) * inverse
    dz = gradients[0].astype(jnp.float32) * ACTIVATIONS[activation].slope(h * scale + bias)
    mean_dz, mean_dz_h = _mean(axis_name, dz, dz * h)
    dx = scale * inverse * (dz - mean_dz - h * mean_dz_h)
    # The step adds up the devices' gradients of parameters: what each gives is its own share, here an equal one.
    positions = x.size // x.shape[-1]
    return dx.astype(x.dtype), mean_dz_h * positions, mean_dz * positions


_batch_norm.defvjp(_forward, _backward)


def _mean(axis_name: str | None, *arrays: Array) -> tuple[Array, ...]:
    means = tuple(jnp.mean(a, axis=range(a.ndim - 1), dtype=jnp.float32) for a in arrays)
    return jax.lax.pmean(means, axis_name) if axis_name and jax.lax.axis_size(axis_name) > 1 else means
