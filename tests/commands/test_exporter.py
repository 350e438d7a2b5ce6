import functools
import json
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny
from processes import printed_by

import effdet_jax
from effdet_jax import config as run_config
from effdet_jax.commands.export import exporter
from effdet_jax.detection.postprocess import postprocess
from effdet_jax.errors import UserError
from effdet_jax.inference import Augmentation, Detections, Detector
from effdet_jax.inference.detector import Thresholds
from effdet_jax.records import pictures

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')

ROOT = Path(__file__).parents[2]
SHOWN = {  # Python for users, {page: blocks}
    page: re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for page in ('README.md', 'docs/deploy.md')
}

# Around the second block of docs/deploy.md: a process that can import jax and numpy, and nothing else of ours.
ALONE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('effdet_jax', 'configs', 'flax', 'ml_collections', 'cv2', 'orbax', 'tensorflow'):
            raise ImportError(f'{{name}} is refused')
sys.meta_path.insert(0, Refuse())
import numpy
image = numpy.load('image.npy')
{SHOWN['docs/deploy.md'][1]}
np.savez('found.npz', boxes=boxes[0], scores=scores[0], labels=labels[0])
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
    assert not exporter.compare_detections(original(images), ours(images), 0.001, 10).unmatched
    threshold = float(ours(images[0]).scores[4])
    assert len(ours(images[0], score=threshold)) == 4


def test_it_runs_where_jax_and_numpy_are_alone(exported, finished_run, tmp_path):
    image = tiny.ManySizes(3)[2].image
    np.save(tmp_path / 'image.npy', image)
    shutil.copy(exported, tmp_path / 'd3.zip')
    printed = printed_by(ALONE, cwd=tmp_path, PYTHONPATH=None)
    found, expected = np.load(tmp_path / 'found.npz'), Detector.load(finished_run[0])(image)
    np.testing.assert_allclose(found['boxes'], expected.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(found['scores'], expected.scores, atol=1e-5)
    assert tuple(printed.split()) == expected.names


def test_the_detector_that_is_shown_to_users(finished_run, tmp_path, monkeypatch):
    """README.md and docs/deploy.md, with a detector that is trained already."""
    workdir, metrics, _ = finished_run
    load = Detector.load
    monkeypatch.setattr(Detector, 'load', lambda _: load(workdir))
    monkeypatch.setattr(effdet_jax, 'train_and_evaluate', lambda config, workdir: metrics)
    monkeypatch.chdir(tmp_path)
    images = [tiny.ManySizes(2)[index].image for index in range(2)]
    pictures.write_image(Path('photo.jpg'), images[0])
    for page, blocks in SHOWN.items():
        names = {'image': images[0], 'another': images[1], 'images': images}
        exec(compile(blocks[0], page, 'exec'), names)
        assert names['picture'].ndim == 3


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


@pytest.mark.parametrize('outputs', ['boxes', 'raw'])
def test_a_bfloat16_run_is_exported_in_float32(outputs, finished_run, tmp_path, capsys):
    shutil.copytree(finished_run[0], workdir := tmp_path / 'run')
    config = run_config.load(workdir)
    config.model.dtype = 'bfloat16'
    run_config.save(config, workdir)
    exporter.export(workdir, tmp_path / 'out.zip', 'stablehlo', outputs)
    assert 'note: the run computes in bfloat16, the export in float32' in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / 'out.zip') as archive:
        metadata = json.loads(archive.read('metadata.json'))
        program = jax.export.deserialize(bytearray(archive.read('model.stablehlo')))
    assert 'bf16' not in program.mlir_module()
    assert metadata['config']['model']['dtype'] == 'float32'
    assert run_config.load(workdir).model.dtype == 'bfloat16'


def test_what_cannot_be_is_refused_at_once(exported, finished_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='already exists'):
        exporter.export(finished_run[0], exported, 'stablehlo', 'boxes')
    with pytest.raises(UserError, match='cannot convert batched NMS'):
        exporter.export(finished_run[0], tmp_path / 'm.onnx', 'onnx', 'boxes')
    with pytest.raises(UserError, match='cannot augment'):
        Detector.load(exported, augmentation=Augmentation(flip=True))
    (tmp_path / 'no.zip').write_text('no zip')
    with pytest.raises(UserError, match='is not a StableHLO export'):
        Detector.load(tmp_path / 'no.zip')


def skip_without_jax2onnx():
    pytest.importorskip('jax2onnx', reason='requirements-export.txt is not installed')
    if jax.__version_info__ >= (0, 12):
        pytest.skip('jax2onnx 0.17.1 does not know jax 0.12')


@pytest.mark.parametrize(
    ('format_name', 'package'), [('savedmodel', 'tensorflow'), ('onnx', 'jax2onnx'), ('onnx', 'onnxruntime')]
)
def test_a_missing_converter_is_named(format_name, package, finished_run, tmp_path, monkeypatch):
    if package == 'onnxruntime':
        skip_without_jax2onnx()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'{package} cannot be imported .* pip install -r requirements-'):
        exporter.export(finished_run[0], tmp_path / 'out', format_name, 'raw')
    assert not list(tmp_path.iterdir())


def test_a_converter_that_fails_is_one_line(finished_run, tmp_path, monkeypatch):
    """As jax2onnx 0.17.1 with jax 0.12."""

    def to_onnx(*arguments, **options):
        raise AttributeError("module 'jax._src.core' has no attribute 'ClosedJaxpr'")

    monkeypatch.setitem(sys.modules, 'jax2onnx', types.SimpleNamespace(to_onnx=to_onnx))
    monkeypatch.setitem(sys.modules, 'onnx', types.SimpleNamespace())
    with pytest.raises(
        UserError, match=rf'jax2onnx cannot convert this with jax {jax.__version__} \(AttributeError: .*'
    ):
        exporter.export(finished_run[0], tmp_path / 'm.onnx', 'onnx', 'raw')
    assert not list(tmp_path.iterdir())


def test_a_saved_model_agrees(finished_run, tmp_path):
    pytest.importorskip('tensorflow', reason='requirements-tensorflow.txt is not installed')
    exporter.export(finished_run[0], tmp_path / 'model', 'savedmodel', 'boxes', batch=4)
    metadata = json.loads((tmp_path / 'model' / 'assets.extra' / 'metadata.json').read_text())
    assert metadata['inputs'][1]['shape'] == [4, 2]


def test_onnx_agrees_and_its_depthwise_convolutions_are_grouped(finished_run, tmp_path):
    skip_without_jax2onnx()
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


def alone(theirs, ours, most=100):
    return exporter.compare_detections([theirs], [ours], 0.001, most).unmatched


def test_ties_may_change_places():
    assert exporter.compare_detections([found(A, B)], [found(B, A)], 0.001, 100) == (2, 0, 0, [])


@pytest.mark.parametrize(
    'other',
    [
        ([0, 0, 10, 10.2], 0.5, 0),  # the box
        ([0, 0, 10, 10], 0.502, 0),  # the score
        ([0, 0, 10, 10], 0.5, 1),  # the class
        ([0, 0, np.nan, 10], 0.5, 0),
        ([0, 0, 10, 10], np.nan, 0),
    ],
)
def test_a_difference_is_found_from_both_sides(other):
    assert len(alone(found(A, B), found(other, B))) == 2
    assert len(alone(found(other, B), found(A, B))) == 2


def test_of_a_low_score_a_share_may_differ():
    low, near, far = (found(A, ([50, 0, 60, 10], score, 0)) for score in (0.02, 0.0201, 0.0203))
    assert not alone(low, near)
    assert alone(low, far)[0].endswith('by 0 pixels and 0.0003 in score (allowed 0.1, 0.0002)')


def test_one_more_is_a_difference_unless_it_stands_at_the_edge():
    assert len(alone(found(A, B), found(A))) == 1
    faint = ([20, 20, 30, 30], 0.001005, 0)
    assert not alone(found(A, faint), found(A))
    last = ([20, 20, 30, 30], 0.5005, 2)
    assert not alone(found(last, A), found(last, B), most=2)


def test_the_edge_excuses_no_more_than_half():
    assert len(alone(found(A, B), found(*(([0, 20, 9, 40], 0.5, 0),) * 2), most=2)) == 4


class Crowd:
    """Five places with eight boxes each, as in a run of few steps; the best two of each are equal but for rounding."""

    def __init__(self):
        generator = np.random.default_rng(0)
        corners = generator.uniform(0, 20, (40, 2)) + np.repeat(np.arange(5), 8)[:, None] * [0, 64]
        anchors = np.concatenate([corners, corners + generator.uniform(30, 40, (40, 2))], axis=1)
        self.anchors = anchors.astype(np.float32)
        logits = 1 - 0.1 * np.arange(40)
        logits[1::8] = logits[::8]
        variables = {'logits': logits.astype(np.float32), 'regressions': np.full((40, 4), 0.01, np.float32)}
        config = dict(eval=dict(score_threshold=0.001, max_detections=40), image=dict(size=(64, 64)))
        self.original = exporter.Original(ml_collections.ConfigDict(config), variables, 0)

    def detect(self, variables, pixels, sizes, thresholds):
        def one(size):
            return postprocess(
                variables['logits'][:, None], variables['regressions'], jnp.asarray(self.anchors), size,
                kind='gaussian', score_threshold=thresholds.score, sigma=thresholds.sigma, max_outputs=40,
            )  # fmt: skip

        boxes, scores, labels = jax.vmap(one)(sizes)
        return boxes[..., np.array([1, 0, 3, 2])], scores, labels

    def compare(self, monkeypatch, *, weights=1e-7, boxes=1.0, sigma=1.0):
        """Of an export that rounds weights otherwise, scales boxes, or fades rivals differently."""
        generator = np.random.default_rng(1)
        variables = {
            name: array * (1 + weights * generator.standard_normal(array.shape)).astype(np.float32)
            for name, array in self.original.variables.items()
        }
        variables['regressions'] = variables['regressions'] * np.float32(boxes)

        @jax.jit
        def of_export(variables, pixels, sizes, score, iou, given_sigma):
            return self.detect(variables, pixels, sizes, Thresholds(score, iou, given_sigma * sigma))

        run = functools.partial(of_export, variables)

        monkeypatch.setattr(exporter, 'make_detect_pixels', lambda config, model: self.detect)
        monkeypatch.setattr(exporter, '_model', lambda config: None)
        thresholds = dict(score=0.001, iou=0.5, sigma=0.5)
        facts = dict(class_names=['a'], category_ids=[1], thresholds=thresholds)
        program = exporter.Program(run, (), exporter.BOXES)
        return exporter._compare_boxes(self.original, program, facts, run, [np.zeros((64, 320, 3), np.uint8)] * 2, 2)


def test_where_nms_amplifies_rounding_an_export_may_differ_as_the_original_does(monkeypatch):
    agreement = Crowd().compare(monkeypatch, weights=5e-7)
    assert re.search(r'boxes within .* \d+ differ by more, because NMS amplifies rounding', agreement), agreement


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(boxes=1.5), 'differs from the original before NMS: a with score .* pixels and'),
        (dict(sigma=1.1), r'differs from the original: a .*; \d+ detections differ, but only \d+ if the weights'),
        (dict(weights=0.01), 'differs from the original before NMS'),
    ],
)
def test_that_does_not_excuse_another_program(wrong, message, monkeypatch):
    with pytest.raises(UserError, match=message + '.*nothing was written'):
        Crowd().compare(monkeypatch, **wrong)
