"""From a file to detections and to training, as a user goes: import, evaluate, predict, start from."""

import json

import cv2
import imports
import jax
import numpy as np
import pytest
import tiny
import writers
from test_commands import ROOT, start

from effdet_jax import train
from effdet_jax.commands.import_weights import importer
from effdet_jax.configs import quickstart
from effdet_jax.data import shapes
from effdet_jax.records.checkpoint import Checkpoints

LAYERS = writers.layers(writers.Member('nano', 16, 1, 1, weighted=True, classes=len(shapes.CLASS_NAMES)))
WRITTEN = writers.draw(LAYERS)
SMALL = (
    '--config=configs/quickstart.py', '--config.image.size=(64, 64)', '--config.model.fpn_channels=16',
    '--config.model.fpn_cells=1', '--config.model.head_layers=1', '--config.dataset.eval_split=1000000:1000004',
    '--config.eval.batch_size=4', f'--config.dataset.class_names={shapes.CLASS_NAMES}',
)  # fmt: skip


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return imports.file(tmp_path_factory.mktemp('source'), imports.torch_arrays(LAYERS, WRITTEN))


@pytest.fixture(scope='module')
def workdir(source):
    """Imported by the command."""
    workdir = source.parent / 'imported'
    code, out, error = start('import-weights', *SMALL, f'--source={source}', f'--workdir={workdir}')
    assert (code, error) == (0, '')
    assert 'preset effdet: ' in out
    assert f'python -m effdet_jax.main --workdir={workdir} --mode=eval' in out
    return workdir


def test_the_work_directory_says_what_it_is(workdir, source):
    assert {path.name for path in workdir.iterdir()} == {'config.json', 'import.json', 'checkpoints'}
    config = json.loads((workdir / 'config.json').read_text())
    assert config['eval']['nms'] == 'hard'  # effdet's
    assert config['dataset']['class_names'] == list(shapes.CLASS_NAMES)
    assert json.loads((workdir / 'import.json').read_text())['source'] == str(source)


def test_it_evaluates_without_a_config(workdir):
    code, out, error = start('main', '--mode=eval', f'--workdir={workdir}')
    assert (code, error) == (0, '')
    assert 'on 4 images' in out
    for name in ('AP50', *shapes.CLASS_NAMES):
        assert name in out


def test_it_predicts(workdir, tmp_path):
    cv2.imwrite(str(image := tmp_path / 'shapes.png'), shapes.draw(3, size=96).image)
    code, _, error = start('predict', f'--workdir={workdir}', f'--out={tmp_path / "found"}', image)
    assert (code, error) == (0, '')
    results = json.loads((tmp_path / 'found' / 'detections.json').read_text())
    assert results
    for result in results:
        x, y, width, height = result['bbox']
        assert 1 <= result['category_id'] <= len(shapes.CLASS_NAMES)
        assert 0 <= x <= x + width <= 96.01 and 0 <= y <= y + height <= 96.01


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--config=configs/d0.py', '--workdir=W'), 'missing --source'),
        (('--config=configs/d0.py', '--source=x.h5', '--workdir=W', '--preset=offical'), 'offical'),
        (('--config=configs/d0.py', '--source=x.h5', '--workdir=W', 'x.h5'), 'unexpected x.h5'),
    ],
)
def test_bad_usage(arguments, message):
    code, _, error = start('import-weights', *arguments)
    assert code == 2
    assert message in error
    assert error.startswith('error: ') and error.count('\n') == 1
    assert not (ROOT / 'W').exists()


@pytest.mark.slow
def test_another_model_is_one_line(source):
    names = f'--config.dataset.class_names={shapes.CLASS_NAMES}'
    code, out, error = start('import-weights', '--config=configs/d0.py', names, f'--source={source}', '--workdir=W')
    assert code == 1
    assert '| missing ' in out  # the table
    assert 'does not fit d0: ' in error
    assert error.startswith('error: ') and error.count('\n') == 1
    assert not (ROOT / 'W').exists()


@pytest.mark.slow
@pytest.mark.usefixtures('depthwise_by_xla')
def test_a_backbone_is_frozen_and_then_fine_tuned(tmp_path, capsys):
    """The schedule of (docs/seed_report.md, Training): an imported backbone is unfrozen later."""
    arrays = imports.torch_arrays(LAYERS, WRITTEN)
    backbone = {name.removeprefix('backbone.'): array for name, array in arrays.items() if name.startswith('backbone.')}
    importer.import_weights(quickstart.get_config(), imports.file(tmp_path, backbone), tmp_path / 'imported')
    config = tiny.config()
    config.train.init_from = str(tmp_path / 'imported')
    config.checkpoint.keep = tiny.STEPS
    train.train_and_evaluate(config, tmp_path / 'run')

    loaded = sum(array.size for path, array in WRITTEN.items() if path[:2] == ('params', 'backbone'))
    printed = ''.join(capsys.readouterr().out.split())
    assert f'|backbone|{loaded:,}|0|0|' in printed
    assert '|fpn|0|' in printed
    checkpoints = Checkpoints(tmp_path / 'run', keep=tiny.STEPS)
    frozen, tuned = (checkpoints.variables(step) for step in (tiny.STEPS_PER_EPOCH, tiny.STEPS))
    checkpoints.close()
    assert not same_backbone(tuned)
    assert same_backbone(frozen)


def same_backbone(variables):
    """Whether the backbone is the one that was written, statistics included."""

    def is_same(path, array):
        written = WRITTEN[tuple(key.key for key in path)]
        return np.allclose(array, written, rtol=1e-5, atol=1e-7)

    parts = {collection: {'backbone': tree['backbone']} for collection, tree in variables.items()}
    return all(jax.tree.leaves(jax.tree_util.tree_map_with_path(is_same, parts)))
