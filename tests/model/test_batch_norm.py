import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax.model.batch_norm import ACTIVATIONS, EPSILON, FOLDED, BatchNorm, batch_norm, fold


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), jnp.float32)


def by_autodiff(x, scale, bias, activation):
    """The definition, for autodiff."""
    mean = x.mean(axis=(0, 1, 2))
    variance = ((x - mean) ** 2).mean(axis=(0, 1, 2))
    return ACTIVATIONS[activation].value((x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_definition(activation):
    x, scale, bias, weights = draw((2, 3, 5, 4)), draw((4,), 1), draw((4,), 2), draw((2, 3, 5, 4), 3)

    def loss(function):
        return lambda *arguments: (function(*arguments) * weights).sum()

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias, activation)[0]

    def definition(x, scale, bias):
        return by_autodiff(x, scale, bias, activation)

    np.testing.assert_allclose(ours(x, scale, bias), definition(x, scale, bias), rtol=1e-5, atol=1e-5)
    for mine, true in zip(
        jax.grad(loss(ours), (0, 1, 2))(x, scale, bias),
        jax.grad(loss(definition), (0, 1, 2))(x, scale, bias),
        strict=True,
    ):
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_a_slope_is_the_derivative_of_its_activation(activation):
    value, slope = ACTIVATIONS[activation]
    x = jnp.linspace(-8, 8, 101) + 0.013  # beside the corners of relu6
    np.testing.assert_allclose(slope(x), jax.vmap(jax.grad(value))(x), rtol=1e-5, atol=1e-6)


def test_the_layer_has_the_names_and_values_of_flax():
    x = draw((4, 3, 3, 6))
    ours, flax = BatchNorm(), nn.BatchNorm(momentum=0.0, epsilon=EPSILON)
    variables = ours.init(jax.random.key(0), x, True)
    true, updates = flax.apply(variables, x, use_running_average=False, mutable=['batch_stats'])
    mine, my_updates = ours.apply(variables, x, True, mutable=['batch_stats'])
    np.testing.assert_allclose(mine, true, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), my_updates, updates)
    stored = {'params': variables['params'], **updates}
    np.testing.assert_allclose(
        ours.apply(stored, x, False), flax.apply(stored, x, use_running_average=True), rtol=1e-5, atol=1e-5
    )


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5, name='dense')(x)
        return BatchNorm('swish', name='a')(BatchNorm(name='b')(x, train), train)


def test_folded_variables_give_the_same_outputs():
    x = draw((7, 3))
    network = Two()
    variables = network.init(jax.random.key(0), x, True)
    _, updates = network.apply(variables, x, True, mutable=['batch_stats'])
    variables = {'params': variables['params'], **updates}
    folded = fold(variables)
    assert set(folded) == {'params', FOLDED}
    assert set(folded['params']) == {'dense'} and set(folded[FOLDED]) == {'a', 'b'}
    np.testing.assert_allclose(
        network.apply(folded, x, False), network.apply(variables, x, False), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_comes_back_as_bfloat16_and_is_computed_in_float32():
    x = draw((8, 4, 4, 3)).astype(jnp.bfloat16)
    layer = BatchNorm('swish', dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, True)
    y, updates = layer.apply(variables, x, True, mutable=['batch_stats'])
    assert y.dtype == jnp.bfloat16
    true = x.astype(jnp.float32).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(updates['batch_stats']['mean'], true, rtol=1e-6)
