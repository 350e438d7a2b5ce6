import hashlib

import numpy as np
import pytest

from effdet_jax.data import shapes


def test_picture_is_a_function_of_its_index():
    first, again, other = shapes.draw(7), shapes.draw(7), shapes.draw(8)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.annotations.boxes_yxyx, again.annotations.boxes_yxyx)
    assert (first.image != other.image).any()


def test_labels_and_boxes_never_change():
    """Scores of different versions of the project compare only while the data stay the same."""
    digest = hashlib.sha256()
    for index in range(50):
        annotations = shapes.draw(index).annotations
        digest.update(annotations.labels.astype('<i4').tobytes() + annotations.boxes_yxyx.astype('<f4').tobytes())
    assert digest.hexdigest()[:16] == '3440008e3c2f32cc'


@pytest.mark.parametrize('size', [64, 128, 200])
def test_annotations_are_sound(size):
    for index in range(30):
        example = shapes.draw(index, size)
        boxes, labels = example.annotations.boxes_yxyx, example.annotations.labels
        assert example.image.shape == (size, size, 3) and example.image.dtype == np.uint8
        assert 1 <= len(boxes) <= 6 and labels.min() >= 0 and labels.max() < len(shapes.CLASS_NAMES)
        assert (boxes >= 0).all() and (boxes <= size).all() and (boxes[:, 2:] - boxes[:, :2] >= 0.02 * size).all()
        assert (boxes * 2 == np.round(boxes * 2)).all()  # half pixels


def test_boxes_are_tight_and_objects_visible():
    rng = np.random.default_rng(0)
    for _ in range(40):
        things = shapes._arrange(rng, 256)
        covered = np.zeros((256, 256), bool)
        for thing in reversed(things):  # later ones lie above
            rows, columns = np.nonzero(thing.mask)
            assert thing.box == (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            visible = (thing.mask > 0) & ~covered
            np.testing.assert_array_equal(visible, thing.visible > 0)
            assert visible.sum() >= 0.5 * (thing.mask > 0).sum()
            covered |= thing.mask > 0


def test_nothing_gives_the_class_away():
    """Neither mean colour nor box size nor place separates the classes; every class is common."""
    labels, features = [], []
    for index in range(400):
        example = shapes.draw(index)
        for (y1, x1, y2, x2), label in zip(
            example.annotations.boxes_yxyx.astype(int), example.annotations.labels, strict=True
        ):
            patch = example.image[y1 : y2 + 1, x1 : x2 + 1]
            labels.append(label)
            features.append([*patch.mean((0, 1)), y2 - y1, x2 - x1, y1, x1])
    labels, features = np.array(labels), np.array(features)
    assert np.bincount(labels).min() > 0.15 * len(labels)
    means = np.array([features[labels == label].mean(0) for label in range(5)])
    assert (np.ptp(means, axis=0) < 0.6 * features.std(0)).all()


def test_sizes_span_the_range():
    sides = np.concatenate(
        [np.max(b[:, 2:] - b[:, :2], axis=1) for b in (shapes.draw(i).annotations.boxes_yxyx for i in range(300))]
    )
    assert sides.min() < 0.12 * 128 and sides.max() > 0.5 * 128
    assert 0.01 < (sides < 0.12 * 128).mean() < 0.15
