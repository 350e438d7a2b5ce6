"""What befalls a run: signals, a second process, a full disk, damaged checkpoints, a planted NaN, a lost host.

With a network of three convolutions (tiny.Toy), in this process where possible.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from full_disk import full_disk
from quick import slow_but
from tiny import assert_same

from effdet_jax import data, train
from effdet_jax.data.sources import Shapes
from effdet_jax.detection import preprocess
from effdet_jax.errors import UserError
from effdet_jax.records import console
from effdet_jax.records.checkpoint import Checkpoints
from effdet_jax.records.files import locked
from effdet_jax.records.metrics import MetricsLog, read_metrics
from effdet_jax.training import run
from experiments.reliability import config as reliability

ROOT = Path(__file__).parents[1]
STEPS = 16


def config(**changes):
    """16 steps; an evaluation after 8; a checkpoint after 2."""
    c = reliability.get_config()
    c.dataset.train_split = '0:32'
    c.train.update(epochs=2.0, freeze='')
    c.eval.every_epochs, c.checkpoint.every_epochs = 1.0, 0.25
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(autouse=True)
def toy_network(monkeypatch):
    tiny.use_toy(monkeypatch)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_toy(patch)
        train.train_and_evaluate(config(), workdir)
    return workdir


def at_step(monkeypatch, step, action):
    """Runs `action` when the training metrics of `step` are written."""
    write = MetricsLog.write

    def write_and_act(self, at, numbers):
        write(self, at, numbers)
        if at == step and 'train/loss' in numbers:
            action()

    monkeypatch.setattr(MetricsLog, 'write', write_and_act)


def state_of(workdir, step=STEPS):
    return ocp.PyTreeCheckpointer().restore(workdir.absolute() / f'checkpoints/{step}/state')


def flat(printed):
    return ' '.join(printed.split())


# Signals.


@pytest.mark.parametrize('number', slow_but([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_stops_after_the_step_and_the_command_continues(undisturbed, tmp_path, monkeypatch, number, capfd):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        with console.terminal.capture() as printed:
            assert train.train_and_evaluate(config(**{'log.every_steps': 3}), tmp_path) == {}
    assert flat(printed.get()).endswith(
        f'stopped at step 4 of {STEPS}, all saved in {tmp_path}: the same command continues it'
    )
    assert f'{number.name}: finishing this step and saving; send it again to stop at once' in capfd.readouterr().err
    assert [row['step'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [2, 3, 4]
    with console.terminal.capture() as printed:
        train.train_and_evaluate(config(), tmp_path)
    assert f'from step 4 of {STEPS}' in printed.get()
    assert_same(state_of(tmp_path), state_of(undisturbed))


# Disks.


def test_a_full_disk_ends_no_run_that_has_a_checkpoint(undisturbed, tmp_path, monkeypatch):
    """Full from step 5 to step 11: the checkpoints and logs of this time fail, the later ones do not."""
    disk, opened = full_disk(200), []
    monkeypatch.setattr(run, 'Checkpoints', lambda *args, **kw: opened.append(Checkpoints(*args, **kw)) or opened[0])

    def when_written(action):
        """The background must be done with the last checkpoint before the disk changes."""
        opened[0].check(wait=True)
        action()

    at_step(monkeypatch, 11, lambda: when_written(lambda: disk.__exit__(None, None, None)))
    at_step(monkeypatch, 5, lambda: when_written(disk.__enter__))
    with console.terminal.capture() as printed:
        train.train_and_evaluate(config(), tmp_path)
    said = flat(printed.get())
    for step in (6, 8, 10):
        assert f'WARNING: the checkpoint of step {step} could not be written (' in said
    assert 'training goes on, step 4 is safe, and the next save tries again' in said
    assert f'WARNING: the log in {tmp_path} cannot be written (File too large): training goes on' in said
    assert_same(state_of(tmp_path), state_of(undisturbed))
    assert [row['step'] for row in read_metrics(tmp_path / 'metrics.jsonl') if 'train/loss' in row] == [*range(1, 17)]


def test_a_full_disk_ends_a_run_that_has_no_checkpoint_yet(tmp_path, monkeypatch):
    disk = full_disk(10)
    at_step(monkeypatch, 1, disk.__enter__)
    try:
        with pytest.raises(UserError, match=r'the first checkpoint, of step 2, could not be written .* free up space'):
            train.train_and_evaluate(config(), tmp_path)
    finally:
        disk.__exit__(None, None, None)


def test_a_run_does_not_start_where_nothing_can_be_written(tmp_path):
    with full_disk(10), pytest.raises(UserError, match=r'cannot be written \(File too large\): make room, or choose'):
        train.train_and_evaluate(config(), tmp_path / 'run')


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_two_steps_and_no_more(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / 'run')
    for array in (workdir / f'checkpoints/{STEPS}/state/d').iterdir():
        os.truncate(array, array.stat().st_size // 2)
    with console.terminal.capture() as printed:
        train.train_and_evaluate(config(), workdir)
    said = flat(printed.get())
    assert f'WARNING: the checkpoint of step {STEPS} is damaged (' in said
    assert f'continuing {workdir} from step {STEPS - 2} of {STEPS}' in said
    assert_same(state_of(workdir), state_of(undisturbed))


def test_a_second_process_on_a_work_directory_is_refused_and_changes_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob('*')}
    with locked(undisturbed), pytest.raises(UserError, match=r'is in use by process \d+ on \S+: wait for it'):
        train.train_and_evaluate(config(), undisturbed)
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob('*')}
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {
        undisturbed / '.lock'
    }


# Numbers.


def plant_nan(patch, index):
    """Image `index` is white, and white images are normalised to nan."""
    getitem, normalize = Shapes.__getitem__, preprocess.normalize

    def maybe_white(self, i):
        example = getitem(self, i)
        white = self._indices[i] == index
        return data.Example(np.full_like(example.image, 255), example.annotations) if white else example

    def with_nan(images_u8, *args):
        white = (images_u8[:, :8, :8] == 255).all(axis=(1, 2, 3), keepdims=True)
        return jnp.where(white, jnp.nan, normalize(images_u8, *args))

    patch.setattr(Shapes, '__getitem__', maybe_white)
    patch.setattr(preprocess, 'normalize', with_nan)


def test_a_planted_nan_is_skipped_counted_and_named(tmp_path, monkeypatch):
    """One bad image, so one bad step in each epoch of eight; each of the four devices has one image."""
    plant_nan(monkeypatch, 5)
    with console.terminal.capture() as printed:
        train.train_and_evaluate(config(), tmp_path)
    incidents = [json.loads(line) for line in (tmp_path / 'incidents.jsonl').read_text().splitlines()]
    assert [(i['kind'], i['loss'], 5 in [image['index'] for image in i['images']]) for i in incidents] == [
        ('skipped', 'nan', True)
    ] * 2
    assert all(len(i['images']) == 4 for i in incidents)
    steps = [i['step'] for i in incidents]
    assert steps[0] <= 8 < steps[1]
    rows = [row for row in read_metrics(tmp_path / 'metrics.jsonl') if 'train/loss' in row]
    assert [row['step'] for row in rows if row['train/skipped_steps']] == steps
    assert [row['step'] for row in rows if not np.isfinite(row['train/loss'])] == steps
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_of(tmp_path)))
    assert (
        f'WARNING: step {steps[0]}: loss nan, gradient norm nan, the step is skipped; its images are in '
        f'{tmp_path}/incidents.jsonl'
    ) in flat(printed.get())


def test_too_many_in_a_row_end_the_run_with_advice_and_the_last_good_state(tmp_path, monkeypatch):
    plant_nan(monkeypatch, 5)
    message = (
        r'1 steps in a row, up to step \d+, had no finite loss and gradient; .*incidents\.jsonl names their images'
    )
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config(**{'train.max_skipped_steps': 1, 'log.every_steps': 16}), tmp_path)


# Several hosts, in processes of their own.


def start(workdir, *flags, devices=1, pause=0.0):
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'PAUSE': str(pause),
        'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'cache'),
    }  # fmt: skip
    command = [
        sys.executable, '-m', 'experiments.reliability.small', '--config=experiments/reliability/config.py',
        f'--workdir={workdir}', '--config.dataset.train_split=0:40', '--config.train.freeze=', *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_two(workdir, *flags, pause=0.0):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    several = f'--coordinator=127.0.0.1:{port}', '--num_processes=2'
    return [start(workdir, *flags, *several, f'--process_id={i}', devices=2, pause=pause) for i in (0, 1)]


def finish(processes):
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


def rows_of(workdir):
    """(losses, AP at the end)."""
    rows = read_metrics(workdir / 'metrics.jsonl')
    return [row['train/loss'] for row in rows if 'train/loss' in row], rows[-1]['eval/AP']


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_process_of_four_and_one_of_one(tmp_path):
    """Ten steps of the same global batches; the hosts take turns with the images, so only their order in it differs."""
    ten_steps = (
        '--config.train.epochs=1', '--config.eval.every_epochs=1', '--config.checkpoint.every_epochs=1',
        '--config.optimizer.name=sgd', '--config.schedule.learning_rate=0.01',  # Adam makes much of rounding at first
    )  # fmt: skip
    finish([start(tmp_path / 'one', *ten_steps, devices=1)])
    finish([start(tmp_path / 'four', *ten_steps, devices=4)])
    finish(start_two(tmp_path / 'two', *ten_steps))
    losses, ap = rows_of(tmp_path / 'one')
    assert len(losses) == 10
    for other in ('four', 'two'):
        other_losses, other_ap = rows_of(tmp_path / other)
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-4)
        assert other_ap == pytest.approx(ap, abs=1e-4)
    host_1 = read_metrics(tmp_path / 'two/hosts/1/metrics.jsonl')
    np.testing.assert_array_equal(
        [row['train/loss'] for row in host_1 if 'train/loss' in row], rows_of(tmp_path / 'two')[0]
    )


@pytest.mark.slow
def test_of_two_processes_one_dies_the_other_ends_and_both_continue(tmp_path):
    undisturbed = start_two(tmp_path / 'undisturbed')
    processes = start_two(tmp_path / 'run', pause=0.5)
    while not has_checkpoint(tmp_path / 'run'):
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.1)
    processes[1].kill()
    printed = processes[0].communicate(timeout=300)[0]
    assert processes[0].returncode != 0
    assert printed.splitlines()[-1].startswith('error: ')
    assert 'start all of them again, and the run continues from the last checkpoint' in printed.splitlines()[-1]
    processes[1].communicate()

    processes = start_two(tmp_path / 'run', pause=0.3)
    wait_for_line(processes[0], 'compiled in')
    processes[1].send_signal(signal.SIGTERM)  # both stop, at one step
    stopped = [output.splitlines()[-1] for output in finish(processes)]
    assert stopped[0] == stopped[1]
    assert 'all saved in' in stopped[0]
    assert 'from step' in finish(start_two(tmp_path / 'run'))[0]
    finish(undisturbed)
    assert_same(state_of(tmp_path / 'run', 30), state_of(tmp_path / 'undisturbed', 30))


def has_checkpoint(workdir):
    return any(path.name.isdigit() for path in workdir.glob('checkpoints/*'))


def wait_for_line(process, text):
    while text not in process.stdout.readline():
        assert process.poll() is None
