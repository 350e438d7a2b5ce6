import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effdet_jax.model.batch_norm import EPSILON, FOLDED, BatchNorm, fold


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), jnp.float32)


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
