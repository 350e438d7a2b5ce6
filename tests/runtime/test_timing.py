"""Statistics by closed form; blocks of calls by counting them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.runtime import timing

seconds = st.lists(st.floats(0.001, 10), min_size=2, max_size=9)


def test_a_spread_by_closed_form():
    found = timing.spread([1.0, 2.0, 3.0, 4.0, 5.0])  # median absolute deviation 1
    assert (found.median, found.low, found.high, found.count) == (3.0, 2.0, 4.0, 5)
    assert found.error == pytest.approx(1.4826 * math.sqrt(math.pi / 2) / math.sqrt(5))


def test_the_error_is_that_of_the_median_of_normal_numbers():
    rng = np.random.default_rng(0)
    samples = rng.normal(10, 1, (2000, 101))
    assert timing.spread(samples[0].tolist()).error == pytest.approx(np.median(samples, axis=1).std(), rel=0.3)


def test_one_measurement_has_no_error_and_none_is_refused():
    assert math.isnan(timing.spread([2.0]).error)
    assert timing.spread([2.0]).as_dict() == {'median': 2.0, 'error': None, 'low': 2.0, 'high': 2.0, 'count': 1}
    with pytest.raises(ValueError, match='no measurements'):
        timing.spread([])


@given(seconds, st.floats(0.5, 2))
def test_what_slows_neighbours_alike_does_not_move_their_ratio(theirs, ratio):
    ours = [ratio * t for t in theirs]
    found = timing.paired_ratio(ours, theirs)
    assert found.median == pytest.approx(ratio) and found.error == pytest.approx(0, abs=1e-9)


def test_more_work_of_theirs_is_added_before_dividing():
    assert timing.paired_ratio([2.0, 2.0], [1.0, 3.0], theirs_more=1.0).median == pytest.approx((1.0 + 0.5) / 2)


@pytest.mark.parametrize('ahead', [0, 1, 3, 9])
def test_a_block_waits_for_every_call_and_runs_no_further_ahead(ahead):
    begun, waited, furthest = [], [], 0

    def call():
        nonlocal furthest
        begun.append(len(begun))
        furthest = max(furthest, len(begun) - len(waited))
        return begun[-1]

    assert timing.seconds_per_call(call, waited.append, 5, ahead) >= 0
    assert waited == begun == list(range(6))  # one to warm up, five that count
    assert furthest == min(ahead, 4) + 1


@given(st.integers(1, 6), st.integers(1, 4))
def test_in_turns_everyone_is_first_equally_often(systems, rounds):
    names = [str(i) for i in range(systems)]
    turns = timing.in_turns(names, rounds * systems)
    assert all(sorted(turn) == sorted(names) for turn in turns)
    assert [turn[0] for turn in turns] == names * rounds


def test_a_block_holds_at_least_one_call():
    assert timing.calls_in(1.0, 0.1) == 10
    assert timing.calls_in(1.0, 60.0) == 1


def test_the_peak_of_memory_is_seen_and_reset():
    timing.settle()
    before = timing.peak_bytes()
    block = np.ones(2**23)
    assert timing.peak_bytes() - before > 0.9 * block.nbytes
    del block
    timing.settle()
    assert timing.peak_bytes() - before < 2**23
