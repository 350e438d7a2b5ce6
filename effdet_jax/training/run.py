"""A run: everything that its config describes, ready for the loop, and the state in which its work directory stands."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effdet_jax import config as run_config
from effdet_jax import data
from effdet_jax.errors import UserError, explaining_write_errors
from effdet_jax.records.checkpoint import Checkpoints
from effdet_jax.records.console import info
from effdet_jax.records.files import locked
from effdet_jax.runtime import devices
from effdet_jax.training.state import TrainState


class RunData(NamedTuple):
    """What a run learns from, and what it is evaluated on."""

    batch_size: int  # of all hosts
    batches: Iterator[dict[str, np.ndarray]]  # of this host; Grain's, which knows its position
    unreadable: data.Unreadable
    train_source: data.Source
    eval_source: data.Source
    identity: dict[str, Any]  # fingerprint and number of the training images: saved in checkpoints beside the position
    accepted: str  # fingerprint of other data that the run may continue with


class RecordOptions(NamedTuple):
    """What a run leaves behind."""

    keep: int  # checkpoints, beside the best one
    best: str  # the metric that decides which one that is
    num_pictures: int  # of each evaluation
    wandb: str  # project of Weights & Biases; '' for none
    max_skipped: int  # steps in a row; then the run ends


class Timetable(NamedTuple):
    """Which step does what. Steps count from 1."""

    total_steps: int
    unfreeze_step: float  # how many steps are done before all parameters are trained
    log_interval: int
    evaluations: set[int]
    saves: set[int]


@dataclasses.dataclass
class Run:
    """`build.build_run` makes it."""

    name: str
    config: Any  # a ConfigDict, to be saved
    workdir: Path
    data: RunData
    timetable: Timetable
    records: RecordOptions
    state_like: TrainState  # NumPy arrays of its shapes and types, which take no memory
    initial_state: Callable[[], TrainState]
    train_step: Callable  # (state, batch, frozen) -> (state, metrics), on all devices
    evaluate: Callable  # variables -> (metrics, detections by image)
    # Known once `resumed` has taken the work directory:
    first_step: int = 0  # how many steps are done
    checkpoints: Checkpoints | None = None  # on the first host only

    def save(self, step: int, state: TrainState, scores: dict[str, float] | None) -> None:
        """A checkpoint of this step. `scores`: metrics of an evaluation of this very state."""
        if self.checkpoints:
            position = self.data.batches.get_state() | self.data.identity  # type: ignore[attr-defined]
            config = run_config.to_json(self.config)
            self.checkpoints.save(step, devices.first_replica(state), position, config, scores)


@contextlib.contextmanager
def resumed(run: Run) -> Iterator[TrainState]:
    """Takes the work directory and gives the replicated state at which it stands; in the end waits for checkpoints.

    Raises:
      UserError: if another process has the work directory, it cannot be written, or its run is not this one.
    """
    with contextlib.ExitStack() as exits:
        if devices.is_first_host():
            exits.enter_context(locked(run.workdir))
            run.checkpoints = Checkpoints(run.workdir, keep=run.records.keep, best=run.records.best)
            exits.enter_context(contextlib.closing(run.checkpoints))
        yield devices.replicate(_first_state(run))  # no name here: it would stay in memory during the run
    devices.meet('saved')  # no host leaves before the last checkpoint is written


def _first_state(run: Run) -> TrainState:
    """The state of the newest checkpoint, or the initial one. Saves the config once it is clear that it fits."""
    place = state = None
    if run.checkpoints and (restored := run.checkpoints.restore_latest(run.state_like)):
        step, (state, position) = restored
        _check_place(run, step, {name: position.pop(name) for name in run.data.identity if name in position})
        place = step, position
    place = devices.gather_objects(place)[0]
    if run.checkpoints:
        with explaining_write_errors(run.workdir, 'make room, or choose another --workdir'):
            run_config.save(run.config, run.workdir)
    if not place:
        return run.initial_state()
    run.first_step, position = place
    run.data.batches.set_state(position)  # type: ignore[attr-defined]
    info(f'continuing {run.workdir} from step {run.first_step} of {run.timetable.total_steps}')
    return devices.from_first_host(state, run.state_like)


def _check_place(run: Run, step: int, saved: dict[str, Any]) -> None:
    """Checks that a run at `step` can continue with its data and epochs. `saved`: `RunData.identity` at that step.

    Raises:
      UserError: if it has done more steps than there are, or the training data changed and the user has not agreed.
    """
    if step > run.timetable.total_steps:
        raise UserError(
            f'{run.workdir} has done {step} steps, and with this config there are {run.timetable.total_steps}: raise '
            'config.train.epochs, or evaluate it with --mode=eval'
        )
    fingerprint = run.data.identity['fingerprint']
    if saved.get('fingerprint', fingerprint) == fingerprint:  # checkpoints of earlier versions have none
        return
    before, now = saved['images'], run.data.identity['images']
    images = f'{before} images then, {now} now' if before != now else f'{now} images, but other files, boxes or labels'
    if run.data.accepted != fingerprint:
        raise UserError(
            f'the training data of {run.workdir} have changed since step {step} ({images}): put the old data back, or '
            f'continue with the new ones by --config.dataset.accepted_fingerprint={fingerprint}'
        )
    info(f'note: the training data have changed since step {step} ({images})')
