"""Batch norm and the activation behind it; `fold` makes a multiply-add of every batch norm, for inference."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from effdet_jax.kernels.batch_norm import batch_norm as batch_norm_kernel
from effdet_jax.kernels.dispatch import runs_as

EPSILON = 1e-3  # everywhere (docs/reference.md, Backbone)
FOLDED = 'folded'  # collection with the scale and shift that `fold` computes

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {'swish': nn.swish, 'relu6': nn.relu6, 'none': lambda x: x}


@runs_as(batch_norm_kernel)
def batch_norm(
    x: Float[Array, '*b C'],
    scale: Float[Array, 'C'],
    bias: Float[Array, 'C'],
    activation: Callable[[Array], Array],
    axis_name: str | None = None,
    epsilon: float = EPSILON,
) -> tuple[Float[Array, '*b C'], Float[Array, 'C'], Float[Array, 'C']]:
    """(x normalised with its own statistics and activated, mean, biased variance). The last two have no gradient.

    Statistics are over all axes but the last, and over all devices of `axis_name`.
    """

    def mean_of(x: Array) -> Array:
        mean = x.mean(range(x.ndim - 1), dtype=jnp.float32)
        return jax.lax.pmean(mean, axis_name) if axis_name else mean

    mean = mean_of(x)
    variance = mean_of(jnp.square(x - mean))
    y = activation((x - mean) / jnp.sqrt(variance + epsilon) * scale + bias)
    return y.astype(x.dtype), jax.lax.stop_gradient(mean), jax.lax.stop_gradient(variance)


class BatchNorm(nn.Module):
    """`activation((x - mean) / sqrt(variance + epsilon) * scale + bias)`; statistics over all axes but the last.

    Training uses the statistics of the batch, over all devices of `axis_name`, and leaves them in `batch_stats`, which
    the training step averages over the steps (training/state.py). Otherwise they are read from there; with variables
    from `fold` the layer is `scale * x + shift`. float32 inside.
    """

    activation: str = 'none'
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, '*b C'], train: bool) -> Float[Array, '*b C']:
        channels, activation = x.shape[-1:], ACTIVATIONS[self.activation]
        if self.has_variable(FOLDED, 'scale'):
            y = x * self.get_variable(FOLDED, 'scale') + self.get_variable(FOLDED, 'shift')
            return activation(y).astype(self.dtype)
        scale = self.param('scale', nn.initializers.ones, channels, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, channels, jnp.float32)
        variance = self.variable('batch_stats', 'var', jnp.ones, channels, jnp.float32)
        if not train:
            y = (x - mean.value) * (scale * jax.lax.rsqrt(variance.value + EPSILON)) + bias
            return activation(y).astype(self.dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, *statistics = batch_norm(x, scale, bias, activation, axis_name)
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
