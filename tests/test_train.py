"""The whole loop on a tiny detector and four devices: the backbone frozen for one epoch of two, a moving average."""

import json
import math
import shutil

import cv2
import jax
import numpy as np
import pytest
import tiny
from tiny import assert_same

from effdet_jax import build, data, evaluate, train
from effdet_jax import config as run_config
from effdet_jax.data.shapes import CLASS_NAMES
from effdet_jax.errors import UserError
from effdet_jax.model import build_model
from effdet_jax.records import console
from effdet_jax.records.checkpoint import Checkpoints, load_variables
from effdet_jax.records.metrics import MetricsLog, read_metrics
from effdet_jax.training.optimizer import make_optimizer
from effdet_jax.training.state import init_state, init_variables
from effdet_jax.training.transfer import start_from

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')
TRAIN = {
    'loss', 'class_loss', 'box_loss', 'l2_loss', 'learning_rate', 'gradient_norm', 'positives', 'boxes_left_out',
    'images_replaced', 'skipped_steps',
}  # fmt: skip
SPEED = {'images_per_second', 'waiting_for_data'}  # the only numbers that differ from run to run
INTERRUPTED_AT = 3  # in the frozen epoch, one step after a checkpoint


@pytest.fixture(scope='module')
def fresh():
    """The state at step 0, in NumPy."""
    c = tiny.config()
    optimizer, _ = make_optimizer(c, tiny.STEPS_PER_EPOCH, tiny.STEPS)
    state = init_state(init_variables(build_model(c.model, 5), c.seed), optimizer, c.train.ema_decay)
    return jax.tree.map(np.asarray, state)


@pytest.fixture(scope='module')
def continued_run(tmp_path_factory, fresh):
    """(work directory, metrics, print-out of the second start, its state at the interruption) of a run in two parts."""
    workdir = tmp_path_factory.mktemp('runs') / 'continued'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, 'write', interrupting(MetricsLog.write))
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny.config(), workdir)
    checkpoints = Checkpoints(workdir)
    at_interruption = checkpoints.restore(INTERRUPTED_AT - 1, fresh)
    checkpoints.close()
    with console.terminal.capture() as printed:
        numbers = train.train_and_evaluate(tiny.config(), workdir)
    return workdir, numbers, printed.get(), at_interruption


def interrupting(write):
    def write_or_interrupt(self, step, numbers):
        write(self, step, numbers)
        if step == INTERRUPTED_AT:
            raise KeyboardInterrupt

    return write_or_interrupt


def final_state(workdir, like):
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore(tiny.STEPS, like)
    checkpoints.close()
    return restored


def equal_parts(a, b):
    """{kind/part: whether every array of it is the same}."""
    return {
        f'{kind}/{part}': all(
            np.array_equal(x, y) for x, y in zip(*(jax.tree.leaves(tree[kind][part]) for tree in (a, b)), strict=True)
        )
        for kind in a
        for part in a[kind]
    }


# A run from beginning to end.


def test_the_work_directory_holds_all_that_was_promised(finished_run):
    workdir, _, printed = finished_run
    assert {path.name for path in workdir.iterdir()} == {
        '.lock', 'config.json', 'checkpoints', 'metrics.jsonl', 'tensorboard', 'pictures', 'sessions.jsonl',
        'report.html',
    }  # fmt: skip
    assert [path.stat().st_size > 1000 for path in (workdir / 'tensorboard').glob('events.*')] == [True]
    pictures = {str(path.relative_to(workdir / 'pictures')) for path in workdir.glob('pictures/*/*.png')}
    assert pictures == {f'0000000{step}/00000{i}.png' for step in (4, 8) for i in (0, 1)}
    assert 'step 8  AP 0.' in printed


def test_the_stored_config_says_what_a_label_means(finished_run):
    stored = json.loads((finished_run[0] / 'config.json').read_text())
    assert stored['dataset']['class_names'] == ['ellipse', 'rectangle', 'triangle', 'star', 'ring']
    assert stored['dataset']['category_ids'] == [1, 2, 3, 4, 5]
    given = run_config.to_json(tiny.config())
    assert {**stored, 'dataset': None} == {**given, 'dataset': None}


def test_every_step_is_in_the_metrics_and_every_evaluation(finished_run):
    workdir, numbers, _ = finished_run
    rows = read_metrics(workdir / 'metrics.jsonl')
    training = [row for row in rows if 'train/loss' in row]
    assert [row['step'] for row in training] == list(range(1, 9))
    for row in training:
        assert row.keys() == {'step'} | {f'train/{name}' for name in TRAIN | SPEED}
        assert all(math.isfinite(value) for value in row.values())
        assert 0 <= row['train/waiting_for_data'] < 1
    evaluations = [row for row in rows if 'eval/AP' in row]
    assert [row['step'] for row in evaluations] == [4, 8]
    assert {'step', 'eval/AP', 'eval/AP50', 'eval/AP75', 'eval/AR100', 'eval/VOC_AP50', 'eval/AP/star'} <= evaluations[
        0
    ].keys()
    np.testing.assert_equal({f'eval/{name}': value for name, value in numbers.items()} | {'step': 8}, evaluations[1])


def test_the_boxes_that_did_not_fit_are_counted(finished_run):
    c = tiny.config()
    batches = data.train_batches(
        data.open_source('shapes', c.dataset.train_split), image_size=c.image.size, batch_size=c.train.batch_size,
        max_boxes=c.dataset.max_boxes, scale_range=c.augment.scale, seed=c.seed, threads=0,
    )  # fmt: skip
    dropped = [int(batch['dropped'].sum()) for batch, _ in zip(batches, range(tiny.STEPS), strict=False)]
    rows = [row for row in read_metrics(finished_run[0] / 'metrics.jsonl') if 'train/loss' in row]
    assert [row['train/boxes_left_out'] for row in rows] == dropped
    assert sum(dropped) > 0


def test_loss_is_the_sum_of_its_parts(finished_run):
    for row in read_metrics(finished_run[0] / 'metrics.jsonl'):
        if 'train/loss' in row:
            parts = row['train/class_loss'] + 50 * row['train/box_loss'] + row['train/l2_loss']
            assert row['train/loss'] == pytest.approx(parts, rel=1e-5)


def test_the_last_checkpoints_are_there_and_the_best(finished_run):
    workdir, _, _ = finished_run
    ap = {row['step']: row['eval/AP'] for row in read_metrics(workdir / 'metrics.jsonl') if 'eval/AP' in row}
    best = max(ap, key=ap.get)
    assert {int(path.name) for path in (workdir / 'checkpoints').iterdir()} == {best, 6, 8}
    assert load_variables(workdir, 'eval/AP')[0] == best


# Interrupted and started again.


def test_a_continued_run_ends_with_the_same_state_to_the_bit(finished_run, continued_run, fresh):
    once, again = (final_state(run[0], fresh) for run in (finished_run, continued_run))
    assert_same(once.state, again.state)
    assert once.data_position == again.data_position
    assert f'continuing {continued_run[0]} from step {INTERRUPTED_AT - 1} of {tiny.STEPS}' in continued_run[2]


def test_a_continued_run_has_the_same_metrics_and_every_step_once(finished_run, continued_run):
    once, again = (
        [
            {name: value for name, value in row.items() if name.removeprefix('train/') not in SPEED}
            for row in read_metrics(run[0] / 'metrics.jsonl')
        ]
        for run in (finished_run, continued_run)
    )
    np.testing.assert_equal(again, once)
    np.testing.assert_equal(continued_run[1], finished_run[1])


def test_the_backbone_is_frozen_for_an_epoch_and_then_trained(finished_run, continued_run, fresh):
    frozen, final = continued_run[3].state, final_state(finished_run[0], fresh).state
    same = {'params/backbone', 'batch_stats/backbone'}
    before = equal_parts(frozen.variables, fresh.variables)
    assert {part for part, equal in before.items() if equal} == same
    assert not any(equal_parts(final.variables, fresh.variables).values())
    assert not any(equal_parts(final.ema, final.variables).values())


def test_a_finished_run_started_again_says_so_and_returns_its_metrics(finished_run, tmp_path):
    workdir = shutil.copytree(finished_run[0], tmp_path / 'copy')
    lines = (workdir / 'metrics.jsonl').read_text()
    with console.terminal.capture() as printed:
        numbers = train.train_and_evaluate(tiny.config(), workdir)
    np.testing.assert_equal(numbers, finished_run[1])
    assert f'from step {tiny.STEPS} of {tiny.STEPS}' in printed.get()
    assert (workdir / 'metrics.jsonl').read_text() == lines


def test_another_config_in_the_same_work_directory_is_refused(finished_run):
    c = tiny.config()
    c.train.batch_size = 8
    with pytest.raises(UserError, match=r'belongs to a run with another config \(train\.batch_size: 4 there, 8 now\)'):
        train.train_and_evaluate(c, finished_run[0])


# What others do with a finished run.


def test_evaluating_it_gives_the_metrics_of_its_best_checkpoint(finished_run):
    workdir, _, _ = finished_run
    rows = {row['step']: row for row in read_metrics(workdir / 'metrics.jsonl') if 'eval/AP' in row}
    best = rows[max(rows, key=lambda step: rows[step]['eval/AP'])]
    numbers = evaluate.evaluate_best(tiny.config(), workdir)
    np.testing.assert_equal({f'eval/{name}': value for name, value in numbers.items()} | {'step': best['step']}, best)


def test_evaluating_what_is_not_there_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r'nowhere/config\.json does not exist: give the --workdir of a training run'):
        evaluate.evaluate_best(tiny.config(), tmp_path / 'nowhere')
    assert not (tmp_path / 'nowhere').exists()


def test_starting_from_its_weights_takes_all_of_them_and_says_so(finished_run, fresh):
    workdir, _, _ = finished_run
    with console.terminal.capture() as printed:
        variables = start_from(workdir, fresh.variables, tiny.config())
    step, expected = load_variables(workdir, 'eval/AP')
    assert_same(variables, expected)
    assert f'starting from {workdir}, step {step}' in printed.get()
    assert '| part ' in printed.get()
    for part in fresh.variables['params']:
        count = sum(leaf.size for leaf in jax.tree.leaves(fresh.variables['params'][part]))
        row = next(line for line in printed.get().splitlines() if line.startswith(f'| {part} '))
        assert [cell.strip() for cell in row.strip('|').split('|')] == [part, f'{count:,}', '0', '0']


def test_the_report_names_the_classes_and_the_files(finished_run):
    workdir, numbers, _ = finished_run
    with console.terminal.capture() as printed:
        train.print_summary(numbers, workdir)
    for text in ('VOC07_AP50', '| ellipse ', '| ring ', f'{workdir}: report.html  config.json'):
        assert text in printed.get()


# Runs that cannot start.


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'dataset.source': 'voc:nowhere'}, 'nowhere'),
        ({'dataset.source': 'tfds:voc/2007'}, r'voc/2007 is not prepared in .*: run pip install'),
        ({'dataset.train_split': '0:0'}, 'shapes has no split'),
        ({'train.batch_size': 6}, r'config\.train\.batch_size=6 cannot be divided evenly into 4 devices'),
        ({'model.backbone': 'b9'}, r"config\.model\.backbone='b9' is unknown"),
        ({'optimizer.name': 'lion'}, r"config\.optimizer\.name='lion' is unknown"),
        ({'train.freeze': 'stem'}, r"config\.train\.freeze='stem' matches no parameter: paths look like \w+/"),
        ({'train.init_from': '/nowhere'}, r'/nowhere holds no checkpoints: set config\.train\.init_from to a run'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_what_cannot_start_leaves_nothing_behind(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    c = tiny.config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(c, tmp_path / 'run')
    assert list(tmp_path.iterdir()) == []


def test_building_a_run_reads_every_key_but_one_that_is_not_ours(tmp_path):
    c = tiny.config()
    c.train.momentum = 0.9
    with pytest.raises(UserError, match=r'nothing reads these config keys: train\.momentum;'):
        build.build_run(c, tmp_path / 'run')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_unreadable_image_ends_training_with_its_name(tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n and no more')
    (tmp_path / 'boxes.csv').write_text('image,xmin,ymin,xmax,ymax,label\nbroken.png,1,1,9,9,star\n')
    c = tiny.config()
    c.dataset.update(source=f'csv:{tmp_path}/boxes.csv', train_split='', eval_split='', class_names=CLASS_NAMES)
    with pytest.raises(UserError, match=r'broken\.png'):
        train.train_and_evaluate(c, tmp_path / 'run')


@pytest.mark.slow
def test_a_few_unreadable_images_are_replaced_named_once_and_counted(tmp_path):
    rows = ['image,xmin,ymin,xmax,ymax,label']
    for index in range(16):  # as many as `tiny.config` has, so that its compiled step is used
        cv2.imwrite(str(tmp_path / f'{index}.png'), np.full((64, 64, 3), 15 * index, np.uint8))
        rows.append(f'{index}.png,8,8,40,40,star')
    (tmp_path / '5.png').write_bytes((tmp_path / '5.png').read_bytes()[:60])
    (tmp_path / 'boxes.csv').write_text('\n'.join(rows))
    c = tiny.config()
    c.dataset.update(source=f'csv:{tmp_path}/boxes.csv', train_split='', max_unreadable_fraction=0.1)
    c.dataset.update(eval_split='shapes@1000000:1000006', class_names=CLASS_NAMES)
    with console.terminal.capture() as printed:
        train.train_and_evaluate(c, tmp_path / 'run')
    assert printed.get().count('5.png: ') == 1
    assert 'warning: replaced by the next image: ' in printed.get()
    rows = [row for row in read_metrics(tmp_path / 'run' / 'metrics.jsonl') if 'train/loss' in row]
    assert sum(row['train/images_replaced'] for row in rows) == 2  # in each of two epochs
