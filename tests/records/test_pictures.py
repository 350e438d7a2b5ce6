import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.errors import UserError
from effdet_jax.records.pictures import (
    PALETTE,
    _free_place,
    _ink_on,
    class_color,
    detections_beside_truth,
    draw_boxes,
    grid,
    side_by_side,
    write_image,
)

BCCD = Path(__file__).parents[2].parent / 'shared' / 'data' / 'bccd'
NAMES = ['circle', 'square']


def test_an_edge_has_the_color_of_its_class_and_the_inside_is_untouched():
    image = np.full((480, 640, 3), 90, np.uint8)
    picture = draw_boxes(image, boxes([100, 100, 300, 200]), np.array([1]), NAMES)
    for x, y in ((100, 150), (300, 150), (250, 100), (200, 200)):
        assert tuple(picture[y, x]) == class_color(1)
    assert (picture[110:190, 110:290] == 90).all() and (picture[300:] == 90).all()
    assert (image == 90).all()


def test_small_images_are_enlarged_with_their_boxes():
    picture = draw_boxes(np.zeros((80, 160, 3), np.uint8), boxes([40, 20, 120, 60]), np.array([0]), NAMES)
    assert picture.shape == (320, 640, 3)
    assert tuple(picture[160, 160]) == tuple(picture[160, 480]) == class_color(0)


def test_no_boxes_leave_the_image_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (64, 640, 3), dtype=np.uint8)
    assert (draw_boxes(image, np.zeros((0, 4), np.float32), np.zeros(0, int), NAMES) == image).all()


def test_boxes_outside_of_the_image_and_long_names_are_drawn_within():
    image = np.zeros((100, 700, 3), np.uint8)
    picture = draw_boxes(image, boxes([-50, -20, 900, 300], [690, 90, 699, 99]), np.array([0, 1]), ['x' * 200, 'y'])
    assert picture.shape == image.shape


def test_the_best_detection_is_on_top():
    same = boxes([100, 100, 300, 200], [100, 100, 300, 200])
    image = np.zeros((480, 640, 3), np.uint8)
    for scores in ([0.9, 0.5], [0.5, 0.9]):
        picture = draw_boxes(image, same, np.array([0, 1]), NAMES, np.array(scores, np.float32))
        assert tuple(picture[150, 100]) == class_color(int(np.argmax(scores)))


@given(st.tuples(*[st.integers(0, 199)] * 4), st.integers(1, 60), st.integers(1, 30))
def test_a_tag_lies_within_the_image(corners, width, height):
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    place = _free_place(np.array([x1, y1, x2, y2]), (width, height), 2, (200, 200, 3), [])
    assert (place[:2] >= 0).all() and (place[2:] <= 200).all() and (place[2:] - place[:2] == (width, height)).all()


def test_a_second_tag_makes_room_for_the_first():
    box, size = np.array([100, 100, 150, 150]), (40, 15)
    first = _free_place(box, size, 2, (200, 200, 3), [])
    second = _free_place(box, size, 2, (200, 200, 3), [first])
    assert first[3] <= 100 and second[1] >= 150  # above, then below


def test_21_classes_have_colors_of_their_own_and_text_on_them_can_be_read():
    colors = [class_color(label) for label in range(3 * len(PALETTE))]
    assert len(set(colors)) == 21 and class_color(21) == class_color(0)
    for color in colors:
        assert contrast(color, _ink_on(color)) >= 4.5


def test_grid_puts_pictures_into_rows():
    a, b, c = (np.full((10, 20, 3), value, np.uint8) for value in (1, 2, 3))
    picture = grid([a, b, c], columns=2)
    assert picture.shape == (10 + 12 + 10, 20 + 12 + 20, 3)
    assert (picture[:10, :20] == 1).all() and (picture[:10, 32:] == 2).all() and (picture[22:, :20] == 3).all()
    assert (picture[22:, 20:] == 255).all() and (picture[10:22] == 255).all()
    assert grid([a], columns=4).shape == a.shape


def test_side_by_side_keeps_both_pictures_under_their_captions():
    left, right = np.full((300, 400, 3), 7, np.uint8), np.full((300, 400, 3), 9, np.uint8)
    picture = side_by_side(left, right, ('before', 'after'))
    assert (picture[-300:, :400] == 7).all() and (picture[-300:, -400:] == 9).all()
    assert picture[:-300, :400].min() < 60 and picture[:-300, -400:].min() < 60  # ink


def test_detections_below_the_score_are_not_drawn():
    image, truth, label = np.zeros((480, 640, 3), np.uint8), boxes([100, 100, 300, 200]), np.array([0])
    weak, strong = (
        detections_beside_truth(image, truth, label, truth, label, np.array([s], np.float32), NAMES) for s in (0.2, 0.3)
    )
    assert (weak[:, :640] == strong[:, :640]).all()
    assert not weak[-480:, -640:].any() and strong[-480:, -640:].any()


@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp'])
def test_written_pictures_are_read_back_as_rgb(tmp_path, ending):
    path = tmp_path / 'new' / f'picture.{ending}'
    write_image(path, np.full((32, 32, 3), (200, 100, 20), np.uint8))
    read = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.abs(read.astype(int) - (200, 100, 20)).max() <= 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_unknown_ending_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match='choose a name that ends in'):
        write_image(tmp_path / 'picture.tiff2', np.zeros((4, 4, 3), np.uint8))


@pytest.mark.skipif(not BCCD.exists(), reason='the BCCD photographs are not beside the repository')
def test_a_photograph_with_many_overlapping_cells_keeps_every_tag_readable():
    names = ['RBC', 'WBC', 'Platelets']
    image = cv2.cvtColor(cv2.imread(str(BCCD / 'JPEGImages' / 'BloodImage_00007.jpg')), cv2.COLOR_BGR2RGB)
    objects = list(ET.parse(BCCD / 'Annotations' / 'BloodImage_00007.xml').iter('object'))
    corners = [[float(o.find('bndbox').find(k).text) for k in ('xmin', 'ymin', 'xmax', 'ymax')] for o in objects]
    labels = np.array([names.index(o.find('name').text) for o in objects])
    picture = draw_boxes(image, boxes(*corners), labels, names)
    places: list[np.ndarray] = []
    for box in boxes(*corners).astype(int):
        places.append(_free_place(box, (40, 18), 2, image.shape, places))
    pairs = [(a, b) for i, a in enumerate(places) for b in places[:i]]
    assert not any((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all() for a, b in pairs)
    assert picture.shape == image.shape


def boxes(*corners):
    return np.array(corners, np.float32)


def contrast(a, b):
    def luminance(color):
        c = np.array(color) / 255
        return np.dot(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), (0.2126, 0.7152, 0.0722))

    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)
