"""Runs that continue with more epochs, with data that moved, with data that changed; and what they keep in memory.

With a network of three convolutions (tiny.Toy) on a table of 16 small images.
"""

import json
import shutil

import cv2
import jax
import pytest
import tiny
from processes import python

from effdet_jax import config as run_config
from effdet_jax import data, evaluate, train
from effdet_jax.data.shapes import CLASS_NAMES, draw
from effdet_jax.errors import UserError
from effdet_jax.records import console
from effdet_jax.records.metrics import MetricsLog, read_metrics
from experiments.reliability import config as reliability

IMAGES = 16
STEPS = 8  # of two epochs


@pytest.fixture(scope='module', autouse=True)
def toy_network():
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_toy(patch)
        yield


def write_images(folder, count=IMAGES, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    rows = ['image,xmin,ymin,xmax,ymax,label']
    for index in range(first, first + count):
        example = draw(index, size=64)
        cv2.imwrite(str(folder / f'{index}.png'), example.image)
        for (y1, x1, y2, x2), label in zip(example.annotations.boxes_yxyx, example.annotations.labels, strict=True):
            rows.append(f'{index}.png,{x1:.1f},{y1:.1f},{x2:.1f},{y2:.1f},{CLASS_NAMES[label]}')
    (folder / 'boxes.csv').write_text('\n'.join(rows) + '\n')
    return f'csv:{folder}/boxes.csv'


def config(data_folder, **changes):
    c = reliability.get_config()
    c.dataset.update(source='', train_split=f'csv:{data_folder}/train/boxes.csv', class_names=CLASS_NAMES)
    c.dataset.eval_split = f'csv:{data_folder}/eval/boxes.csv'
    c.train.update(epochs=2.0, freeze='')
    c.eval.every_epochs, c.checkpoint.every_epochs = 1.0, 0.5
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope='module')
def two_epochs(tmp_path_factory):
    """A folder with `data` and, in `run`, a run of two epochs on them."""
    folder = tmp_path_factory.mktemp('two_epochs')
    write_images(folder / 'data' / 'train')
    write_images(folder / 'data' / 'eval', count=4, first=100)
    train.train_and_evaluate(config(folder / 'data'), folder / 'run')
    return folder


@pytest.fixture
def folder(two_epochs, tmp_path):
    """A copy of it, to be changed; the config of the run still names the data in the original folder."""
    return shutil.copytree(two_epochs, tmp_path / 'copy')


def continued(c, workdir):
    """What is printed while a run continues."""
    with console.terminal.capture() as printed:
        train.train_and_evaluate(c, workdir)
    return ' '.join(printed.get().split())


def steps_of(workdir):
    return [row['step'] for row in read_metrics(workdir / 'metrics.jsonl') if 'train/loss' in row]


def saved_config(workdir):
    return json.loads((workdir / 'config.json').read_text())


# Other keys.


def test_more_epochs_continue_and_the_new_schedule_is_told(two_epochs, folder):
    said = continued(config(two_epochs / 'data', **{'train.epochs': 3.0}), folder / 'run')
    assert (
        'note: config.train.epochs changes from 2.0 to 3.0: from here on the learning rate follows the new schedule'
    ) in said
    assert f'from step {STEPS} of 12' in said
    assert steps_of(folder / 'run') == [*range(1, 13)]
    assert saved_config(folder / 'run')['train']['epochs'] == 3.0


def test_the_runs_own_config_with_a_flag_continues_it(two_epochs, folder):
    c = run_config.load(folder / 'run')
    c.train.epochs = 3.0
    assert f'from step {STEPS} of 12' in continued(c, folder / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('config_flags', [(), ('--config=configs/saved.py:{run}',)], ids=['none', 'saved'])
def test_the_command_continues_with_a_flag_and_without_a_config(folder, config_flags):
    run = folder / 'run'
    flags = [*(flag.format(run=run) for flag in config_flags), f'--workdir={run}', '--config.train.epochs=3']
    code, printed, error = python('-m', 'experiments.reliability.small', *flags)
    assert (code, error) == (0, '')
    assert f'from step {STEPS} of 12' in ' '.join(printed.split())
    assert saved_config(run)['train']['epochs'] == 3.0


def test_fewer_epochs_than_were_done_are_refused_and_change_nothing(two_epochs, folder):
    with pytest.raises(
        UserError, match=r'has done 8 steps, and with this config there are 4: raise config\.train\.epo'
    ):
        train.train_and_evaluate(config(two_epochs / 'data', **{'train.epochs': 1.0}), folder / 'run')
    assert saved_config(folder / 'run') == saved_config(two_epochs / 'run')


@pytest.mark.parametrize(
    ('key', 'value'), [('schedule.learning_rate', 0.5), ('train.batch_size', 8), ('seed', 1), ('loss.delta', 1.0)]
)
def test_what_would_change_what_was_learned_is_refused(two_epochs, key, value):
    c = config(two_epochs / 'data', **{key: value, 'train.epochs': 3.0})
    with pytest.raises(UserError, match=rf'belongs to a run with another config \({key}: '):
        train.train_and_evaluate(c, two_epochs / 'run')


# Other data.


def test_data_that_moved_continue_where_they_are_named(folder):
    """The original ones are not looked at: the config names them no more."""
    c = config(folder / 'data', **{'train.epochs': 3.0})
    said = continued(c, folder / 'run')
    assert 'note: config.dataset.train_split changes from ' in said
    assert f"to 'csv:{folder}/data/train/boxes.csv': the training images must be the same" in said
    assert 'evaluations from here on do not compare with earlier ones if the images are others' in said
    assert steps_of(folder / 'run') == [*range(1, 13)]
    assert saved_config(folder / 'run')['dataset']['train_split'] == f'csv:{folder}/data/train/boxes.csv'


@pytest.mark.parametrize(
    ('images', 'first', 'told'),
    [
        (8, 0, '16 images then, 8 now'),
        pytest.param(IMAGES, 50, '16 images, but other files, boxes or labels', marks=pytest.mark.slow),
    ],
)
def test_data_that_changed_are_refused_and_accepted_by_their_fingerprint(folder, images, first, told):
    spec = write_images(folder / 'data' / 'train', images, first)
    c, before = config(folder / 'data', **{'train.epochs': 9.0}), saved_config(folder / 'run')
    fingerprint = data.fingerprint(data.open_source(spec, '', CLASS_NAMES))
    message = (
        rf'the training data of .*/run have changed since step {STEPS} \({told}\): put the old data back, or continue '
        rf'with the new ones by --config\.dataset\.accepted_fingerprint={fingerprint}'
    )
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(c, folder / 'run')
    assert saved_config(folder / 'run') == before
    c.dataset.accepted_fingerprint = '0' * 32  # of data before these
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(c, folder / 'run')
    c.dataset.accepted_fingerprint = fingerprint
    said = continued(c, folder / 'run')
    assert f'note: the training data have changed since step {STEPS} ({told})' in said
    assert steps_of(folder / 'run') == [*range(1, 9 * images // 4 + 1)]


@pytest.mark.slow
def test_a_checkpoint_from_before_fingerprints_continues_without_a_word(two_epochs, folder):
    for path in folder.glob('run/checkpoints/*/data/metadata'):
        saved = json.loads(path.read_text())
        assert saved.pop('images') == IMAGES and saved.pop('fingerprint')
        path.write_text(json.dumps(saved))
    said = continued(config(two_epochs / 'data', **{'train.epochs': 3.0}), folder / 'run')
    assert 'training data' not in said
    assert steps_of(folder / 'run') == [*range(1, 13)]


@pytest.mark.slow
def test_a_run_that_was_not_saved_yet_starts_with_any_data(folder):
    shutil.rmtree(folder / 'run' / 'checkpoints')
    write_images(folder / 'data' / 'train', 8)
    train.train_and_evaluate(config(folder / 'data'), folder / 'run')
    assert steps_of(folder / 'run') == [*range(1, 5)]


# Evaluation alone.


def test_the_best_checkpoint_is_evaluated_without_the_training_data(folder):
    shutil.rmtree(folder / 'data' / 'train')
    rows = [row for row in read_metrics(folder / 'run' / 'metrics.jsonl') if 'eval/AP' in row]
    for class_names in (CLASS_NAMES, ()):  # the run's own config, and one that leaves the classes to the data
        best = evaluate.best_evaluation(config(folder / 'data', **{'dataset.class_names': class_names}), folder / 'run')
        assert best.source.class_names == CLASS_NAMES
        assert best.metrics['AP'] == max(row['eval/AP'] for row in rows)


def test_an_unreadable_evaluation_image_does_not_cost_the_report(two_epochs, folder):
    image = folder / 'data' / 'eval' / '102.png'
    image.write_bytes(image.read_bytes()[:60])
    c = config(folder / 'data', **{'train.epochs': 3.0, 'dataset.max_unreadable_fraction': 0.3})
    (folder / 'run' / 'report.html').unlink()
    assert 'no report.html' not in continued(c, folder / 'run')
    page = (folder / 'run' / 'report.html').read_text(encoding='utf-8')
    assert '1 of 4 images could not be read.' in page and '102.png' in page


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize('starts', ['anew', 'from a checkpoint', 'from weights'])
def test_one_copy_of_the_state_is_in_memory_while_the_loop_runs(two_epochs, folder, monkeypatch, starts):
    changes = {'train.epochs': 3.0} | ({'train.init_from': str(two_epochs / 'run')} if starts == 'from weights' else {})
    workdir = folder / ('run' if starts == 'from a checkpoint' else 'other')
    alive, write = [], MetricsLog.write

    def look(self, step, numbers):
        write(self, step, numbers)
        alive.append(sorted(array.shape for array in jax.live_arrays() if array.shape[-2:] in ((8, 45), (8, 36))))

    monkeypatch.setattr(MetricsLog, 'write', look)
    train.train_and_evaluate(config(two_epochs / 'data', **changes), workdir)
    # The kernels of both predictors on four devices: parameters, average, and Adam's two moments.
    assert alive[0] == sorted([(4, 1, 1, 8, 45), (4, 1, 1, 8, 36)] * 4)
