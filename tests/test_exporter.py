import json
import os
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import tiny

from effdet_jax import exporter
from effdet_jax.errors import UserError
from effdet_jax.inference import Augmentation, Detections, Detector

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')

# What README.md shows, in a process that can import jax and numpy, and nothing else of ours.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('effdet_jax', 'configs', 'flax', 'ml_collections', 'cv2', 'orbax', 'tensorflow'):
            raise ImportError(f'{name} is refused')
sys.meta_path.insert(0, Refuse())

import json, zipfile
import jax.export
import numpy as np
with zipfile.ZipFile(sys.argv[1]) as archive:
    metadata = json.loads(archive.read('metadata.json'))
    detect = jax.jit(jax.export.deserialize(bytearray(archive.read('model.stablehlo'))).call)
image = np.load(sys.argv[2])
thresholds = map(np.float32, metadata['thresholds'].values())
boxes, scores, labels = detect(image.reshape(-1, 3), np.array([image.shape[:2]], np.int32), *thresholds)
np.savez(sys.argv[3], boxes=boxes[0], scores=scores[0], labels=labels[0])
print(*(metadata['class_names'][label] for label in labels[0]))
"""


@pytest.fixture(scope='module')
def exported(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp('exports') / 'tiny.zip'
    exporter.export(finished_run[0], out, 'stablehlo', 'boxes')
    return out


def test_an_export_is_a_detector(exported, finished_run):
    images = [tiny.ManySizes(4)[index].image for index in range(4)]
    original, ours = Detector.load(finished_run[0]), Detector.load(exported, batch_size=2)
    assert (ours.class_names, ours.category_ids) == (original.class_names, original.category_ids)
    assert len(ours(images)[3]) == 10
    exporter.compare_detections(original(images), ours(images), 0.001, 10)
    threshold = float(ours(images[0]).scores[4])
    assert len(ours(images[0], score=threshold)) == 4


def test_it_runs_where_jax_and_numpy_are_alone(exported, finished_run, tmp_path):
    image = tiny.ManySizes(3)[2].image
    np.save(tmp_path / 'image.npy', image)
    done = subprocess.run(
        [sys.executable, '-c', ALONE, exported, tmp_path / 'image.npy', tmp_path / 'found.npz'],
        cwd=tmp_path, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / 'found.npz'), Detector.load(finished_run[0])(image)
    np.testing.assert_allclose(found['boxes'], expected.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(found['scores'], expected.scores, atol=1e-5)
    assert tuple(done.stdout.split()) == expected.names


def test_the_file_says_what_it_is(exported):
    with zipfile.ZipFile(exported) as archive:
        metadata = json.loads(archive.read('metadata.json'))
        program = jax.export.deserialize(bytearray(archive.read('model.stablehlo')))
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    assert metadata['preprocessing']['size'] == [64, 64]
    assert metadata['step'] in (tiny.STEPS_PER_EPOCH, tiny.STEPS)  # the better of two evaluations
    assert [i['name'] for i in metadata['inputs']] == ['pixels', 'sizes', 'score', 'iou', 'sigma']


@pytest.mark.parametrize('outputs', ['boxes', 'raw'])
def test_what_differs_is_refused_and_leaves_nothing(outputs, finished_run, tmp_path, monkeypatch):
    make = getattr(exporter, f'{outputs}_program')
    monkeypatch.setattr(exporter, f'{outputs}_program', lambda *arguments: _skewed(make(*arguments)))
    with pytest.raises(UserError, match='the export differs from the original'):
        exporter.export(finished_run[0], tmp_path / 'out.zip', 'stablehlo', outputs)
    assert not list(tmp_path.iterdir())


def _skewed(program):
    """A little off in the file, whose shapes are symbols when it is traced; right elsewhere."""

    def function(*arguments):
        first, *others = program.function(*arguments)
        return first if isinstance(arguments[0].shape[0], int) else first * 1.01, *others

    return program._replace(function=function)


def test_what_cannot_be_is_refused_at_once(exported, finished_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='exists already'):
        exporter.export(finished_run[0], exported, 'stablehlo', 'boxes')
    with pytest.raises(UserError, match='cannot convert the NMS'):
        exporter.export(finished_run[0], tmp_path / 'm.onnx', 'onnx', 'boxes')
    with pytest.raises(UserError, match='looks once'):
        Detector.load(exported, augmentation=Augmentation(flip=True))
    (tmp_path / 'no.zip').write_text('no zip')
    with pytest.raises(UserError, match='is no StableHLO export'):
        Detector.load(tmp_path / 'no.zip')


@pytest.mark.parametrize(
    ('format_name', 'package'), [('savedmodel', 'tensorflow'), ('onnx', 'jax2onnx'), ('onnx', 'onnxruntime')]
)
def test_a_missing_converter_is_named(format_name, package, finished_run, tmp_path, monkeypatch):
    if package == 'onnxruntime':
        pytest.importorskip('jax2onnx', reason='requirements-export.txt is not installed')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'{package} cannot be imported .* pip install -r requirements-'):
        exporter.export(finished_run[0], tmp_path / 'out', format_name, 'raw')
    assert not list(tmp_path.iterdir())


def test_a_saved_model_agrees(finished_run, tmp_path):
    pytest.importorskip('tensorflow', reason='requirements-tensorflow.txt is not installed')
    exporter.export(finished_run[0], tmp_path / 'model', 'savedmodel', 'boxes', batch=4)
    metadata = json.loads((tmp_path / 'model' / 'assets.extra' / 'metadata.json').read_text())
    assert metadata['inputs'][1]['shape'] == [4, 2]


def test_onnx_agrees_and_its_depthwise_convolutions_are_grouped(finished_run, tmp_path):
    pytest.importorskip('jax2onnx', reason='requirements-export.txt is not installed')
    onnx = pytest.importorskip('onnx')
    exporter.export(finished_run[0], tmp_path / 'm.onnx', 'onnx', 'raw')
    model = onnx.load(tmp_path / 'm.onnx')
    groups = [a.i for node in model.graph.node for a in node.attribute if node.op_type == 'Conv' and a.name == 'group']
    assert max(groups) > 1
    assert json.loads(model.metadata_props[0].value)['outputs'] == list(exporter.RAW)


def found(*rows):
    boxes, scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), labels, tuple('abc'[i] for i in labels))


A, B = ([0, 0, 10, 10], 0.5, 0), ([50, 0, 60, 10], 0.5, 0)


def test_ties_may_change_places():
    exporter.compare_detections([found(A, B)], [found(B, A)], 0.001, 100)


@pytest.mark.parametrize(
    'other',
    [
        ([0, 0, 10, 10.2], 0.5, 0),  # the box
        ([0, 0, 10, 10], 0.502, 0),  # the score
        ([0, 0, 10, 10], 0.5, 1),  # the class
        ([0, 0, np.nan, 10], 0.5, 0),
    ],
)
def test_a_difference_is_found_from_both_sides(other):
    for pair in ((found(A, B), found(other, B)), (found(other, B), found(A, B))):
        with pytest.raises(UserError, match='differs'):
            exporter.compare_detections([pair[0]], [pair[1]], 0.001, 100)


def test_one_more_is_a_difference_unless_it_stands_at_the_edge():
    with pytest.raises(UserError, match='differs'):
        exporter.compare_detections([found(A, B)], [found(A)], 0.001, 100)
    faint = ([20, 20, 30, 30], 0.0015, 0)
    exporter.compare_detections([found(A, faint)], [found(A)], 0.001, 100)
    last = ([20, 20, 30, 30], 0.5005, 2)
    exporter.compare_detections([found(last, A)], [found(last, B)], 0.001, 2)
