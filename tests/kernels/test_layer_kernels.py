"""The kernels of the network's layers against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax.kernels import layers


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (6, 5), (1, 3), (12, 10)])
def test_the_stem_on_cpu_is_the_convolution_of_xla(size):
    x, kernel = draw(2, *size, 3), draw(3, 3, 3, 4, seed=1)
    ours = jax.jit(layers.stem_conv)(x, kernel)
    np.testing.assert_allclose(ours, layers.plain_stem_conv(x, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('with_gate', [False, True])
def test_a_product_of_matrices_is_a_1x1_convolution_of_the_gated_input(with_gate, train):
    x, kernel, bias = draw(3, 4, 5, 6), draw(1, 1, 6, 7, seed=1), draw(7, seed=2)
    gate = jax.nn.sigmoid(draw(3, 1, 1, 6, seed=3)) if with_gate else None
    gated = x * gate if with_gate else x
    expected = jax.lax.conv_general_dilated(gated, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    ours = layers.pointwise_conv(x, kernel, bias, gate, train)
    np.testing.assert_allclose(ours, expected + bias, rtol=1e-5, atol=1e-5)


def value_and_gradient(function, x):
    value, pullback = jax.vjp(function, x)
    return value, *pullback(draw(*value.shape, seed=1))


@pytest.mark.parametrize('size', [(6, 6), (7, 4), (1, 3)])
def test_pooling_and_its_gradient_are_those_of_the_window_operation(size):
    x = draw(2, *size, 3) - 5  # all negative: padding with zeros would show
    ours, plain = (
        value_and_gradient(lambda x, pool=pool: pool(x, (2, 2)), x) for pool in (layers.max_pool, layers.plain_max_pool)
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_doubling_and_its_gradient_are_those_of_repeated_rows_and_columns():
    x = draw(2, 3, 4, 5)
    ours, plain = (value_and_gradient(f, x) for f in (layers.double, lambda x: x.repeat(2, axis=1).repeat(2, axis=2)))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
