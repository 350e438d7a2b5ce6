"""Checkpoints of a run: state, data position, config and metrics are one thing, written by Orbax in the background.

Orbax writes into a folder of another name and renames it when all is there, so an interrupted save leaves nothing that
looks like a checkpoint. What happens to the files afterwards is noticed by `contents`: the shape and the checksum of
every array, taken from memory before it was written.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from effdet_jax.errors import UserError
from effdet_jax.records.console import warn
from effdet_jax.records.deployed import deployed
from effdet_jax.records.files import sync_tree

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
        documents = {'data': data_position, 'config': config, 'contents': _contents(state), 'metrics': metrics}
        saved = {name: ocp.args.JsonSave(dict(content)) for name, content in documents.items() if content is not None}
        self._in_writing = step
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), **saved))
        except Exception as error:  # whatever a writer makes of a disk that refuses
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
            sync_tree(self.folder / str(self._in_writing))  # Orbax does so with the arrays alone
        except Exception as error:
            self._refused(error)
            return
        self._in_writing, self._unsaved = None, ''
        kept = {self.best_step(), *sorted(self._manager.all_steps())[-self._keep :]}
        for step in self._manager.all_steps():
            if step not in kept:  # only now: an older one must outlive a power cut that the newest does not
                self._manager.delete(step)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric, of equal ones the last; the latest where none was evaluated."""
        scores = {step: self._score(step) for step in self._manager.all_steps()}
        evaluated = [step for step, score in scores.items() if not math.isnan(score)]
        return max(evaluated, key=lambda step: (scores[step], step), default=self.latest_step())

    def restore_latest(self, state_like: Any) -> tuple[int, Restored] | None:
        """(step, what is needed to go on) of the newest checkpoint that is whole; None where nothing was ever saved.

        Damaged ones are moved to `checkpoints-damaged`, with a message, and what an interrupted save has left is
        removed. Only for the process that owns the work directory.

        Raises:
          UserError: where all are damaged, the system refuses to read one, or one is whole and holds another state.
        """
        self._remove_unfinished()
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
          UserError: where the checkpoint holds another state, or the system refuses to read it.
        """
        contents = self._contents(step)
        wanted = {name: list(np.shape(leaf)) for name, leaf in _leaves(state_like)}
        if reason := _difference({name: shape for name, (shape, _) in contents.items()}, wanted):
            raise UserError(
                f'{self.folder / str(step)} does not hold the state of this model ({reason}): choose another --workdir'
            )
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(state_like), data=ocp.args.JsonRestore())
        self._check_arrays(step)
        restored = self._read(step, items)
        _compare(restored.state, contents)
        return Restored(restored.state, restored.data)

    def variables(self, step: int) -> dict[str, Any]:
        """The weights to deploy, {'params', 'batch_stats'} in NumPy: records/deployed.py.

        Raises:
          DamagedError: where the files are not what was saved.
          UserError: where the system refuses to read them.
        """
        contents = self._contents(step)
        self._check_arrays(step)
        with self._reading(step):
            tree = self._manager.item_metadata(step).state.tree  # type: ignore[union-attr]
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
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(  # it keeps all: `check` deletes, and `best_step` compares
            lightweight_initialize=True,  # else it reads the metrics of all checkpoints, and fails at a damaged one
            create=False,  # the first save makes the folder: a run that cannot start leaves none behind
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'process{process}'
            ),
        )
        handlers = {'state': ocp.PyTreeCheckpointHandler()}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ('data', 'config', 'contents')}
        handlers['metrics'] = ocp.JsonCheckpointHandler('metrics')  # the name that Orbax gives this file
        return _Manager(self.folder, item_names=tuple(handlers), item_handlers=handlers, options=options)

    def _contents(self, step: int) -> Contents:
        return self._read(step, ocp.args.Composite(contents=ocp.args.JsonRestore())).contents

    def _read(self, step: int, items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=items)

    def _score(self, step: int) -> float:
        """The metric that decides which one is best; NaN where there is none."""
        try:
            return float(json.loads((self.folder / str(step) / 'metrics' / 'metrics').read_text())[self._best])
        except (OSError, ValueError, LookupError, TypeError):  # not evaluated, or damaged
            return math.nan

    def _check_arrays(self, step: int) -> None:
        """Reads all files, one after the other: Orbax, reading them at once, prints a traceback for each bad one."""
        with self._reading(step):
            base = f'file://{self.folder}/{step}/state/'
            store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
            for key in store.list().result():
                store.read(key).result()

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Tells damaged files, a DamagedError, from a system that does not let us read them, a UserError."""
        try:
            yield
        except Exception as error:  # whatever a parser or a decoder makes of damaged files
            if reason := _refusal(error):
                raise UserError(
                    f'{self.folder / str(step)} cannot be read ({reason}): nothing was changed; start again when it can'
                ) from error
            raise DamagedError(_one_line(error)) from error

    def _remove_unfinished(self) -> None:
        with contextlib.suppress(OSError):  # it only takes up room
            for attempt in self.folder.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(attempt, ignore_errors=True)

    def _refused(self, error: Exception) -> None:
        """The disk took no checkpoint: clears away the attempt, so that there may be room for the next one."""
        reason, step, self._in_writing = _one_line(error), self._in_writing, None
        self._remove_unfinished()
        shutil.rmtree(self.folder / str(step), ignore_errors=True)  # there, but not safely on the disk
        self._manager = self._open()  # the old one believes that the new checkpoint is there
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
        """Never: the loop asks jax (runtime/signals.py), and a step that it has left behind would mislead jax."""
        return False


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved anything there, and finished saving it. Looks only."""
    return any(path.name.isdecimal() for path in (workdir / 'checkpoints').glob('*'))


def load_variables(workdir: Path, best: str) -> tuple[int, dict[str, Any]]:
    """(step, weights) of the best checkpoint of a run, by the metric `best`: its config.checkpoint.best.

    Raises:
      UserError: where there is none, it is damaged, or cannot be read.
    """
    checkpoints = Checkpoints(workdir, best=best)
    if (step := checkpoints.best_step()) is None:
        raise UserError(f'{workdir} holds no checkpoints: give the --workdir of a training run that has saved one')
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
    warn(f'the checkpoint of step {folder.name} is damaged ({damage}): moved to {place}')
    return place


def _refusal(error: BaseException | None) -> str:
    """Why the system did not let us read (too many open files, no memory, a stale handle, no permission).

    '' where it did: what was read, or is missing, is then to blame.
    """
    while error:
        told = re.search(r"os_error_code='?(\d+)", str(error))  # by TensorStore, in a ValueError
        number = int(told[1]) if told else getattr(error, 'errno', None)
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number:
            return '' if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR) else os.strerror(number)
        error = error.__cause__ or error.__context__
    return ''


def _one_line(error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    system = re.search(r'([^:]+) \[os_error_code', text)  # what TensorStore says of itself comes before and behind
    return system[1].strip() if system else text[:200]
