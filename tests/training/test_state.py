import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from effdet_jax.training import state as st

VARIABLES = {'params': {'w': jnp.ones(3)}, 'batch_stats': {'mean': jnp.zeros(2)}}


@pytest.mark.parametrize('decay', [0.998, 0.3])
def test_the_average_in_closed_form(decay):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 3))
    average, expected = {'w': jnp.zeros(3)}, np.zeros(3)
    for t, value in enumerate(values):
        average = st.moving_average(average, {'w': jnp.float32(value)}, st.averaging_weight(decay, jnp.int32(t)))
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * value
    np.testing.assert_allclose(average['w'], expected, rtol=1e-4)


def test_the_ramp_forgets_the_random_start():
    """After t steps the start weighs t! 9! / (9 + t)!: a billionth after forty. With 0.998 alone it weighs 92%."""
    average = {'w': jnp.ones(())}
    for t in range(40):
        average = st.moving_average(average, {'w': jnp.zeros(())}, st.averaging_weight(0.998, jnp.int32(t)))
    np.testing.assert_allclose(average['w'], np.prod([(1 + t) / (10 + t) for t in range(40)]), rtol=1e-4)
    assert average['w'] < 1e-8


def test_without_a_decay_there_is_no_average_and_the_variables_are_the_best():
    state = st.init_state(VARIABLES, optax.identity(), 0.0)
    assert state.ema == {}
    assert all(map(operator.is_, *map(jax.tree.leaves, (state.best_variables, state.variables))))


def test_with_a_decay_the_average_starts_as_a_copy_and_is_the_best():
    state = st.init_state(VARIABLES, optax.identity(), 0.998)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.variables)
    assert all(map(operator.is_, *map(jax.tree.leaves, (state.best_variables, state.ema))))
    # The state is donated to the step, and one buffer cannot be donated twice.
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.variables, state.ema))]
    assert len(set(buffers)) == len(buffers)


def test_variables_are_a_function_of_the_seed():
    a, b, other = (st.init_variables(tiny.toy(3), seed) for seed in (7, 7, 8))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.any(a['params']['backbone']['conv']['kernel'] != other['params']['backbone']['conv']['kernel'])
