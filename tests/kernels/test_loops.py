import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdet_jax.kernels.loops import computed_apart, max_and_argmax


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, 9, elements=st.sampled_from([-np.inf, -1.0, 0.0, 1.0, np.inf])))
def test_the_first_of_equals_is_the_largest(values):
    np.testing.assert_array_equal(max_and_argmax(jnp.asarray(values)), (values.max(), values.argmax()))


def test_computed_apart_is_the_function():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    ours = jax.jit(lambda x, y: computed_apart(jnp.subtract, (x, y), positive=y))(x, y)
    np.testing.assert_array_equal(ours, x - y)
