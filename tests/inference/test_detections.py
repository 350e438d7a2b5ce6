import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from effdet_jax.errors import UserError
from effdet_jax.inference import Detections
from effdet_jax.records.pictures import class_color

FOUND = Detections(
    np.array([[10, 20, 110, 60], [0, 0, 20.4, 20.6], [5, 5, 9, 9]], np.float32),
    np.array([0.9, 0.5, 0.1], np.float32),
    np.array([2, 1, 2], np.int32),
    ('car', 'bus', 'car'),
)
NOTHING = FOUND.above(1.0)


def test_coco_results_are_corner_and_size_with_the_categories_of_the_data():
    detections = Detections(
        np.array([[1, 2, 4, 8], [0, 0, 1.006, 1]], np.float32),
        np.array([0.9, 0.123456789]),
        np.array([1, 0]),
        ('b', 'a'),
    )
    assert detections.to_coco(42, category_ids=(7, 90)) == [
        {'image_id': 42, 'category_id': 90, 'bbox': [1.0, 2.0, 3.0, 6.0], 'score': 0.9},
        {'image_id': 42, 'category_id': 7, 'bbox': [0.0, 0.0, 1.01, 1.0], 'score': 0.12346},
    ]


def test_above_keeps_a_score_that_is_reached():
    kept = FOUND.above(0.5)
    assert kept.names == ('car', 'bus')
    np.testing.assert_array_equal(kept.labels, [2, 1])
    assert len(kept) == len(kept.boxes_xyxy) == len(kept.scores) == 2
    assert len(NOTHING) == 0


def test_classes_are_picked_by_name():
    assert FOUND.of('car').scores.tolist() == FOUND.scores[[0, 2]].tolist()
    assert FOUND.of(['bus', 'tram']).names == ('bus',)
    assert len(FOUND.of('bu')) == len(NOTHING.of('car')) == 0


def test_boxes_are_drawn_in_the_color_of_their_class():
    image = np.full((100, 200, 3), 90, np.uint8)
    drawn = FOUND.of('car').above(0.5).draw(image, enlarge=False)
    assert drawn.shape == image.shape
    assert tuple(drawn[50, 10]) == tuple(drawn[50, 110]) == class_color(2)
    assert FOUND.draw(image).shape == (320, 640, 3)
    np.testing.assert_array_equal(NOTHING.draw(image, enlarge=False), image)


def test_crops_hold_every_pixel_that_a_box_touches():
    image = np.random.default_rng(0).integers(0, 256, (50, 100, 3)).astype(np.uint8)
    wide, corner, _ = FOUND.crops(image)
    np.testing.assert_array_equal(wide, image[20:50, 10:100])
    np.testing.assert_array_equal(corner, image[:21, :21])


def test_a_crop_has_at_least_a_pixel():
    flat = Detections(
        np.array([[100, 50, 100, 50], [3, 3, 3, 3]], np.float32), np.ones(2), np.zeros(2, int), ('a',) * 2
    )
    assert [crop.shape for crop in flat.crops(np.zeros((50, 100, 3), np.uint8))] == [(1, 1, 3)] * 2


def test_supervision_gets_what_it_asks_for(monkeypatch):
    module = ModuleType('supervision')
    module.Detections = SimpleNamespace
    monkeypatch.setitem(sys.modules, 'supervision', module)
    theirs = FOUND.to_supervision()
    np.testing.assert_array_equal(theirs.xyxy, FOUND.boxes_xyxy)
    np.testing.assert_array_equal(theirs.confidence, FOUND.scores)
    np.testing.assert_array_equal(theirs.class_id, FOUND.labels)
    assert theirs.data['class_name'].tolist() == ['car', 'bus', 'car']


@pytest.mark.skipif(importlib.util.find_spec('supervision') is None, reason='supervision is not installed')
@pytest.mark.parametrize('found', [FOUND, NOTHING], ids=['three', 'none'])
def test_supervision_itself_takes_them(found):
    theirs = found.to_supervision()
    assert len(theirs) == len(found)
    assert list(theirs.data['class_name']) == list(found.names)


def test_without_supervision_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'supervision', None)
    with pytest.raises(UserError, match='pip install supervision'):
        FOUND.to_supervision()
