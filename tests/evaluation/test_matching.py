"""One image of which every detection's kind can be seen with the eye, and the rules at their limits."""

import numpy as np
import pytest
from evaluation_cases import as_detections, found, random_case, truth

from effdet_jax.errors import UserError
from effdet_jax.evaluation import matching
from effdet_jax.evaluation.matching import Kind

CAT, DOG = 0, 1


def kinds(ground_truth, detections, num_classes=2):
    return [Kind(kind).name.lower() for kind in matching.match([ground_truth], [detections], num_classes).kinds]


# A cat of 100 pixels (10x10) at the left, a dog at the right. A box cut to 10 x h overlaps by h / 10.
OBJECTS = truth([[0, 0, 10, 10], [100, 0, 110, 10]], [CAT, DOG])


@pytest.mark.parametrize(
    ('box', 'label', 'kind'),
    [
        ([0, 0, 10, 10], CAT, 'hit'),
        ([0, 0, 10, 5], CAT, 'hit'),  # exactly a half
        ([0, 0, 10, 4.9], CAT, 'localisation'),
        ([0, 0, 10, 1], CAT, 'localisation'),  # exactly a tenth
        ([0, 0, 10, 0.9], CAT, 'background'),
        ([50, 50, 60, 60], CAT, 'background'),
        ([0, 0, 10, 10], DOG, 'classification'),
        ([0, 0, 10, 5], DOG, 'classification'),
        ([0, 0, 10, 4.9], DOG, 'both'),
        ([0, 0, 10, 0.9], DOG, 'background'),
    ],
)
def test_one_detection(box, label, kind):
    assert kinds(OBJECTS, found([box], [0.9], [label])) == [kind]


def test_the_second_on_an_object_is_a_duplicate_whatever_its_overlap():
    twice = found([[0, 0, 10, 10], [0, 0, 10, 6]], [0.8, 0.9], [CAT, CAT])
    matches = matching.match([OBJECTS], [twice], 2)
    assert matches.scores == pytest.approx([0.9, 0.8])
    assert list(matches.kinds) == [Kind.HIT, Kind.DUPLICATE]
    assert list(matches.objects) == [0, -1]


def test_between_two_objects_a_detection_takes_the_one_that_is_free():
    objects = truth([[0, 0, 10, 10], [0, 2, 10, 12]], [CAT, CAT])
    detections = found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [CAT, CAT])
    matches = matching.match([objects], [detections], 1)
    assert list(matches.kinds) == [Kind.HIT, Kind.HIT]
    assert list(matches.objects) == [0, 1]


def test_objects_are_numbered_over_all_images():
    matches = matching.match([OBJECTS] * 3, [as_detections(OBJECTS)] * 3, 2)
    assert sorted(matches.objects) == list(range(6))
    np.testing.assert_array_equal(matches.object_images[matches.objects], matches.images)
    np.testing.assert_array_equal(matches.object_labels[matches.objects], matches.labels)


@pytest.mark.parametrize('mark', ['crowd', 'difficult'])
def test_what_lies_in_an_ignored_object_is_no_detection(mark):
    objects = truth([[0, 0, 100, 100]], [CAT], **{mark: [True]})
    inside, half_inside, elsewhere = [10, 10, 20, 20], [95, 0, 105, 10], [200, 0, 210, 10]
    three = found([inside, half_inside, elsewhere], [0.9, 0.8, 0.7], [CAT] * 3)
    matches = matching.match([objects], [three], 2)
    assert len(matches.object_labels) == 0
    assert matches.scores == pytest.approx([0.7])
    assert list(matches.kinds) == [Kind.BACKGROUND]
    assert kinds(objects, found([inside], [0.9], [DOG])) == ['background']  # only its own class is excused


def test_only_the_hundred_best_of_a_class_count():
    rng = np.random.default_rng(0)
    boxes, scores = np.tile([[50.0, 50, 60, 60]], (150, 1)), rng.permutation(150) / 150
    matches = matching.match([OBJECTS], [found(boxes, scores, np.repeat([CAT, DOG], [130, 20]))], 2)
    assert np.bincount(matches.labels).tolist() == [100, 20]
    assert matches.scores[matches.labels == CAT].min() == np.sort(scores[:130].astype(np.float32))[30]


def test_every_detection_is_of_one_kind_and_every_object_found_at_most_once():
    ground_truth, detections, names = random_case(5, num_images=30, crowds=False)
    matches = matching.match(ground_truth, detections, len(names))
    assert len(matches.kinds) == sum(len(image.labels) for image in detections)
    hits = matches.objects[matches.kinds == Kind.HIT]
    assert len(hits) == len(set(hits)) > 0
    assert set(matches.kinds) == set(Kind)
    assert np.all(np.diff(matches.scores) <= 0)


def test_errors_name_what_to_mend():
    with pytest.raises(UserError, match='label 2, but the labels are 0 to 1'):
        matching.match([truth([[0, 0, 1, 1]], [2])], [found([], [], [])], 2)
    with pytest.raises(UserError, match='no images'):
        matching.match([], [], 2)


def test_boxes_without_area_overlap_nothing():
    iou, inside = matching.overlaps(np.zeros((1, 4)), np.array([[0.0, 0, 0, 0], [0, 0, 5, 5]]))
    assert not iou.any() and not inside.any()
