import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdet_jax.kernels.selection import largest, plain_largest

SIZES = (1, 31, 32, 33, 100)
COUNTS = (1, 2, 20, 32, 100)
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, np.inf, -np.inf]))
select = jax.jit(jax.vmap(largest, in_axes=(0, None)), static_argnums=1)


@pytest.mark.parametrize('size', SIZES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_they_are_those_of_top_k_in_their_old_order(size, data):
    """Three rows at once, of any numbers, often equal ones, infinities and what is no number among them."""
    count = data.draw(st.sampled_from([count for count in COUNTS if count <= size]))
    values = data.draw(hnp.arrays(np.float32, (3, size), elements=FLOATS)) + np.float32(0)  # no -0
    expected = [plain_largest(jnp.asarray(row), count) for row in values]
    np.testing.assert_array_equal(select(values, count), expected)


def test_of_many_numbers_of_few_values():
    values = np.random.default_rng(0).integers(-3, 4, (2, 49104)).astype(np.float32)
    expected = np.sort(np.argsort(-values, axis=-1, kind='stable')[:, :5000], axis=-1)
    np.testing.assert_array_equal(select(values, 5000), expected)
