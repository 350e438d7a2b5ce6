"""Checkpoints of a run: state, data position, config and metrics are one thing, written by Orbax in the background.

Orbax writes into a folder of another name and renames it when all is there, so an interrupted save leaves nothing that
looks like a checkpoint. What happens to the files afterwards is noticed by `contents`: the shape and the checksum of
every array, taken from memory before it was written.
"""

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers

from effdet_jax.errors import UserError
from effdet_jax.records.deployed import deployed
from effdet_jax.records.metrics import warn

Contents = dict[str, list[Any]]  # path in the tree -> [shape, CRC-32]


class Restored(NamedTuple):
    state: Any
    data_position: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint whose files are not what was saved."""


class Checkpoints:
    """`checkpoints/<step>/` of a work directory: the best one by a metric, and the last `keep`.

    Of one process alone, also in a run on several hosts, where the first host writes and tells the others what it read.
    """

    def __init__(self, workdir: Path, *, keep: int = 1, best: str = 'eval/AP') -> None:
        """`best` names the metric whose largest value marks the checkpoint that is never deleted."""
        self._workdir, self._keep, self._best = workdir, keep, best
        self.folder = (workdir / 'checkpoints').absolute()
        self._in_writing: int | None = None
        self._unsaved = ''  # why the last save failed
        self._manager = self._open()

    def save(
        self,
        step: int,
        state: Any,
        data_position: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Returns once `state` (NumPy leaves) is copied; the rest happens in the background. `metrics` if evaluated.

        A disk that refuses is no error while an older checkpoint is safe: a warning is printed, and the next save tries
        again.

        Raises:
          UserError: where the disk refuses and no older checkpoint is safe.
        """
        self.check(wait=True)
        state = jax.tree.map(np.asarray, state)  # Orbax would return a NumPy scalar as a Python number
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(dict(data_position)),
            config=ocp.args.JsonSave(dict(config)),
            contents=ocp.args.JsonSave(_contents(state)),
        )
        self._in_writing = step
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None)
        except (OSError, ValueError) as error:
            self._refused(error)

    def check(self, wait: bool = False) -> None:
        """Warns where the save in the background has failed; a glance unless it is to `wait` for the end of it.

        Raises:
          UserError: as `save`.
        """
        if self._in_writing is None or not (wait or not self._manager.is_saving_in_progress()):
            return
        try:
            self._manager.wait_until_finished()
            self._in_writing, self._unsaved = None, ''
        except (OSError, ValueError) as error:
            self._refused(error)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; the latest where none was evaluated."""
        best = self._manager.best_step()
        return self._manager.latest_step() if best is None else best

    def restore_latest(self, state_like: Any) -> tuple[int, Restored] | None:
        """(step, what is needed to go on) of the newest checkpoint that is whole; None where nothing was ever saved.

        DamagedError ones are set aside, with a message. Only for the process that owns the work directory.

        Raises:
          UserError: where all are damaged, or one is whole and holds another state.
        """
        set_aside = None
        while (step := self.latest_step()) is not None:
            try:
                return step, self.restore(step, state_like)
            except DamagedError as damage:
                set_aside = _set_aside(self.folder / str(step), damage)
                self._manager.close()
                self._manager = self._open()
        if set_aside:
            raise UserError(
                f'{self._workdir} holds no whole checkpoint: mend those in {set_aside.parent}, or start anew in '
                'another --workdir'
            )
        return None

    def restore(self, step: int, state_like: Any) -> Restored:
        """Everything needed to go on. `state_like` has the tree, shapes and types of the state.

        Raises:
          DamagedError: where the files are not what was saved.
          UserError: where the checkpoint holds another state.
        """
        contents = self._contents(step)
        wanted = {name: list(np.shape(leaf)) for name, leaf in _leaves(state_like)}
        if reason := _difference({name: shape for name, (shape, _) in contents.items()}, wanted):
            raise UserError(
                f'{self.folder / str(step)} does not hold the state of this model ({reason}): choose another --workdir'
            )
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(state_like), data=ocp.args.JsonRestore())
        _check_arrays(self.folder / str(step) / 'state')
        restored = self._read(step, items)
        _compare(restored.state, contents)
        return Restored(restored.state, restored.data)

    def variables(self, step: int) -> dict[str, Any]:
        """The weights to deploy, {'params', 'batch_stats'} in NumPy: records/deployed.py.

        Raises:
          DamagedError: where the files are not what was saved.
        """
        contents = self._contents(step)
        _check_arrays(self.folder / str(step) / 'state')
        try:
            tree = self._manager.item_metadata(step).state.tree  # type: ignore[union-attr]
        except Exception as error:
            raise DamagedError(_one_line(error)) from error
        name, variables = deployed(tree)
        wanted = ocp.args.PyTreeRestore(item={name: variables}, partial_restore=True)
        restored = self._read(step, ocp.args.Composite(state=wanted)).state
        _compare(restored, contents)
        return restored[name]

    def close(self) -> None:
        """Waits for what is still being written.

        Raises:
          UserError: where the last checkpoint could not be written.
        """
        self.check(wait=True)
        self._manager.close()
        if self._unsaved:
            raise UserError(
                f'the last checkpoint could not be written ({self._unsaved}): make room on the disk of {self._workdir} '
                f'and start again; the run continues from step {self.latest_step()}'
            )

    def _open(self) -> ocp.CheckpointManager:
        def metric(metrics: Mapping[str, float]) -> float:
            return metrics[self._best]

        policies = [
            checkpoint_managers.LatestN(self._keep),
            checkpoint_managers.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False),
        ]
        for path in self.folder.glob('[0-9]*/metrics/metrics'):  # Orbax would read them all, and fail
            try:
                json.loads(path.read_text())
            except ValueError as error:
                _set_aside(path.parents[1], DamagedError(f'metrics: {_one_line(error)}'))
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=False,  # the first save makes the folder: a run that cannot start leaves none behind
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'process{process}'
            ),
        )
        handlers = {'state': ocp.PyTreeCheckpointHandler()}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ('data', 'config', 'contents')}
        return _Manager(self.folder, item_names=tuple(handlers), item_handlers=handlers, options=options)

    def _contents(self, step: int) -> Contents:
        return self._read(step, ocp.args.Composite(contents=ocp.args.JsonRestore())).contents

    def _read(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # whatever a parser or a decoder makes of damaged files
            raise DamagedError(_one_line(error)) from error

    def _refused(self, error: Exception) -> None:
        """The disk took no checkpoint: clears away the attempt, so that there may be room for the next one."""
        reason, step, self._in_writing = _one_line(error), self._in_writing, None
        for attempt in self.folder.glob('*.orbax-checkpoint-tmp*'):
            shutil.rmtree(attempt, ignore_errors=True)
        self._manager = self._open()  # it believes that the new one is there and that old ones are gone
        safe = self.latest_step()
        if safe is None:
            raise UserError(
                f'the first checkpoint, of step {step}, could not be written ({reason}): make room on the disk '
                f'of {self._workdir}, or choose another --workdir'
            ) from error
        self._unsaved = reason
        warn(
            f'the checkpoint of step {step} could not be written ({reason}): training goes on, step '
            f'{safe} is safe, and the next save tries again'
        )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks jax (training/preemption.py), and a step that it has left behind would mislead jax."""
        return False


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved anything there. Looks only."""
    return any((workdir / 'checkpoints').glob('[0-9]*'))


def load_variables(workdir: Path) -> tuple[int, dict[str, Any]]:
    """(step, weights) of the best checkpoint of a run.

    Raises:
      UserError: where there is none, or it is damaged.
    """
    if not has_checkpoints(workdir):
        raise UserError(f'{workdir} holds no checkpoints: give the --workdir of a training run that has saved one')
    checkpoints = Checkpoints(workdir)
    step = checkpoints.best_step()
    assert step is not None
    try:
        variables = checkpoints.variables(step)
    except DamagedError as damage:
        raise UserError(
            f'{checkpoints.folder / str(step)} is damaged ({damage}): move it away, and the next best one is used'
        ) from damage
    checkpoints.close()
    return step, variables


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf): .variables['params'] and ['variables']['params'] are the same path 'variables/params'."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _contents(tree: Any) -> Contents:
    return {name: [list(leaf.shape), zlib.crc32(leaf.tobytes())] for name, leaf in _leaves(tree)}


def _check_arrays(folder: Path) -> None:
    """Reads all files once, one after the other: Orbax, reading them at once, prints a traceback for each bad one."""
    try:
        store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': f'file://{folder}/'}).result()
        for key in store.list().result():
            store.read(key).result()
    except ValueError as error:
        raise DamagedError(_one_line(error)) from error


def _compare(tree: Any, contents: Contents) -> None:
    changed = [name for name, leaf in _leaves(tree) if zlib.crc32(leaf.tobytes()) != contents[name][1]]
    if changed:
        raise DamagedError(f'{changed[0]} is not what was saved')


def _difference(found: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str:
    """What the first array is that differs, '' where none does."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            return f'{name}: {found.get(name, "nothing")} there, {wanted.get(name, "nothing")} wanted'
    return ''


def _set_aside(folder: Path, damage: DamagedError) -> Path:
    """Renames the folder of a damaged checkpoint to one that is never looked at again."""
    place = folder.parents[1] / 'checkpoints-damaged' / folder.name
    while place.exists():
        place = place.with_name(place.name + '-again')
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
    warn(f'the checkpoint of step {folder.name} is damaged ({damage}): set aside as {place}')
    return place


def _one_line(error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    system = re.search(r'([^:]+) \[os_error_code', text)  # what TensorStore says of itself comes before and behind
    return system[1].strip() if system else text[:200]
