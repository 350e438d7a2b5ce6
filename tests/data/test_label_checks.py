import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdet_jax.data import checks
from effdet_jax.data.example import Annotations
from effdet_jax.errors import UserError


def annotations(boxes, areas=None) -> Annotations:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(boxes)
    return Annotations(
        image_id='a',
        file_name='a.jpg',
        boxes_yxyx=boxes,
        labels=np.arange(count, dtype=np.int32),
        areas=np.full(count, np.nan, np.float32) if areas is None else np.array(areas, np.float32),
        is_crowd=np.zeros(count, bool),
        is_difficult=np.zeros(count, bool),
    )


DIRTY = {
    'sound': [1, 1, 5, 5],
    'box_without_area': [3, 3, 3, 9],
    'inverted_box': [5, 1, 1, 5],
    'box_outside': [20, 0, 30, 5],
    'box_reaching_outside': [-2, 4, 6, 30],  # at two sides
    'absurd_box': [4, 4, 4.5, 8],
}


def test_every_fault_is_found_and_mended():
    boxes = np.array(list(DIRTY.values()), np.float32)
    _, faults = checks.find_box_faults(boxes, np.full((len(boxes), 2), (10, 12)))
    assert {kind: list(DIRTY).index(kind) for kind in faults} == {
        kind: int(np.flatnonzero(fault)[0]) for kind, fault in faults.items()
    }
    assert all(fault.sum() == 1 for fault in faults.values())
    cleaned = checks.clean(annotations(boxes), (10, 12))
    np.testing.assert_array_equal(cleaned.boxes_yxyx, [[1, 1, 5, 5], [0, 4, 6, 12], [4, 4, 4.5, 8]])
    np.testing.assert_array_equal(cleaned.labels, [0, 4, 5])
    np.testing.assert_array_equal(cleaned.areas, [16, 48, 2])


@pytest.mark.parametrize(
    ('box', 'is_absurd'),
    [
        ((5, 5, 5.9, 9), True),
        ((5, 5, 6, 9), False),
        ((0, 5, 1, 56), True),  # 1 : 51
        ((0, 5, 1, 55), False),
        ((-50, -50, 150, 150), True),  # four images
        ((-50, -50, 149, 150), False),
        ((0.1, 0.1, 0.7, 0.4), True),  # fractions of the image's sides
    ],
)
def test_what_is_absurd(box, is_absurd):
    _, faults = checks.find_box_faults(np.array([box], np.float32), np.array([[100, 100]]))
    assert faults['absurd_box'][0] == is_absurd


def test_given_area_is_kept_unless_the_box_is_clipped():
    cleaned = checks.clean(annotations([[0, 0, 4, 4], [0, 0, 4, 40]], areas=[7, 70]), (10, 10))
    np.testing.assert_array_equal(cleaned.areas, [7, 40])


coordinates = st.floats(-30, 130, width=32)


@given(boxes=hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.just(4)), elements=coordinates))
def test_clean_boxes_are_valid_and_cleaning_twice_changes_nothing(boxes):
    cleaned = checks.clean(annotations(boxes), (100, 80))
    again = checks.clean(cleaned, (100, 80))
    np.testing.assert_array_equal(again.boxes_yxyx, cleaned.boxes_yxyx)
    _, faults = checks.find_box_faults(boxes, np.full((len(boxes), 2), (100, 80)))
    assert len(cleaned.labels) == len(boxes) - sum(faults[kind].sum() for kind in checks.DROPPED)
    assert np.sum(list(faults.values()), axis=0).max(initial=0) <= 1
    assert (cleaned.boxes_yxyx[:, 2:] > cleaned.boxes_yxyx[:, :2]).all()
    assert (cleaned.boxes_yxyx >= 0).all() and (cleaned.boxes_yxyx <= [100, 80, 100, 80]).all()


def test_unknown_size_cuts_nothing_off():
    cleaned = checks.clean(annotations([[0, 0, 9999, 9999]]), None)
    assert cleaned.boxes_yxyx.max() == 9999


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_coordinate_that_is_no_number_is_an_error(value):
    with pytest.raises(UserError, match=r'a\.jpg: box 1 '):
        checks.clean(annotations([[0, 0, 1, 1], [0, 0, value, 1]]), (5, 5))


def test_the_first_few_names_fit_a_line():
    assert checks.first_few('abc') == 'a, b, c'
    assert checks.first_few('abcdefg') == 'a, b, c, d, e and 2 more'
    assert checks.first_few(['a\nb\x1b[31m']) == r'a\nb\x1b[31m'
