import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdet_jax.model import layers


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class NormOnly(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return layers.Norm()(name='bn')(x, train)


def test_batch_norm_in_training():
    x = 3 * normal(2, 4, 5, 3) + 2
    variables = NormOnly().init(jax.random.key(0), x, False)
    y, updates = NormOnly().apply(variables, x, True, mutable=['batch_stats'])
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))  # biased: no n / (n - 1)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-3), rtol=1e-4, atol=1e-5)
    stats = updates['batch_stats']['bn']
    np.testing.assert_allclose(stats['mean'], mean, rtol=1e-4)
    np.testing.assert_allclose(stats['var'], variance, rtol=1e-5)


def test_batch_norm_in_evaluation_uses_stored_statistics():
    x, mean, variance, scale, bias = normal(1, 2, 2, 3), *jnp.abs(normal(4, 3, seed=1))
    variables = {
        'params': {'bn': {'scale': scale, 'bias': bias}},
        'batch_stats': {'bn': {'mean': mean, 'var': variance}},
    }
    expected = (x - mean) / np.sqrt(variance + 1e-3) * scale + bias
    np.testing.assert_allclose(NormOnly().apply(variables, x, False), expected, rtol=1e-4, atol=1e-5)


def drop(rate, x, seed=0, axis_name=None):
    module = layers.StochasticDepth(rate, axis_name)
    return module.apply({}, x, True, rngs={'stochastic_depth': jax.random.key(seed)})


def test_stochastic_depth_drops_whole_samples_and_keeps_the_expectation():
    x, rate = jnp.ones((4000, 1, 2, 3)), 0.2
    y = np.asarray(drop(rate, x)).reshape(4000, 6)
    kept = y[:, 0] > 0
    np.testing.assert_allclose(y, np.broadcast_to(kept[:, None] / (1 - rate), y.shape), rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / 4000)
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation


def test_stochastic_depth_is_the_identity_in_evaluation_and_at_rate_zero():
    x = normal(3, 2, 2, 1)
    np.testing.assert_array_equal(layers.StochasticDepth(0.5).apply({}, x, False), x)
    np.testing.assert_array_equal(layers.StochasticDepth(0.0).apply({}, x, True), x)  # needs no rng


def test_stochastic_depth_does_not_depend_on_the_number_of_devices():
    x = jnp.ones((8, 1, 1, 2))
    split = jax.vmap(lambda part: drop(0.5, part, axis_name='batch'), axis_name='batch')(x.reshape(4, 2, 1, 1, 2))
    np.testing.assert_array_equal(split.reshape(x.shape), drop(0.5, x))


def rows(values, width=1):
    return jnp.repeat(jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1), width, axis=2)


def test_upsampling_floors_the_ratio():
    up = layers.upsample_nearest(rows([0, 1, 2], width=3), 5, 5)
    np.testing.assert_array_equal(up[0, :, 0, 0], [0, 0, 1, 1, 2])  # not 0, 0, 1, 2, 2 as jax.image.resize has it
    np.testing.assert_array_equal(layers.upsample_nearest(rows(range(4)), 7, 1)[0, :, 0, 0], [0, 0, 1, 1, 2, 2, 3])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(0, 1)] * 2))
def test_upsampling_equals_indexing(size, odd):
    # Twice the size, the broadcast, and one less, the gather, read the same source pixels.
    x = normal(1, *size, 2)
    target = tuple(max(n, 2 * n - o) for n, o in zip(size, odd, strict=True))
    index = [np.floor(np.arange(t) * n / t).astype(int) for n, t in zip(size, target, strict=True)]
    np.testing.assert_array_equal(layers.resize_to(x, *target), x[:, index[0]][:, :, index[1]])


@pytest.mark.parametrize('size', [(6, 6), (5, 5), (7, 4), (1, 3), (2, 1)])
def test_pooling_to_the_next_level_is_a_3x3_maximum_with_stride_2(size):
    x = normal(2, *size, 3) - 5  # all negative: padding with zeros would show
    height, width = ((n + 1) // 2 for n in size)
    total = [max((out - 1) * 2 + 3 - n, 0) if n > 1 else 0 for n, out in zip(size, (height, width), strict=True)]
    padded = np.full((2, size[0] + 4, size[1] + 4, 3), -np.inf)
    first = [t // 2 for t in total]
    padded[:, first[0] : first[0] + size[0], first[1] : first[1] + size[1]] = x
    extent = [3 if n > 1 else 1 for n in size]
    expected = np.stack([
        np.stack([padded[:, 2 * i : 2 * i + extent[0], 2 * j : 2 * j + extent[1]].max((1, 2)) for j in range(width)], 1)
        for i in range(height)
    ], 1)  # fmt: skip
    np.testing.assert_array_equal(layers.resize_to(x, height, width), expected.astype(np.float32))


def test_resizing_to_the_same_size_is_the_identity_and_mixed_directions_are_refused():
    x = normal(1, 4, 6, 2)
    assert layers.resize_to(x, 4, 6) is x
    with pytest.raises(ValueError, match='one side grows and the other shrinks'):
        layers.resize_to(x, 8, 3)


@pytest.mark.parametrize(
    ('init', 'shape', 'deviation'),
    [
        (layers.fan_out, (3, 3, 64, 128), (2 / (9 * 128)) ** 0.5),
        (layers.depthwise_fan_out, (3, 3, 1, 4096), (2 / 9) ** 0.5),
        (layers.glorot, (1, 1, 160, 200), (2 / 360) ** 0.5),
        (layers.depthwise_glorot, (3, 3, 1, 1024), (2 / (9 * 1025)) ** 0.5),
        (layers.fan_in, (1, 1, 64, 810), (1 / 64) ** 0.5),
        (layers.depthwise_fan_in, (3, 3, 1, 64), 0.0415),  # measured in the reference, for 64 channels
    ],
)
def test_initial_deviations(init, shape, deviation):
    kernel = np.asarray(init(jax.random.key(0), shape))
    assert kernel.shape == shape
    assert kernel.std() == pytest.approx(deviation, rel=0.1)
    assert abs(kernel.mean()) < 5 * deviation / kernel.size**0.5


def test_separable_convolution_is_depthwise_then_pointwise_with_bias():
    module = layers.SeparableConv(4, layers.depthwise_fan_in, layers.fan_in, nn.initializers.ones)
    x = normal(1, 5, 4, 3)
    variables = module.init(jax.random.key(0), x)
    params = variables['params']
    assert jax.tree.map(jnp.shape, params) == {
        'dw': {'kernel': (3, 3, 1, 3)},
        'pw': {'kernel': (1, 1, 3, 4), 'bias': (4,)},
    }
    kernel, padded = np.asarray(params['dw']['kernel'])[:, :, 0], np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    depthwise = sum(padded[:, i : i + 5, j : j + 4] * kernel[i, j] for i in range(3) for j in range(3))
    expected = depthwise @ np.asarray(params['pw']['kernel'])[0, 0] + 1
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
