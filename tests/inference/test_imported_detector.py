"""A whole D0 from a PyTorch file: imported, run on photographs, and compared with NumPy (reference_detector.py)."""

from pathlib import Path

import containers
import jax
import numpy as np
import pytest
import reference_detector as reference
import writers

from effdet_jax.commands.import_weights import importer
from effdet_jax.configs import default
from effdet_jax.data import read_image
from effdet_jax.detection.postprocess import postprocess
from effdet_jax.inference import Detector
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.records.checkpoint import load_variables

PHOTOGRAPHS = Path(__file__).parents[3] / 'shared/data/bccd/JPEGImages'
SIZE = 512

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures('depthwise_by_xla'),
    pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f'no photographs at {PHOTOGRAPHS}'),
]


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    """(config, work directory) of a random D0 in effdet's layout."""
    layers = writers.layers(writers.Member('b0', 64, 3, 3, weighted=True, classes=90))
    written = writers.draw(layers, seed=5)
    # Scores that differ from one another, boxes near their anchors: neither ties nor rounding decide.
    written['params', 'class_net', 'predict', 'pw', 'kernel'] *= 3
    written['params', 'class_net', 'predict', 'pw', 'bias'] -= 2
    written['params', 'box_net', 'predict', 'pw', 'kernel'] *= 0.5
    folder = tmp_path_factory.mktemp('d0')
    source = containers.pth(folder, {'state_dict': writers.to_torch(layers, written)})
    importer.import_weights(config := default.get_config('d0'), source, folder / 'imported')
    return config, folder / 'imported'


@pytest.fixture(scope='module')
def photographs(imported):
    """For five of them: the image, what the network makes of it, the size in the network, the way back."""
    config, workdir = imported
    model = build_model(config.model, 90)
    apply = jax.jit(model.apply)
    _, variables = load_variables(workdir, 'eval/AP')
    cases = []
    for path in sorted(PHOTOGRAPHS.glob('*.jpg'))[:5]:
        image = read_image(path)
        pixels, picture_hw, to_original = reference.network_input(image, SIZE)
        outputs = apply(variables, pixels)
        cases.append((image, *(np.asarray(x[0]) for x in outputs), picture_hw, to_original))
    return cases


def assert_same(boxes, scores, labels, expected):
    """The same detections; two whose scores differ by rounding alone may stand in either order."""
    expected_boxes, expected_scores, expected_labels = expected
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    same_MM = (
        (labels[:, None] == expected_labels)
        & (np.abs(scores[:, None] - expected_scores) < 1e-5)
        & (np.abs(boxes[:, None] - expected_boxes).max(2) < 0.01)
    )
    assert (same_MM.sum(0) == 1).all() and (same_MM.sum(1) == 1).all()


def test_the_detector_finds_what_the_reference_finds(imported, photographs):
    detector, anchors = Detector.load(imported[1]), reference.anchors(SIZE)
    for image, logits, regressions, picture_hw, to_original in photographs:
        expected = reference.detect(logits, regressions, anchors, picture_hw, to_original, reference.hard)
        found = detector(image)
        assert len(found.scores) == 100
        assert len(set(found.labels)) > 3
        assert_same(found.boxes_xyxy, found.scores, found.labels, expected)


def test_gaussian_suppression(imported, photographs):
    config, _ = imported
    anchors = reference.anchors(SIZE)
    finish = jax.jit(lambda *arrays: postprocess(*arrays, kind='gaussian'))
    for _, logits, regressions, picture_hw, to_original in photographs:
        expected = reference.detect(logits, regressions, anchors, picture_hw, to_original, reference.gaussian)
        found = finish(logits, regressions, image_anchors(config), np.array(picture_hw))
        boxes = np.asarray(found.boxes)[:, [1, 0, 3, 2]] * to_original
        assert_same(boxes, found.scores, found.labels, expected)
