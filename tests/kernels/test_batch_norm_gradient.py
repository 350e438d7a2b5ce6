import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax.kernels.batch_norm import SLOPES
from effdet_jax.model.batch_norm import ACTIVATIONS, batch_norm


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), jnp.float32)


@pytest.mark.parametrize('activation', [*ACTIVATIONS.values(), jnp.tanh], ids=[*ACTIVATIONS, 'without a slope'])
def test_values_and_gradients_are_those_of_the_definition(activation):
    arguments, weights = (draw(2, 3, 5, 4, seed=0), draw(4, seed=1), draw(4, seed=2)), draw(2, 3, 5, 4, seed=3)

    def values_and_gradients(function):
        results, pullback = jax.vjp(lambda *arguments: function(*arguments, activation), *arguments)
        return *results, *pullback((weights, jnp.ones(4), jnp.ones(4)))

    for ours, definition in zip(
        values_and_gradients(batch_norm), values_and_gradients(batch_norm.__wrapped__), strict=True
    ):
        np.testing.assert_allclose(ours, definition, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('activation', SLOPES)
def test_a_slope_is_the_derivative_of_its_activation(activation):
    x = jnp.linspace(-8, 8, 101) + 0.013  # beside the corners of relu6
    np.testing.assert_allclose(SLOPES[activation](x), jax.vmap(jax.grad(activation))(x), rtol=1e-5, atol=1e-6)
