"""Checkpoints of a run: state, data position, config and metrics, saved together by Orbax in the background.

Orbax writes to a temporary folder and renames it at the end, so an interrupted save never looks like a checkpoint.
Later damage is detected with `contents`: the shape and checksum of every array, computed from memory before the save.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from effdet_jax.errors import UserError
from effdet_jax.records import integrity
from effdet_jax.records.console import warn
from effdet_jax.records.deployed import deployed
from effdet_jax.records.files import sync_tree
from effdet_jax.records.integrity import Contents, DamagedError


class Restored(NamedTuple):
    state: Any
    data_position: dict[str, Any]


class Checkpoints:
    """`checkpoints/<step>/` in a work directory: the best checkpoint by a metric, and the last `keep`.

    Used by one process. On several hosts, the first host reads and writes, and sends the others what it read.
    """

    def __init__(self, workdir: Path, *, keep: int = 1, best: str = 'eval/AP') -> None:
        """`best` names a metric; the checkpoint with its largest value is never deleted."""
        self._workdir, self._keep, self._best = workdir, keep, best
        self.folder = (workdir / 'checkpoints').absolute()
        self._saving_step: int | None = None
        self._save_error = ''  # why the last save failed
        self._manager = self._open()

    def save(
        self,
        step: int,
        state: Any,
        data_position: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies `state` (NumPy leaves) and saves it in the background. `metrics`: only after an evaluation.

        If the disk refuses and an older checkpoint exists, a warning is printed and training goes on.

        Raises:
          UserError: if the disk refuses and there is no older checkpoint.
        """
        self.check(wait=True)
        state = jax.tree.map(np.asarray, state)  # Orbax would return a NumPy scalar as a Python number
        contents = integrity.contents_of(state)
        documents = {'data': data_position, 'config': config, 'contents': contents, 'metrics': metrics}
        saved = {name: ocp.args.JsonSave(dict(content)) for name, content in documents.items() if content is not None}
        self._saving_step = step
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), **saved))
        except Exception as error:  # Orbax and TensorStore raise many types when the disk refuses
            self._handle_failed_save(error)

    def check(self, wait: bool = False) -> None:
        """Warns if the save in the background has failed. Returns at once, unless told to `wait` until it ends.

        Raises:
          UserError: as `save`.
        """
        if self._saving_step is None or not (wait or not self._manager.is_saving_in_progress()):
            return
        try:
            self._manager.wait_until_finished()
            sync_tree(self.folder / str(self._saving_step))  # Orbax syncs only the arrays
        except Exception as error:
            self._handle_failed_save(error)
            return
        self._saving_step, self._save_error = None, ''
        kept = {self.best_step(), *sorted(self._manager.all_steps())[-self._keep :]}
        for step in self._manager.all_steps():
            if step not in kept:  # deleted only now: a power cut must not leave us without any checkpoint
                self._manager.delete(step)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; the last of equal ones; the latest step if none was evaluated."""
        scores = {step: self._score(step) for step in self._manager.all_steps()}
        evaluated = [step for step, score in scores.items() if not math.isnan(score)]
        return max(evaluated, key=lambda step: (scores[step], step), default=self.latest_step())

    def restore_latest(self, state_like: Any) -> tuple[int, Restored] | None:
        """(step, state and data position) of the newest intact checkpoint, or None if nothing was ever saved.

        Moves damaged checkpoints to `checkpoints-damaged/` with a warning, and removes what an interrupted save left.
        Only for the process that owns the work directory.

        Raises:
          UserError: if all are damaged, one cannot be read, or one holds the state of another model.
        """
        self._remove_unfinished()
        moved_to = None
        while (step := self.latest_step()) is not None:
            try:
                return step, self.restore(step, state_like)
            except DamagedError as damage:
                moved_to = integrity.move_away(self.folder / str(step), damage)
                self._manager.close()
                self._manager = self._open()
        if moved_to:
            raise UserError(
                f'{self._workdir} has no intact checkpoint: repair one in {moved_to.parent} and move it back, or '
                'start anew in another --workdir'
            )
        return None

    def restore(self, step: int, state_like: Any) -> Restored:
        """State and data position of a checkpoint. `state_like` has the tree, shapes and types of the state.

        Raises:
          DamagedError: if the files differ from what was saved.
          UserError: if it holds the state of another model, or the system refuses to read it.
        """
        contents = self._contents(step)
        if difference := integrity.first_difference(contents, state_like):
            raise UserError(
                f'{self.folder / str(step)} holds the state of another model ({difference}): choose another --workdir'
            )
        integrity.read_all_files(self.folder / str(step))
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(state_like), data=ocp.args.JsonRestore())
        restored = self._read(step, items)
        integrity.check_sums(restored.state, contents)
        return Restored(restored.state, restored.data)

    def variables(self, step: int) -> dict[str, Any]:
        """The weights to deploy, {'params', 'batch_stats'} in NumPy; see records/deployed.py.

        Raises:
          DamagedError: if the files differ from what was saved.
          UserError: if the system refuses to read them.
        """
        contents = self._contents(step)
        integrity.read_all_files(self.folder / str(step))
        with integrity.reading(self.folder / str(step)):
            tree = self._manager.item_metadata(step).state.tree  # type: ignore[union-attr]
        name, variables = deployed(tree)
        wanted = ocp.args.PyTreeRestore(item={name: variables}, partial_restore=True)
        restored = self._read(step, ocp.args.Composite(state=wanted)).state
        integrity.check_sums(restored, contents)
        return restored[name]

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: if the last checkpoint could not be written.
        """
        self.check(wait=True)
        self._manager.close()
        if self._save_error:
            raise UserError(
                f'the last checkpoint could not be written ({self._save_error}): free up space on the disk of '
                f'{self._workdir} and start again; the run continues from step {self.latest_step()}'
            )

    def _open(self) -> ocp.CheckpointManager:
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(  # Orbax deletes nothing: `check` does, by `best_step`
            lightweight_initialize=True,  # otherwise it reads the metrics of all checkpoints and fails at a damaged one
            create=False,  # the first save creates the folder, so a run that cannot start leaves none behind
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'process{process}'
            ),
        )
        handlers = {'state': ocp.PyTreeCheckpointHandler()}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ('data', 'config', 'contents')}
        handlers['metrics'] = ocp.JsonCheckpointHandler('metrics')  # Orbax's own name for this file
        return _Manager(self.folder, item_names=tuple(handlers), item_handlers=handlers, options=options)

    def _contents(self, step: int) -> Contents:
        return self._read(step, ocp.args.Composite(contents=ocp.args.JsonRestore())).contents

    def _read(self, step: int, items: Any) -> Any:
        with integrity.reading(self.folder / str(step)):
            return self._manager.restore(step, args=items)

    def _score(self, step: int) -> float:
        """The metric that decides which checkpoint is best; NaN if it was not evaluated."""
        try:
            return float(json.loads((self.folder / str(step) / 'metrics' / 'metrics').read_text())[self._best])
        except (OSError, ValueError, LookupError, TypeError):  # not evaluated, or damaged
            return math.nan

    def _remove_unfinished(self) -> None:
        with contextlib.suppress(OSError):  # leftovers only take up space
            for attempt in self.folder.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(attempt, ignore_errors=True)

    def _handle_failed_save(self, error: Exception) -> None:
        """Removes the failed attempt, to free space for the next one, and warns."""
        reason, step, self._saving_step = integrity.one_line(error), self._saving_step, None
        self._remove_unfinished()
        shutil.rmtree(self.folder / str(step), ignore_errors=True)  # renamed already, but not safely on the disk
        self._manager = self._open()  # the old manager believes that the new checkpoint exists
        safe = self.latest_step()
        if safe is None:
            raise UserError(
                f'the first checkpoint, of step {step}, could not be written ({reason}): free up space on the disk of '
                f'{self._workdir}, or choose another --workdir'
            ) from error
        self._save_error = reason
        warn(
            f'the checkpoint of step {step} could not be written ({reason}): training goes on, step {safe} is safe, '
            'and the next save tries again'
        )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Always False: the loop asks jax itself (runtime/signals.py), and a second question would mislead jax."""
        return False


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has finished saving a checkpoint there. Only looks."""
    return any(path.name.isdecimal() for path in (workdir / 'checkpoints').glob('*'))


def load_variables(workdir: Path, best: str) -> tuple[int, dict[str, Any]]:
    """(step, weights) of a run's best checkpoint by the metric `best`, which is its config.checkpoint.best.

    Raises:
      UserError: if there is none, it is damaged, or it cannot be read.
    """
    checkpoints = Checkpoints(workdir, best=best)
    if (step := checkpoints.best_step()) is None:
        raise UserError(f'{workdir} has no checkpoints: give the --workdir of a training run that has saved one')
    try:
        variables = checkpoints.variables(step)
    except DamagedError as damage:
        raise UserError(
            f'{checkpoints.folder / str(step)} is damaged ({damage}): move it away to use the next best one'
        ) from damage
    checkpoints.close()
    return step, variables
