"""What the loop does beside training: it fetches metrics, writes the log, shows progress, and watches for incidents."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from time import perf_counter

import jax
import numpy as np

from effdet_jax import config as run_config
from effdet_jax.records.console import Progress, info
from effdet_jax.records.metrics import MetricsLog
from effdet_jax.records.sessions import record_session
from effdet_jax.records.wandb_run import WandbRun
from effdet_jax.runtime import devices, process
from effdet_jax.training import incidents
from effdet_jax.training.run import Run
from effdet_jax.training.state import TrainState

HEADLINE = ('AP', 'AP50', 'AP75')
COMPARED = ('train/loss', *(f'eval/{name}' for name in HEADLINE))  # columns of TensorBoard's HPARAMS tab
SHOWN = {'loss': 'loss', 'images/s': 'images_per_second', 'waiting': 'waiting_for_data'}  # in the progress bar


@contextlib.contextmanager
def bookkeeping(run: Run) -> Iterator['Bookkeeping']:
    """Opens the logs of a run at its `first_step`, and a progress bar."""
    is_first = devices.is_first_host()
    mirror = WandbRun(run.records.wandb, run.workdir) if run.records.wandb and is_first else None
    with (
        MetricsLog(run.workdir / devices.host_folder(), run.first_step, mirror) as log,
        Progress(run.timetable.total_steps, run.first_step, description='training') as progress,
    ):
        if is_first:
            record_session(run.workdir, run.first_step, devices.describe_devices())
        log.text('config', f'```json\n{run.config.to_json_best_effort(indent=2)}\n```')
        log.hyper_parameters(dict(run_config.flatten(run_config.to_json(run.config))), COMPARED)
        yield Bookkeeping(run, log, progress)


class Bookkeeping:
    """The methods are called by the loop, in this order, in every step that has something for them."""

    def __init__(self, run: Run, log: MetricsLog, progress: Progress) -> None:
        self._run, self._log, self._progress = run, log, progress
        self._watch = incidents.make_watch(run.data.train_source, run.workdir, run.records.max_skipped)
        self._pending: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []  # since the last line of the log
        self._counts: Counter[str] = Counter()
        self._stopwatch = Stopwatch()

    def next_batch(self) -> dict[str, np.ndarray]:
        with self._stopwatch.waiting():
            return next(self._run.data.batches)

    def add(self, step: int, metrics: dict[str, jax.Array], batch: Mapping[str, np.ndarray]) -> None:
        """A step was started. Waits for an earlier one, so that the host is never far ahead of the devices."""
        self._pending.append((step, metrics, batch['index']))
        self._counts['boxes_left_out'] += int(batch['dropped'].sum())  # more than config.dataset.max_boxes in an image
        self._counts['images_replaced'] += self._run.data.unreadable.count(batch['unreadable'])
        jax.block_until_ready(self._pending[-1 - devices.steps_ahead() :][0][1])
        if step == self._run.first_step + 1:
            info(f'compiled in {self._stopwatch.elapsed():.0f} s')
            process.give_back_memory()
            self._stopwatch.reset()
        else:
            self._stopwatch.count(self._run.data.batch_size)

    def log(self, step: int) -> None:
        """The means of all steps since the last line."""
        rows = incidents.fetch(self._pending)
        speed = {'images_per_second': self._stopwatch.per_second(), 'waiting_for_data': self._stopwatch.share_waited()}
        means = incidents.means_of_steps(rows) | speed | self._counts
        self._log.write(step, {f'train/{name}': mean for name, mean in means.items()})
        self._watch(rows, self._log)
        self._progress.update(step, {shown: means[name] for shown, name in SHOWN.items()})
        self._pending.clear()
        self._counts.clear()
        if self._run.checkpoints:
            self._run.checkpoints.check()
        self._stopwatch.reset()

    def log_evaluation(self, step: int, metrics: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        self._log.write(step, {f'eval/{name}': value for name, value in metrics.items()})
        self._log.pictures(step, pictures)
        info(f'step {step}  ' + '  '.join(f'{name} {metrics[name]:.3f}' for name in HEADLINE))
        self._stopwatch.reset()

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
        """A checkpoint; `metrics` if the state was evaluated. The log is on the disk before it."""
        self._log.sync()
        self._run.save(step, state, metrics and {f'eval/{name}': value for name, value in metrics.items()})
        self._stopwatch.reset()


class Stopwatch:
    """The rate of a loop, and the share of its time spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._start, self._waited, self._count = perf_counter(), 0.0, 0

    def count(self, images: int) -> None:
        self._count += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = perf_counter()
        yield
        self._waited += perf_counter() - start

    def elapsed(self) -> float:
        """Seconds since the last reset."""
        return perf_counter() - self._start

    def share_waited(self) -> float:
        """In [0, 1], since the last reset."""
        return self._waited / max(self.elapsed(), 1e-9)

    def per_second(self) -> float:
        """Images counted per second since the last reset."""
        return self._count / max(self.elapsed(), 1e-9)
