"""Batch norm and its activation as one function with a gradient of its own. Definition: `model.batch_norm.batch_norm`.

Autodiff keeps four arrays of the size of the input for the backward pass: the centred input, the normalised one, the
input of the activation and a sigmoid. This keeps the input and two numbers per channel.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Array], Array]


def _swish_slope(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


SLOPES: dict[Activation, Activation] = {  # derivatives; those of other activations are left to autodiff
    jax.nn.swish: _swish_slope,
    jax.nn.relu6: lambda x: ((x > 0) & (x < 6)).astype(x.dtype),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: Float[Array, '*b C'],
    scale: Float[Array, 'C'],
    bias: Float[Array, 'C'],
    activation: Activation,
    axis_name: str | None,
    epsilon: float,
) -> tuple[Float[Array, '*b C'], Float[Array, 'C'], Float[Array, 'C']]:
    return _forward(x, scale, bias, activation, axis_name, epsilon)[0]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))  # so that each shape is traced once, as in the gradient
def _forward(
    x: Array, scale: Array, bias: Array, activation: Activation, axis_name: str | None, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    mean, mean_square = _mean(axis_name, x, jnp.square(x.astype(jnp.float32)))
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)  # of the standard deviation
    y = activation((x - mean) * (scale * inverse) + bias)
    return (y.astype(x.dtype), mean, variance), (x, scale, bias, mean, inverse)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    activation: Activation,
    axis_name: str | None,
    epsilon: float,
    residuals: tuple[Array, ...],
    gradients: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """With h = (x - mean) * inverse and dz the gradient before the activation (Ioffe, Szegedy 2015, section 3):

    dx = scale * inverse * (dz - mean(dz) - h * mean(dz * h)).
    """
    x, scale, bias, mean, inverse = residuals
    h = (x - mean) * inverse
    dz = gradients[0].astype(jnp.float32) * _slope(activation, h * scale + bias)
    mean_dz, mean_dz_h = _mean(axis_name, dz, dz * h)
    dx = scale * inverse * (dz - mean_dz - h * mean_dz_h)
    # The training step sums the gradients of parameters over devices, so each device returns an equal share.
    positions = x.size // x.shape[-1]
    return dx.astype(x.dtype), mean_dz_h * positions, mean_dz * positions


batch_norm.defvjp(_forward, _backward)


def _slope(activation: Activation, x: Array) -> Array:
    return SLOPES[activation](x) if activation in SLOPES else jax.jvp(activation, (x,), (jnp.ones_like(x),))[1]


def _mean(axis_name: str | None, *arrays: Array) -> tuple[Array, ...]:
    means = tuple(jnp.mean(a, axis=range(a.ndim - 1), dtype=jnp.float32) for a in arrays)
    return jax.lax.pmean(means, axis_name) if axis_name and jax.lax.axis_size(axis_name) > 1 else means
