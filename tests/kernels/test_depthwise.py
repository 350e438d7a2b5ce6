"""The hand-written depthwise convolution and its gradients, against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax.kernels import depthwise
from effdet_jax.kernels.depthwise import depthwise_conv, plain_depthwise_conv

SIZES = [(1, 1), (1, 6), (2, 3), (5, 5), (8, 7), (6, 12), (11, 20)]


def random_case(size, k, stride, batch=2, channels=3):
    rng = np.random.default_rng(0)
    out = [-(-n // stride) for n in size]
    shapes = (batch, *size, channels), (k, k, 1, channels), (batch, *out, channels)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(conv, stride, x, kernel, cotangent):
    y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, stride), x, kernel)
    return y, *pullback(cotangent)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('k', [3, 5])
@pytest.mark.parametrize('size', SIZES)
def test_value_and_gradients_equal_those_of_xla(size, k, stride):
    case = random_case(size, k, stride)
    ours = value_and_gradients(depthwise_conv, stride, *case)
    expected = value_and_gradients(plain_depthwise_conv, stride, *case)
    for name, a, b in zip(('value', 'input gradient', 'kernel gradient'), ours, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()), err_msg=name)


def test_same_padding_is_tensorflows():
    # Even size, stride 2: k=3 pads (0, 1), k=5 pads (1, 2) (docs/reference.md, Backbone). A kernel that picks its
    # centre shows where it is.
    x = jnp.arange(8.0).reshape(1, 8, 1, 1)
    for k, first in ((3, 1), (5, 1)):
        kernel = jnp.zeros((k, k, 1, 1)).at[k // 2, k // 2].set(1.0)
        np.testing.assert_array_equal(depthwise_conv(x, kernel, 2)[0, :, 0, 0], np.arange(first, 8, 2))


def test_other_platforms_use_xlas_convolution(monkeypatch):
    monkeypatch.setattr(depthwise.jax.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))
    case = random_case((5, 8), 3, 2)
    ours = value_and_gradients.__wrapped__(depthwise_conv, 2, *case)
    expected = value_and_gradients(plain_depthwise_conv, 2, *case)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('stride', [1, 2])
def test_bfloat16_is_the_float32_result_up_to_its_precision(stride):
    case = tuple(a.astype(jnp.bfloat16) for a in random_case((8, 7), 3, stride))
    ours = value_and_gradients(depthwise_conv, stride, *case)
    expected = value_and_gradients(plain_depthwise_conv, stride, *(a.astype(jnp.float32) for a in case))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        # 8 bits of mantissa, up to nine roundings of partial sums
        assert float(jnp.abs(a.astype(jnp.float32) - b).max()) < 9 * 2**-9 * float(jnp.abs(b).max())


def test_vmapped_over_an_extra_axis():
    x, kernel, cotangent = random_case((5, 6), 3, 2, batch=4)
    expected = value_and_gradients(plain_depthwise_conv, 2, x, kernel, cotangent)

    def split(a):
        return a.reshape(2, 2, *a.shape[1:])

    mapped = jax.jit(jax.vmap(functools.partial(value_and_gradients.__wrapped__, depthwise_conv, 2), (0, None, 0)))
    y, dx, dkernel = mapped(split(x), kernel, split(cotangent))
    for a, b in zip((y.reshape(expected[0].shape), dx.reshape(x.shape), dkernel.sum(0)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_each_gradient_alone():
    # A frozen backbone asks for one of the two gradients, and XLA drops the other.
    x, kernel, cotangent = random_case((6, 5), 5, 1)
    both = value_and_gradients(depthwise_conv, 1, x, kernel, cotangent)[1:]

    def loss(x, kernel):
        return (depthwise_conv(x, kernel, 1) * cotangent).sum()

    for argument in (0, 1):
        alone = jax.jit(jax.grad(loss, argument))(x, kernel)
        np.testing.assert_allclose(alone, both[argument], rtol=1e-5, atol=1e-5)
