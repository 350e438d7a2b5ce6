import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from effdet_jax import evaluate
from effdet_jax.data import shapes
from effdet_jax.detection.postprocess import Detections as NetworkDetections
from effdet_jax.errors import UserError
from effdet_jax.inference import Detections, Detector
from effdet_jax.inference.detector import image_anchors, make_detect, to_original
from effdet_jax.model import build_model
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.training import parallel

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')


@pytest.fixture(scope='module')
def detector(finished_run):
    return Detector.load(finished_run[0])


def test_it_finds_what_evaluation_finds(detector, finished_run):
    config, source = tiny.config(), tiny.ManySizes(4)
    detect = parallel.map_devices(make_detect(config, build_model(config.model, len(source.class_names))))
    variables = parallel.replicate(load_variables(finished_run[0])[1])
    _, found = evaluate.make_evaluate(config, source, detect)(variables)
    for index, (_, expected) in found.items():
        detections = detector(source[index].image)
        assert len(detections.scores) == config.eval.max_detections
        np.testing.assert_allclose(detections.scores, expected.scores, rtol=1e-4)
        np.testing.assert_array_equal(detections.labels, expected.labels)
        np.testing.assert_allclose(detections.boxes_xyxy, expected.boxes_xyxy, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('size', [(300, 200), (64, 64), (1, 1), (3, 900), (700, 2)])
def test_boxes_lie_in_the_original_image_best_first(detector, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    detections = detector(image)
    assert len(detections.scores)
    assert np.all(np.diff(detections.scores) <= 0)
    x1, y1, x2, y2 = detections.boxes_xyxy.T
    assert np.all((x1 >= 0) & (x1 <= x2) & (x2 <= size[1]))
    assert np.all((y1 >= 0) & (y1 <= y2) & (y2 <= size[0]))
    assert detections.names == tuple(detector.class_names[label] for label in detections.labels)


def test_the_same_picture_at_twice_the_size_has_boxes_twice_as_large(detector):
    image = shapes.draw(0, size=64).image  # as large as the network's input, so that both become the same pixels
    small, large = detector(image), detector(np.kron(image, np.ones((2, 2, 1), np.uint8)))
    np.testing.assert_array_equal(large.scores, small.scores)
    np.testing.assert_array_equal(large.boxes_xyxy, 2 * small.boxes_xyxy)


def test_network_pixels_become_original_pixels():
    boxes_yxyx = np.array([[[1, 2, 3, 4], [0, 0, 0, 0]], [[10, 20, 30, 40], [5, 6, 7, 8]]], np.float32)
    found = NetworkDetections(jnp.asarray(boxes_yxyx), jnp.ones((2, 2)), jnp.array([[0, -1], [1, 2]]))
    boxes_xyxy, _, labels = to_original(found, np.array([2.0, 0.5], np.float32))
    np.testing.assert_array_equal(boxes_xyxy[0, 0], [4, 2, 8, 6])
    np.testing.assert_array_equal(boxes_xyxy[1], [[10, 5, 20, 15], [3, 2.5, 4, 3.5]])
    np.testing.assert_array_equal(labels, [[0, -1], [1, 2]])


def test_there_is_an_anchor_for_every_prediction():
    c = tiny.config()
    assert image_anchors(c).shape == ((8 * 8 + 4 * 4 + 2 * 2 + 1) * 9, 4)


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
    detections = Detections(
        np.zeros((3, 4), np.float32), np.array([0.9, 0.5, 0.1]), np.array([2, 1, 0]), ('c', 'b', 'a')
    )
    kept = detections.above(0.5)
    assert kept.names == ('c', 'b')
    np.testing.assert_array_equal(kept.labels, [2, 1])
    assert len(kept.boxes_xyxy) == len(kept.scores) == 2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'config\.json does not exist: give the --workdir of a training run'):
        Detector.load(tmp_path)
