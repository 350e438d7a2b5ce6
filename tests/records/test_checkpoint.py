import errno
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from full_disk import full_disk
from processes import printed_by
from quick import slow_but

from effdet_jax.errors import UserError
from effdet_jax.records import console
from effdet_jax.records.checkpoint import Checkpoints, DamagedError, has_checkpoints, load_variables
from effdet_jax.training.state import init_state

OPTIMIZER = optax.adam(0.1)


def state(seed=0, ema_decay=0.998, width=3):
    """A training state with NumPy leaves of several types, as the loop saves it; the average differs."""
    rng = np.random.default_rng(seed)
    kernel = jnp.float32(rng.standard_normal((2, width)))
    variables = {'params': {'conv': {'kernel': kernel}}, 'batch_stats': {'bn': {'mean': jnp.ones(width)}}}
    made = init_state(variables, OPTIMIZER, ema_decay).replace(step=jnp.int32(seed))
    return jax.tree.map(np.asarray, made.replace(ema=jax.tree.map(lambda x: x + 0.5, made.ema)))


def save(checkpoints, step, ap=None, saved=None):
    metrics = {'eval/AP': ap, 'eval/AP50': 1.0 - ap} if ap is not None else None
    checkpoints.save(step, saved or state(step), {'next_index': step}, {'name': 'd0', 'seed': step}, metrics)


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: np.asarray(x).dtype, a) == jax.tree.map(lambda x: np.asarray(x).dtype, b)


@pytest.mark.parametrize('ema_decay', [0.998, 0.0], ids=['with an average', 'without'])
def test_what_is_restored_is_what_was_saved_to_the_bit(tmp_path, ema_decay):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7, saved=state(7, ema_decay))
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(7, state(0, ema_decay))
    assert_same(restored.state, state(7, ema_decay))
    assert restored.data_position == {'next_index': 7}


def test_the_config_is_in_every_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    checkpoints.close()
    assert '"seed":7' in (tmp_path / 'checkpoints/7/config/metadata').read_text().replace(' ', '')


def test_the_last_ones_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, ap in enumerate([0.1, 0.9, None, 0.5, None, None], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 5, 6]
    again = Checkpoints(tmp_path)
    assert (again.latest_step(), again.best_step()) == (6, 2)
    assert_same(again.restore(2, state()).state, state(2))


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, ap in enumerate([0.9, 0.1, 0.95, 0.2], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [3, 4]


def test_best_is_by_the_metric_that_was_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, best='eval/AP50')
    for step, ap in enumerate([0.1, 0.9, 0.5], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 3]
    assert load_variables(tmp_path, 'eval/AP50')[0] == 1
    assert load_variables(tmp_path, 'eval/AP')[0] == 3  # of those that are left


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, ap in enumerate([0.3, np.nan, 0.2], start=1):
        save(checkpoints, step, ap)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 3] and Checkpoints(tmp_path).best_step() == 1


def test_before_the_first_evaluation_the_latest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (None, None)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.close()
    assert Checkpoints(tmp_path).best_step() == 2


def test_the_average_is_what_is_deployed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, ap=0.5)
    save(checkpoints, 2, ap=0.4)
    checkpoints.close()
    step, variables = load_variables(tmp_path, 'eval/AP')
    assert step == 1
    assert_same(variables, state(1).ema)


def test_without_an_average_the_variables_are_deployed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, saved=state(1, ema_decay=0.0))
    checkpoints.close()
    assert_same(load_variables(tmp_path, 'eval/AP')[1], state(1).variables)


@pytest.mark.parametrize('wanted', [state(width=4), state(ema_decay=0.0)], ids=['another shape', 'another tree'])
def test_the_state_of_another_model_is_refused(tmp_path, wanted):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    checkpoints.close()
    with pytest.raises(UserError, match=r'checkpoints/3 holds the state of another model .*choose another --workdir'):
        Checkpoints(tmp_path).restore(3, wanted)


def test_where_there_is_no_checkpoint_the_message_says_so(tmp_path):
    assert not has_checkpoints(tmp_path)
    with pytest.raises(UserError, match='has no checkpoints: give the --workdir of a training run'):
        load_variables(tmp_path, 'eval/AP')
    assert list(tmp_path.iterdir()) == []
    Checkpoints(tmp_path).close()
    assert list(tmp_path.iterdir()) == []  # the first save makes the folder
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='has no checkpoints'):
        load_variables(tmp_path, 'eval/AP')


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    """What a run leaves that is killed in its first save."""
    saved = Checkpoints(tmp_path / 'saved')
    save(saved, 4, ap=0.5)
    saved.close()
    killed = tmp_path / 'killed'
    unfinished = killed / 'checkpoints/4.orbax-checkpoint-tmp'
    shutil.copytree(tmp_path / 'saved/checkpoints/4', unfinished)
    (unfinished / 'metrics/metrics').write_text('{"eval/A')
    assert not has_checkpoints(killed)
    with pytest.raises(UserError, match='has no checkpoints'):
        load_variables(killed, 'eval/AP')
    assert unfinished.exists() and not (killed / 'checkpoints-damaged').exists()  # whoever reads changes nothing
    checkpoints = Checkpoints(killed)
    assert checkpoints.restore_latest(state()) is None
    assert not unfinished.exists()
    save(checkpoints, 4)
    checkpoints.close()
    assert has_checkpoints(killed) and steps_in(killed) == [4]


def test_the_older_one_stays_until_all_of_the_newer_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut may come at any time."""
    synced, there = [], []

    def fsync(descriptor):
        synced.append(str(Path(f'/proc/self/fd/{descriptor}').readlink()))
        there.append(steps_in(tmp_path))

    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    checkpoints.check(wait=True)
    save(checkpoints, 2)
    checkpoints._manager.wait_until_finished()
    assert steps_in(tmp_path) == [1, 2]
    monkeypatch.setattr(os, 'fsync', fsync)
    checkpoints.check(wait=True)
    assert steps_in(tmp_path) == [2]
    assert there and all(steps == [1, 2] for steps in there)
    folder = tmp_path / 'checkpoints'
    assert {str(path) for path in (folder, folder / '2', *(folder / '2').rglob('*'))} <= set(synced)


@pytest.mark.parametrize('error', [KeyError('gs://'), RuntimeError('writer'), OSError(errno.EIO, 'broken')])
def test_whatever_the_writer_raises_is_a_refused_save(tmp_path, monkeypatch, error):
    checkpoints, wait = Checkpoints(tmp_path), ocp.CheckpointManager.wait_until_finished

    def refuse(*_, **__):
        raise error

    def wait_and_refuse(self):
        wait(self)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, 'save', refuse)
        with pytest.raises(UserError, match=r'the first checkpoint, of step 1, could not be written'):
            save(checkpoints, 1)
    assert steps_in(tmp_path) == []
    save(checkpoints, 2)
    checkpoints.check(wait=True)
    save(checkpoints, 3)
    monkeypatch.setattr(ocp.CheckpointManager, 'wait_until_finished', wait_and_refuse)
    with console.terminal.capture() as printed:
        checkpoints.check(wait=True)
    assert 'step 2 is safe' in ' '.join(printed.get().split())
    assert steps_in(tmp_path) == [2] and checkpoints.latest_step() == 2


# Damaged files.


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
    """A work directory with checkpoints of step 1 and 2, both evaluated, the second one better."""
    workdir = tmp_path_factory.mktemp('saved') / 'run'
    checkpoints = Checkpoints(workdir, keep=2)
    save(checkpoints, 1, ap=0.3)
    save(checkpoints, 2, ap=0.4)
    checkpoints.close()
    return workdir


def files_of_newest(workdir):
    folder = workdir / 'checkpoints/2'
    return sorted(
        str(path.relative_to(workdir)) for path in folder.rglob('*') if path.stat().st_size and path.is_file()
    )


@pytest.mark.parametrize('part', slow_but([0.0, 0.5, 1.0], 0.5))
def test_whatever_file_is_truncated_only_whole_states_are_restored(two_saved, tmp_path, part):
    """The step of the checkpoint decides which one it was: of the state of step s the seed is s."""
    set_aside = set()
    for file in files_of_newest(two_saved):
        workdir = shutil.copytree(two_saved, tmp_path / 'run')
        with (workdir / file).open('r+b') as opened:
            opened.truncate(int(part * ((workdir / file).stat().st_size - 1)))
        checkpoints = Checkpoints(workdir, keep=2)
        step, restored = checkpoints.restore_latest(state())
        checkpoints.close()
        assert_same(restored.state, state(step))
        assert restored.data_position == {'next_index': step}
        if step == 1:
            assert (workdir / 'checkpoints-damaged/2').is_dir()
            assert steps_in(workdir) == [1]
            set_aside.add(file.split('/')[2])
        shutil.rmtree(workdir)
    assert set_aside >= {'state', 'data', 'contents'}  # without its metrics a checkpoint still continues


def test_a_changed_bit_is_noticed_and_the_message_says_what_was_done(two_saved, tmp_path):
    workdir = shutil.copytree(two_saved, tmp_path / 'run')
    array = max((workdir / 'checkpoints/2/state/d').iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=r'checkpoints/2 is damaged \(.*\): move it away to use the next best one'):
        load_variables(workdir, 'eval/AP')
    with console.terminal.capture() as printed:
        step, _ = Checkpoints(workdir).restore_latest(state())
    assert step == 1
    assert 'WARNING: the checkpoint of step 2 is damaged (' in printed.get()
    assert f'): moved to {workdir}/checkpoints-damaged/2' in ' '.join(printed.get().split())


def test_an_array_that_is_not_what_was_saved_is_noticed_where_all_files_are_well_formed(two_saved, tmp_path):
    workdir = shutil.copytree(two_saved, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints/2/state')
    shutil.copytree(workdir / 'checkpoints/1/state', workdir / 'checkpoints/2/state')
    with pytest.raises(DamagedError, match='is not what was saved'):
        Checkpoints(workdir).restore(2, state())
    with pytest.raises(UserError, match='is not what was saved'):
        load_variables(workdir, 'eval/AP')


REFUSALS = {
    'too many open files': OSError(errno.EMFILE, 'Too many open files'),
    'stale': OSError(errno.ESTALE, 'Stale file handle'),
    'told by TensorStore': ValueError("UNKNOWN: Error opening file [os_error_code='24'] [source locations='a.cc:1']"),
    'no memory': MemoryError(),
    'no permission': PermissionError(errno.EACCES, 'Permission denied'),
}


@pytest.mark.parametrize('error', REFUSALS.values(), ids=REFUSALS)
def test_a_system_that_refuses_to_read_is_no_damage(two_saved, tmp_path, monkeypatch, error):
    workdir = shutil.copytree(two_saved, tmp_path / 'run')
    checkpoints = Checkpoints(workdir, keep=2)

    def refuse(*args, **kwargs):
        raise ValueError('cannot restore') from error

    monkeypatch.setattr(ocp.CheckpointManager, 'restore', refuse)
    with pytest.raises(UserError, match=r'checkpoints/2 cannot be read \(.*\): nothing was changed; fix the cause'):
        checkpoints.restore_latest(state())
    assert steps_in(workdir) == [1, 2] and not (workdir / 'checkpoints-damaged').exists()


def test_with_no_file_left_to_open_nothing_is_moved(two_saved, tmp_path):
    """The real thing, in a process of its own: nothing else can go on without files."""
    workdir = shutil.copytree(two_saved, tmp_path / 'run')
    code = """
import os, resource, sys
from pathlib import Path
from effdet_jax.errors import UserError
from effdet_jax.records.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
open_files = len(os.listdir('/proc/self/fd'))
resource.setrlimit(resource.RLIMIT_NOFILE, (open_files - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    checkpoints.restore_latest({})
except UserError as error:
    print(error, flush=True)
os._exit(0)
"""
    assert 'checkpoints/2 cannot be read (Too many open files): nothing was changed' in printed_by(code, workdir)
    assert steps_in(workdir) == [1, 2] and not (workdir / 'checkpoints-damaged').exists()


def test_a_reader_of_a_damaged_metric_moves_nothing(two_saved, tmp_path):
    """The run may be going on in another process."""
    workdir = shutil.copytree(two_saved, tmp_path / 'run')
    (workdir / 'checkpoints/2/metrics/metrics').write_text('{"eval/A')
    assert load_variables(workdir, 'eval/AP')[0] == 1
    assert steps_in(workdir) == [1, 2]


def test_where_all_are_damaged_nothing_starts_from_zero(two_saved, tmp_path):
    workdir = shutil.copytree(two_saved, tmp_path / 'run')
    for step in (1, 2):
        (workdir / f'checkpoints/{step}/state/manifest.ocdbt').write_bytes(b'')
    message = r'has no intact checkpoint: repair one in .*checkpoints-damaged and move it back, or start anew'
    with pytest.raises(UserError, match=message):
        Checkpoints(workdir).restore_latest(state())
    assert Checkpoints(tmp_path / 'nothing').restore_latest(state()) is None


# A full disk.


def test_a_full_disk_costs_no_checkpoint_and_the_next_save_tries_again(tmp_path):
    large = state(3, width=100_000)
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, ap=0.5)
    checkpoints.check(wait=True)
    with full_disk(50_000), console.terminal.capture() as printed:
        save(checkpoints, 2, ap=0.6, saved=large)  # some files are written, others are not
        checkpoints.check(wait=True)
        assert steps_in(tmp_path) == [1]
        assert checkpoints.latest_step() == 1
    warning = (
        'WARNING: the checkpoint of step 2 could not be written (File too large): training goes on, step 1 is safe'
    )
    assert warning in ' '.join(printed.get().split())
    save(checkpoints, 3, ap=0.4, saved=large)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 3]
    assert_same(Checkpoints(tmp_path).restore(3, large).state, large)


def test_a_run_that_cannot_save_at_all_ends(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    message = r'the first checkpoint, of step 7, could not be written \(.*File too large\): free up space on the'
    with full_disk(10), pytest.raises(UserError, match=message):
        save(checkpoints, 7)
        checkpoints.check(wait=True)


def test_a_last_checkpoint_that_could_not_be_written_is_no_success(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.check(wait=True)
    with full_disk(10), pytest.raises(UserError, match=r'the last checkpoint could not .* continues from step 1'):
        save(checkpoints, 2)
        checkpoints.close()
