import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from effdet_jax import data, evaluate
from effdet_jax.data import shapes
from effdet_jax.detection.postprocess import Detections as NetworkDetections
from effdet_jax.errors import UserError
from effdet_jax.inference import Augmentation, Detector
from effdet_jax.inference.detector import Thresholds, image_anchors, make_detect, to_original
from effdet_jax.model import build_model
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.runtime import devices

BLANK = np.zeros((8, 8, 3), np.uint8)

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')


@pytest.fixture(scope='module')
def detector(finished_run):
    return Detector.load(finished_run[0])


class FittingSizes(tiny.ManySizes):
    """Images that need no resizing, for that is done by the host in evaluation and by the device in the detector."""

    def __getitem__(self, index):
        example = super().__getitem__(0)
        return data.Example(np.pad(example.image, ((0, 24), (0, 4 * index), (0, 0))), example.annotations)


def test_it_finds_what_evaluation_finds(detector, finished_run):
    config, source = tiny.config(), FittingSizes(4)
    detect = devices.map_devices(make_detect(config, build_model(config.model, len(source.class_names))))
    variables = devices.replicate(load_variables(finished_run[0], 'eval/AP')[1])
    _, found = evaluate.make_evaluate(config, source, detect)(variables)
    for index, (_, expected, _) in found.items():
        detections = detector(source[index].image)
        assert len(detections) == config.eval.max_detections
        np.testing.assert_allclose(detections.scores, expected.scores, rtol=1e-4)
        np.testing.assert_array_equal(detections.labels, expected.labels)
        np.testing.assert_allclose(detections.boxes_xyxy, expected.boxes_xyxy, rtol=1e-4, atol=1e-2)


def test_a_list_of_any_sizes_is_each_image_alone(detector):
    images = [tiny.ManySizes(5)[index].image for index in range(5)]
    for together, image in zip(detector(images), images, strict=True):
        alone = detector(image)
        np.testing.assert_allclose(together.scores, alone.scores, rtol=1e-4)
        np.testing.assert_allclose(together.boxes_xyxy, alone.boxes_xyxy, rtol=1e-3, atol=1e-2)
        assert together.names == alone.names
    assert detector([]) == []


def test_sizes_and_thresholds_compile_nothing_again():
    traced = []

    def detect(pixels, sizes, thresholds):
        traced.append(pixels.shape)
        shape = sizes.shape[0], 1
        return jnp.zeros((*shape, 4)), jnp.full(shape, thresholds.score), jnp.zeros(shape, int)

    detector = Detector([jax.jit(detect)], ('a',), (1,), Thresholds(0.5, 0.5, 0.5), batch_size=4)
    for side in (1, 10, 100, 1000):
        detector(np.zeros((side, 1000, 3), np.uint8))
    assert [float(detector(BLANK, score=score).scores[0]) for score in (0.0, 0.25, 1)] == [0.0, 0.25, 1.0]
    detector(BLANK, iou=0.1, sigma=2)
    assert traced == [(2**20, 3)]
    assert len(detector([BLANK] * 9)) == 9
    assert traced == [(2**20, 3), (4 * 2**20, 3)]


def test_a_higher_score_threshold_leaves_the_others_as_they_are(detector):
    everything = detector(shapes.draw(0).image)
    threshold = float(everything.scores[4])
    above = detector(shapes.draw(0).image, score=threshold)
    np.testing.assert_array_equal(above.boxes_xyxy, everything.boxes_xyxy[everything.scores > threshold])


def test_thresholds_reach_suppression(detector):
    image = shapes.draw(0).image
    assert not np.array_equal(detector(image, sigma=0.01).scores, detector(image, sigma=10.0).scores)


@pytest.mark.parametrize('threshold', [{'score': 1.5}, {'iou': -1.0}, {'sigma': 0.0}])
def test_thresholds_out_of_range_are_refused(detector, threshold):
    with pytest.raises(UserError, match='out of range'):
        detector(BLANK, **threshold)


def test_a_stream_takes_no_more_images_than_it_must(detector):
    taken = []

    def images():
        for index in range(100):
            taken.append(index)
            yield BLANK

    stream = detector.stream(images())
    next(stream)
    assert len(taken) <= 2 * detector.batch_size + 1


def blank_after(detect):
    """`detect`, with what lies in the buffer behind the image taken away."""
    return jax.jit(
        lambda pixels, sizes, t: detect(jnp.where(jnp.arange(len(pixels))[:, None] < sizes.prod(), pixels, 0), sizes, t)
    )


def test_views_of_one_image_come_together():
    """A detector that finds one object wherever the brightest pixel lies, at two scales and mirrored."""

    def detect(pixels, sizes, thresholds):
        assert sizes.shape == (1, 2)
        y, x = jnp.divmod(pixels.max(axis=1).argmax(), sizes[0, 1])
        box = jnp.stack([x, y, x + 1, y + 1]).astype(jnp.float32)
        return box[None, None], jnp.full((1, 1), 0.5), jnp.zeros((1, 1), int)

    image = np.zeros((30, 50, 3), np.uint8)
    image[7, 11] = 255
    for rule in ('wbf', 'nms'):
        views = Augmentation(flip=True, scales=(1.0, 1.5), merge=rule)
        found = Detector([blank_after(detect)] * 2, ('a',), (1,), Thresholds(0.1, 0.5, 0.5), augmentation=views)(image)
        np.testing.assert_allclose(found.boxes_xyxy, [[11, 7, 12, 8]], rtol=1e-6)
        np.testing.assert_allclose(found.scores, [0.5])


def test_augmentation_finds_the_boxes_of_the_image_itself(finished_run):
    image = shapes.draw(3, size=90).image
    detector = Detector.load(finished_run[0], augmentation=Augmentation(flip=True))
    straight, mirrored = detector(image), detector(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(mirrored.scores[:5], straight.scores[:5], rtol=0.02)
    assert len(straight) == 10


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


def test_what_is_no_array_is_found_as_its_array_is(detector, tmp_path):
    pixels = shapes.draw(0).image
    picture = Image.fromarray(pixels)
    path = tmp_path / 'a picture.png'
    picture.save(path)
    images = [pixels, picture, jnp.asarray(pixels), path, str(path), Image.open(path), picture.convert('RGBA')]
    expected = detector(pixels)
    for image, together in zip(images, detector(images), strict=True):
        alone = detector(image)
        np.testing.assert_array_equal(alone.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(alone.scores, expected.scores)
        np.testing.assert_allclose(together.scores, expected.scores, rtol=1e-4)
        np.testing.assert_array_equal(alone.draw(image), expected.draw(pixels))
        assert [crop.shape for crop in alone.crops(image)] == [crop.shape for crop in expected.crops(pixels)]
    assert len(detector((picture, path))) == len(list(detector.stream([picture, path]))) == 2
    assert len(detector(image for image in images)) == len(images)


@pytest.mark.parametrize(
    ('image', 'what'),
    [
        ('https://host/a.jpg', 'https://host/a.jpg is an address'),
        ('nowhere.jpg', r'nowhere\.jpg: cannot be read'),
        (b'\x89PNG', 'bytes is not an image: give a uint8 array'),
        ({'image': BLANK}, 'dict is not an image'),
        (None, 'NoneType is not an image'),
        ([None], 'NoneType is not an image'),
        (
            BLANK[None],
            r'uint8 \[1, 8, 8, 3\] is not an image: give .*, or a list of them',
        ),
        (jnp.zeros((8, 8, 3)), r'float32 \[8, 8, 3\] is not an image'),
    ],
    ids=['address', 'missing', 'bytes', 'dict', 'none', 'none in a list', 'batch', 'float'],
)
def test_anything_else_is_refused_in_a_line(detector, image, what):
    with pytest.raises(UserError, match=what):
        detector(image)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'config\.json does not exist: give the --workdir of a training run'):
        Detector.load(tmp_path)
    with pytest.raises(UserError, match='gs://bucket/run is an address'):
        Detector.load('gs://bucket/run')
