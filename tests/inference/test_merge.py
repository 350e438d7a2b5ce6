"""Boxes of several views become one set: cases by hand, and what holds for any boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.errors import UserError
from effdet_jax.inference import Augmentation, merge


def array(*rows):
    return np.array(rows, np.float32).reshape(-1, 4)


def view(rows, scores, labels):
    return merge.Boxes(array(*rows), np.array(scores, np.float32), np.array(labels, np.int32))


def test_two_views_of_one_object_by_hand():
    # overlap of the two: 10 x 8 = 80 of 100 + 100 - 80, IoU 2/3
    boxes, scores = merge.weighted_box_fusion(array([0, 0, 10, 10], [0, 2, 10, 12]), np.float32([0.8, 0.4]), 2, 0.55)
    np.testing.assert_allclose(boxes, [[0, 2 / 3, 10, 10 + 2 / 3]], rtol=1e-6)  # (0.8 * 0 + 0.4 * 2) / 1.2
    np.testing.assert_allclose(scores, [0.6], rtol=1e-6)


def test_what_one_view_of_three_finds_counts_a_third():
    boxes, scores = merge.weighted_box_fusion(array([0, 0, 10, 10], [50, 50, 60, 60]), np.float32([0.9, 0.6]), 3, 0.55)
    np.testing.assert_array_equal(boxes, [[0, 0, 10, 10], [50, 50, 60, 60]])
    np.testing.assert_allclose(scores, [0.3, 0.2], rtol=1e-6)


def test_a_view_that_finds_an_object_twice_counts_once():
    _, scores = merge.weighted_box_fusion(array(*[[0, 0, 10, 10]] * 3), np.float32([0.9, 0.6, 0.3]), 2, 0.55)
    np.testing.assert_allclose(scores, [0.6], rtol=1e-6)


def test_a_box_joins_the_average_and_not_the_first_of_a_cluster():
    # IoU of the third with the first is 1/3; with the average of the first two, at 2.5: 75 / 125 = 0.6
    rows, scores = array([0, 0, 10, 10], [5, 0, 15, 10], [5, 0, 15, 10]), np.float32([0.8, 0.8, 0.4])
    boxes, _ = merge.weighted_box_fusion(rows, scores, 1, 0.3)
    np.testing.assert_allclose(boxes, [[3, 0, 13, 10]], rtol=1e-6)  # (0 * 0.8 + 5 * 0.8 + 5 * 0.4) / 2
    assert len(merge.weighted_box_fusion(rows, scores, 1, 0.5)[0]) == 2


def test_nms_keeps_the_best_of_each_object_as_it_is():
    rows = array([0, 0, 10, 10], [0, 2, 10, 12], [50, 50, 60, 60])
    boxes, scores = merge.hard_nms(rows, np.float32([0.4, 0.8, 0.1]), 0.5)
    np.testing.assert_array_equal(boxes, rows[[1, 2]])
    np.testing.assert_array_equal(scores, np.float32([0.8, 0.1]))


@pytest.mark.parametrize('rule', merge.MERGES)
def test_classes_do_not_mix_and_the_best_comes_first(rule):
    views = [view([[0, 0, 10, 10]], [0.4], [3]), view([[0, 0, 10, 10]], [0.8], [1]), view([], [], [])]
    found = merge.merge(views, Augmentation(merge=rule))
    np.testing.assert_array_equal(found.labels, [1, 3])
    assert found.scores[0] > found.scores[1]


@pytest.mark.parametrize('rule', merge.MERGES)
def test_nothing_found_is_nothing(rule):
    assert [len(column) for column in merge.merge([view([], [], [])] * 2, Augmentation(merge=rule))] == [0, 0, 0]


corner = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.integers(1, 30))
detections = st.lists(st.tuples(corner, st.integers(1, 100), st.integers(0, 2)), max_size=12)


def as_view(rows):
    boxes = [[x, y, x + w, y + h] for (x, y, w, h), _, _ in rows]
    return view(boxes, [score / 100 for _, score, _ in rows], [label for _, _, label in rows])


@pytest.mark.parametrize('rule', merge.MERGES)
@given(views=st.lists(detections.map(as_view), min_size=2, max_size=4))
def test_merged_boxes_are_few_sound_and_sorted(views, rule):
    found = merge.merge(views, Augmentation(merge=rule))
    given_boxes = np.concatenate([v.boxes_xyxy for v in views])
    given_labels = np.concatenate([v.labels for v in views])
    assert len(found.scores) <= len(given_boxes)
    assert set(found.labels) == set(given_labels)
    assert np.all(np.diff(found.scores) <= 0) and np.all((found.scores > 0) & (found.scores <= 1))
    for label in set(given_labels):  # an average lies between what it is made of
        ours, theirs = found.boxes_xyxy[found.labels == label], given_boxes[given_labels == label]
        assert np.all((ours >= theirs.min(axis=0) - 1e-3) & (ours <= theirs.max(axis=0) + 1e-3))


@given(rows=detections)
def test_equal_views_change_neither_boxes_nor_scores_that_do_not_overlap(rows):
    apart = [((100 * i, y, min(w, 30), h), score, label) for i, ((_, y, w, h), score, label) in enumerate(rows)]
    one = as_view(apart)
    found = merge.merge([one] * 3, Augmentation())
    np.testing.assert_allclose(np.sort(found.scores), np.sort(one.scores), rtol=1e-5)
    order = [np.lexsort(boxes.T) for boxes in (found.boxes_xyxy, one.boxes_xyxy)]
    np.testing.assert_allclose(found.boxes_xyxy[order[0]], one.boxes_xyxy[order[1]], rtol=1e-5, atol=1e-4)


def test_views_are_checked():
    assert Augmentation(flip=True).flips == (False, True)
    with pytest.raises(UserError, match=r'each in 0\.1 \.\. 10'):
        Augmentation(scales=(0.0,))
    with pytest.raises(UserError, match="unknown merge 'soft': choose one of wbf, nms"):
        Augmentation(merge='soft')
