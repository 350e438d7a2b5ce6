import dataclasses

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


def test_every_fault_is_mended_and_counted_once():
    dirty = annotations(
        [
            [1, 1, 5, 5],  # good
            [3, 3, 3, 9],  # without area
            [5, 1, 1, 5],  # inverted
            [20, 0, 30, 5],  # outside
            [-2, 4, 6, 99],  # reaches outside at two sides
        ]
    )
    cleaned, faults = checks.clean(dirty, (10, 12))
    assert dataclasses.astuple(faults) == (1, 1, 1, 1)
    np.testing.assert_array_equal(cleaned.boxes_yxyx, [[1, 1, 5, 5], [0, 4, 6, 12]])
    np.testing.assert_array_equal(cleaned.labels, [0, 4])
    np.testing.assert_array_equal(cleaned.areas, [16, 48])


def test_given_area_is_kept_unless_the_box_is_clipped():
    cleaned, _ = checks.clean(annotations([[0, 0, 4, 4], [0, 0, 4, 40]], areas=[7, 70]), (10, 10))
    np.testing.assert_array_equal(cleaned.areas, [7, 40])


coordinates = st.floats(-30, 130, width=32)


@given(boxes=hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.just(4)), elements=coordinates))
def test_clean_boxes_are_valid_and_cleaning_twice_changes_nothing(boxes):
    cleaned, faults = checks.clean(annotations(boxes), (100, 80))
    again, none = checks.clean(cleaned, (100, 80))
    assert not none
    np.testing.assert_array_equal(again.boxes_yxyx, cleaned.boxes_yxyx)
    assert len(cleaned.labels) == len(boxes) - faults.without_area - faults.inverted - faults.outside
    assert (cleaned.boxes_yxyx[:, 2:] > cleaned.boxes_yxyx[:, :2]).all()
    assert (cleaned.boxes_yxyx >= 0).all() and (cleaned.boxes_yxyx <= [100, 80, 100, 80]).all()


def test_unknown_size_cuts_nothing_off():
    cleaned, faults = checks.clean(annotations([[0, 0, 9999, 9999]]), None)
    assert not faults and cleaned.boxes_yxyx.max() == 9999


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_coordinate_that_is_no_number_is_an_error(value):
    with pytest.raises(UserError, match=r'a\.jpg: box 1 '):
        checks.clean(annotations([[0, 0, 1, 1], [0, 0, value, 1]]), (5, 5))


def test_notes_name_the_images():
    faults = [(name, checks.Faults(without_area=1)) for name in 'abcdefg'] + [('h', checks.Faults(clipped=1))]
    assert checks.describe([*faults, ('good', checks.Faults())]) == (
        '7 boxes without area dropped: a, b, c, d, e and 2 more',
        '1 box reaching outside the image clipped: h',
    )
    assert checks.describe([('good', checks.Faults())]) == ()
