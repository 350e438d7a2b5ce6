"""Evaluation from source to numbers, with a detector that knows the answers: every image is counted once."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from effdet_jax import data, evaluate
from effdet_jax.detection.postprocess import Detections
from effdet_jax.errors import UnreadableError, UserError
from effdet_jax.records import console
from effdet_jax.runtime import devices

NUM_IMAGES, MAX_BOXES = 10, 8  # in batches of four: the last one is half empty


@pytest.fixture(scope='module')
def source():
    return tiny.ManySizes(NUM_IMAGES)


@pytest.fixture
def config():
    c = tiny.config()
    c.image.size = (64, 96)
    return c


def key(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


@pytest.fixture
def detect(source, config):
    """A mapped detector that finds all there is, in network pixels; the padding of a batch is unknown to it."""
    answers = {}
    for index in range(len(source)):
        example = source[index]
        image, _, scale = data.resize_and_pad(example.image, config.image.size)
        answers[key(image)] = example.annotations.boxes_yxyx / np.float32(scale), example.annotations.labels

    def detect_one(image):
        boxes, scores, labels = np.zeros((MAX_BOXES, 4)), np.zeros(MAX_BOXES), np.full(MAX_BOXES, -1)
        if image.any():
            found_boxes, found_labels = answers[key(image)]
            count = len(found_labels)
            boxes[:count], scores[:count], labels[:count] = found_boxes, 0.9, found_labels
        return boxes, scores, labels

    def detect_all(variables, images, valid_size):
        assert images.shape == (4, 1, 64, 96, 3)
        assert valid_size.shape == (4, 1, 2)
        columns = zip(*(detect_one(np.asarray(image)) for image in images[:, 0]), strict=True)
        boxes, scores, labels = (np.stack(column)[:, None] for column in columns)
        return Detections(jnp.float32(boxes), jnp.float32(scores), jnp.int32(labels))

    return detect_all


def test_the_ground_truth_scores_one(source, config, detect):
    numbers, found = evaluate.make_evaluate(config, source, detect)(None)
    assert list(found) == list(range(NUM_IMAGES))
    for name in ('AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC_AP50'):
        assert numbers[name] == pytest.approx(1, abs=1e-6), name
    for index, (annotations, detections, error) in found.items():
        assert error == ''
        np.testing.assert_array_equal(annotations.labels, source.annotations(index).labels)
        np.testing.assert_allclose(detections.boxes_xyxy, annotations.boxes_yxyx[:, [1, 0, 3, 2]], atol=1e-3)


def test_what_is_found_nowhere_else_would_be_missed(source, config, detect):
    """One object fewer in one image, and recall drops by its share: no image is counted twice or left out."""

    def forgetful(variables, images, valid_size):
        found = detect(variables, images, valid_size)
        return found._replace(labels=found.labels.at[0, 0, 0].set(-1))  # the first image of each of three batches

    numbers, _ = evaluate.make_evaluate(config, source, forgetful)(None)
    labels = np.concatenate([source.annotations(i).labels for i in range(NUM_IMAGES)])
    missed = [source.annotations(i).labels[0] for i in (0, 4, 8)]
    recalls = [1 - missed.count(c) / np.sum(labels == c) for c in np.unique(labels)]
    assert numbers['AR100'] == pytest.approx(np.mean(recalls), abs=1e-6)


def test_two_hosts_count_every_image_once_between_them(source, config, detect, monkeypatch):
    parts = []
    for host in range(2):
        monkeypatch.setattr(devices, 'host', lambda host=host: (host, 2))
        monkeypatch.setattr(devices, 'gather_objects', lambda part: parts.append(part) or [part])
        evaluate.make_evaluate(config, source, detect)(None)
    assert sorted([*parts[0], *parts[1]]) == list(range(NUM_IMAGES))

    monkeypatch.setattr(devices, 'gather_objects', lambda part: parts)
    numbers, found = evaluate.make_evaluate(config, source, detect)(None)
    assert list(found) == list(range(NUM_IMAGES))
    assert numbers['AP'] == pytest.approx(1, abs=1e-6)


def test_pictures_show_the_first_images_in_their_own_size(source, config, detect):
    _, found = evaluate.make_evaluate(config, source, detect)(None)
    pictures = evaluate.draw(source, found, 2)
    assert list(pictures) == ['000000', '000001']
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[1] > 2 * 640  # two enlarged images side by side


def test_the_summary_has_a_row_for_every_class(source, config, detect):
    numbers, _ = evaluate.make_evaluate(config, source, detect)(None)
    lines = evaluate.summary(numbers, source.class_names).splitlines()
    assert sum(line.startswith(f'| {name} ') for line in lines for name in source.class_names) == 5
    assert '| 1.000 |' in lines[2]


def test_an_image_that_cannot_be_read_counts_as_one_in_which_nothing_is_found(source, config, detect, monkeypatch):
    sound, _ = evaluate.make_evaluate(config, source, detect)(None)
    read = type(source).__getitem__

    def damaged(self, index):
        if index == 1:
            raise UnreadableError('1.jpg', 'damaged')
        return read(self, index)

    boxes = [source.annotations(i) for i in range(NUM_IMAGES)]
    monkeypatch.setattr(tiny.ManySizes, 'annotations', lambda self, index: boxes[index])
    monkeypatch.setattr(tiny.ManySizes, '__getitem__', damaged)

    def finds_something_everywhere(variables, images, valid_size):
        found = detect(variables, images, valid_size)
        return found._replace(labels=found.labels.at[:, :, 0].max(0))

    config.dataset.max_unreadable_fraction = 0.1  # one of ten
    with console.terminal.capture() as printed:
        numbers, found = evaluate.make_evaluate(config, source, finds_something_everywhere)(None)
    assert '1.jpg: damaged' in printed.get() and printed.get().count('\n') >= 1
    assert (sound['images_unreadable'], numbers['images_unreadable']) == (0, 1)
    assert len(found) == NUM_IMAGES and found[1].error.startswith('1.jpg: damaged')
    assert len(found[1].detections.labels) == 0 < len(found[1].annotations.labels)
    assert numbers['AR100'] < sound['AR100']
    assert list(evaluate.draw(source, found, 2)) == ['000000', '000002']
    config.dataset.max_unreadable_fraction = 0.09
    with pytest.raises(UserError, match=r'1 of 10 images cannot be read, more than .*=0\.09 allows: 1\.jpg'):
        evaluate.make_evaluate(config, source, detect)(None)
