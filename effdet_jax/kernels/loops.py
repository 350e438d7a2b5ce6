"""Small changes of form, after which XLA compiles better loops on CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from effdet_jax.kernels.dispatch import by_platform


def max_and_argmax(values: Float[Array, 'N']) -> tuple[Float[Array, ''], Int[Array, '']]:
    """`(values.max(), values.argmax())` of numbers without nan, as passes that can be vectorised."""
    largest = values.max()
    return largest, jnp.where(values == largest, jnp.arange(len(values)), len(values) - 1).min()


def computed_apart(function: Callable[..., Array], operands: tuple[Any, ...], positive: Shaped[Array, '*n']) -> Array:
    """`function(*operands)`, fused into nothing that reads it: on CPU, inside a branch that is always taken.

    `positive`: numbers above 0, which the compiler does not know.
    """

    def apart(*operands: Any) -> Array:
        result = jax.eval_shape(function, *operands)
        return jax.lax.cond(positive.min() > 0, function, lambda *_: jnp.zeros(result.shape, result.dtype), *operands)

    return by_platform(*operands, cpu=apart, plain=function)
