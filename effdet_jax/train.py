"""The training loop: restore -> step -> log -> evaluate -> save."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effdet_jax import config as run_config
from effdet_jax import data, evaluate, inspection
from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors, make_detect
from effdet_jax.model import build_model
from effdet_jax.records.checkpoint import Checkpoints, has_checkpoints
from effdet_jax.records.console import Progress, info, result
from effdet_jax.records.files import only_process
from effdet_jax.records.metrics import MetricsLog, Waiting, read_metrics
from effdet_jax.records.sessions import record_session
from effdet_jax.records.wandb_run import WandbRun, import_wandb
from effdet_jax.runtime import devices, process
from effdet_jax.runtime.signals import notices
from effdet_jax.training import incidents
from effdet_jax.training.optimizer import check_freeze, thaw_step
from effdet_jax.training.state import TrainState, arrays_like, init_state, init_variables, state_shapes
from effdet_jax.training.step import map_train_step
from effdet_jax.training.transfer import check_start, start_from
from effdet_jax.weights.names import shapes_of

HEADLINE = ('AP', 'AP50', 'AP75')


def train_and_evaluate(config: Any, workdir: Path) -> dict[str, float]:
    """Trains what `config` describes, or goes on where `workdir` stands; returns the metrics of the last evaluation.

    SIGTERM or SIGINT: finishes the step, saves, and returns {}.

    Raises:
      UserError: for anything in the config, the data or the work directory that the user can mend.
    """
    run = build(config, workdir)
    info(f'{run.name}: {run.total_steps} steps of {run.batch_size} images on {devices.describe_devices()}')
    pending, counts, waiting, metrics, found, stops = [], Counter(), Waiting(), {}, {}, False
    with (
        resumed(run, config) as state,
        MetricsLog(workdir / devices.host_folder(), run.first_step, run.open_mirror()) as log,
        Progress(run.total_steps, run.first_step, description='training') as progress,
        notices() as stop_is_asked,
    ):
        if devices.is_first_host():
            record_session(workdir, run.first_step, devices.describe_devices())
        log.text('config', f'```json\n{config.to_json_best_effort(indent=2)}\n```')
        log.hyper_parameters(dict(run_config.flatten(run.config)), COMPARED)
        for step in range(run.first_step + 1, run.total_steps + 1):
            with waiting:
                batch = next(run.batches)
            state, step_metrics = run.train_step(state, devices.shard(batch), step - 1 < run.thaw_step)
            pending.append((step, step_metrics, batch['index']))
            counts['boxes_left_out'] += int(batch['dropped'].sum())  # of images with more than config.dataset.max_boxes
            counts['images_replaced'] += run.unreadable.count(batch['unreadable'])
            jax.block_until_ready(pending[-1 - devices.steps_ahead() :][0][1])
            if step == run.first_step + 1:
                info(f'compiled in {waiting.elapsed():.0f} s')
                process.give_back_memory()
                waiting.reset()
            else:
                waiting.count(run.batch_size)

            stops = stop_is_asked(step)
            evaluates, saves = step in run.evaluation_steps, step in run.save_steps or stops
            # Logged before every save too: so no mean spans a restart, and a continued run logs the same numbers.
            if step % run.log_interval == 0 or saves:
                rows = incidents.fetch(pending)
                speed = {'images_per_second': waiting.per_second(), 'waiting_for_data': waiting.share()}
                means = incidents.means_of_steps(rows) | speed | counts
                log.write(step, {f'train/{name}': mean for name, mean in means.items()})
                run.watch(rows, log)
                progress.update(step, {shown: means[name] for shown, name in SHOWN.items()})
                pending.clear()
                counts.clear()
                run.check()
                waiting.reset()
            if evaluates:
                metrics, found = run.evaluate(state.best_variables)
                log.write(step, {f'eval/{name}': value for name, value in metrics.items()})
                log.pictures(step, evaluate.draw(run.eval_source, found, run.num_pictures))
                info(f'step {step}  ' + '  '.join(f'{name} {metrics[name]:.3f}' for name in HEADLINE))
            if saves:
                log.sync()
                run.save(step, state, {f'eval/{name}': value for name, value in metrics.items()} if evaluates else None)
            if evaluates or saves:
                waiting.reset()
            if stops:
                break
    if stops and step < run.total_steps:
        info(f'stopped at step {step} of {run.total_steps}, all saved in {workdir}: the same command continues it')
        return {}
    if found and devices.is_first_host():
        from effdet_jax import reporting  # only now: matplotlib takes a second to load

        reporting.write_after_training(config, workdir, run.eval_source, run.total_steps, metrics, found)
    return metrics or run.last_evaluation()


# Columns of TensorBoard's HPARAMS tab.
COMPARED = ('train/loss', *(f'eval/{name}' for name in HEADLINE))

SHOWN = {'loss': 'loss', 'images/s': 'images_per_second', 'waiting': 'waiting_for_data'}


@dataclasses.dataclass
class Run:
    """Everything a config describes, ready for the loop."""

    name: str
    config: dict[str, Any]
    workdir: Path
    eval_source: data.Source
    training_data: dict[str, Any]  # fingerprint, number of images: kept in checkpoints, beside the position
    accepted_data: str  # fingerprint of other data that the run may continue with
    batches: Iterator[dict[str, np.ndarray]]
    unreadable: data.Unreadable
    state_like: TrainState  # NumPy arrays of its shapes and types, which take no memory
    initial_state: Callable[[], TrainState]
    train_step: Callable
    evaluate: Callable
    total_steps: int
    batch_size: int
    thaw_step: float
    log_interval: int
    evaluation_steps: set[int]
    save_steps: set[int]
    num_pictures: int
    watch: Callable
    keep: int
    best: str
    wandb: str
    # These two are known once the work directory is ours.
    first_step: int = 0
    checkpoints: Checkpoints | None = None  # of the first host

    def save(self, step: int, state: TrainState, scores: dict[str, float] | None) -> None:
        if self.checkpoints:
            position = self.batches.get_state() | self.training_data  # type: ignore[attr-defined]  # of Grain
            self.checkpoints.save(step, devices.first_replica(state), position, self.config, scores)

    def open_mirror(self) -> WandbRun | None:
        """In Weights & Biases, where the config asks for it; of the first host."""
        return WandbRun(self.wandb, self.workdir) if self.wandb and devices.is_first_host() else None

    def check(self) -> None:
        """Warns where a checkpoint that was being written could not be."""
        if self.checkpoints:
            self.checkpoints.check()

    def last_evaluation(self) -> dict[str, float]:
        """Of a run that had nothing left to do."""
        rows = [row for row in read_metrics(self.workdir / 'metrics.jsonl') if 'eval/AP' in row]
        last = rows[-1] if rows else {}
        return {name.removeprefix('eval/'): value for name, value in last.items() if name != 'step'}


def build(config: Any, workdir: Path) -> Run:
    """From a config to a run: opens the data, checks all that can be checked. Writes nothing.

    Raises:
      UserError: as `train_and_evaluate`.
    """
    if (workdir / 'import.json').exists():
        raise UserError(
            f'{workdir} holds imported weights, which training would replace: choose another --workdir and add '
            f'--config.train.init_from={workdir}'
        )
    run_config.check(config)
    c = run_config.Recorded(config)
    train_source, eval_source = open_sources(c)
    evaluate.remember_classes(config, eval_source, c.dataset.category_ids)
    run_config.refuse_another(config, workdir)
    for line in run_config.changes_to_tell(config, workdir):
        info(f'note: {line}')
    model = build_model(c.model, len(train_source.class_names), devices.AXIS)
    anchors_N4 = image_anchors(c)

    t = c.train
    host_batch = devices.host_batch_size('config.train.batch_size', t.batch_size, t.accumulate)
    steps_per_epoch = max(len(train_source) // t.batch_size, 1)
    total_steps = max(int(t.epochs * steps_per_epoch), 1)
    train_step, optimizer = map_train_step(c, model, anchors_N4, steps_per_epoch, total_steps)
    thaws_at = thaw_step(c, steps_per_epoch)
    inspection.check_sources(c, {'train': train_source, 'eval': eval_source})
    host, num_hosts = devices.host()
    batches = iter(
        data.train_batches(
            train_source, image_size=tuple(c.image.size), batch_size=host_batch, max_boxes=c.dataset.max_boxes,
            scale_range=tuple(c.augment.scale), seed=c.seed, host=host, num_hosts=num_hosts, threads=c.dataset.threads,
            prefetch=c.dataset.prefetch, cache_bytes=int(c.dataset.cache_gb * 1e9),
        )
    )  # fmt: skip

    unreadable = data.Unreadable(train_source, c.dataset.max_unreadable, result)

    detect = devices.map_devices(make_detect(c, model))
    evaluate_all = evaluate.make_evaluate(c, eval_source, detect)

    seed, init_from, ema_decay, attacked = c.seed, t.init_from, t.ema_decay, c.adversarial.weight > 0
    check_freeze(t.freeze, shapes := shapes_of(model))
    if init_from and not has_checkpoints(workdir):
        check_start(Path(init_from), shapes)

    def initial_state() -> TrainState:
        variables = init_variables(model, seed)
        if init_from:
            variables = start_from(Path(init_from), variables, config)
        return init_state(variables, optimizer, ema_decay, attacked)

    def every(epochs: float) -> set[int]:
        interval = max(round(epochs * steps_per_epoch), 1)
        return {*range(interval, total_steps, interval), total_steps}

    evaluation_steps = every(c.eval.every_epochs)
    save_steps = every(c.checkpoint.every_epochs) | evaluation_steps
    keep, best = c.checkpoint.keep, c.checkpoint.best
    name, log_interval, num_pictures = c.name, c.log.every_steps, c.eval.pictures
    if wandb := c.log.wandb:
        import_wandb(wandb)  # now: to miss it later would waste the user's time
    watch = incidents.make_watch(train_source, workdir, t.max_skipped)
    training_data = {'fingerprint': data.fingerprint(train_source), 'images': len(train_source)}
    accepted_data = c.dataset.fingerprint
    run_config.refuse_unread(c)

    return Run(
        name, run_config.to_json(config), workdir, eval_source, training_data, accepted_data, batches, unreadable,
        arrays_like(state_shapes(model, optimizer, ema_decay, attacked)), initial_state, train_step, evaluate_all,
        total_steps, t.batch_size, thaws_at, log_interval, evaluation_steps, save_steps, num_pictures, watch, keep,
        best, wandb,
    )  # fmt: skip


@contextlib.contextmanager
def resumed(run: Run, config: Any) -> Iterator[TrainState]:
    """Takes the work directory; gives the replicated state that it stands at. Waits in the end for the last checkpoint.

    Raises:
      UserError: where another process has it, it cannot be written, or what it holds does not continue as this run.
    """
    with contextlib.ExitStack() as exits:
        if devices.is_first_host():
            exits.enter_context(only_process(run.workdir))
            run.checkpoints = exits.enter_context(
                contextlib.closing(Checkpoints(run.workdir, keep=run.keep, best=run.best))
            )
        yield devices.replicate(_first_state(run, config))  # no name here: it would stay in memory during the run
    devices.meet('saved')  # nobody leaves before the last checkpoint is written


def _first_state(run: Run, config: Any) -> TrainState:
    """The state of the newest checkpoint, or the initial one. Saves the config, once it is clear that it fits."""
    place = state = None
    if run.checkpoints and (restored := run.checkpoints.restore_latest(run.state_like)):
        step, (state, position) = restored
        _check_position(run, step, {name: position.pop(name) for name in run.training_data if name in position})
        place = step, position
    place = devices.gather_objects(place)[0]
    if run.checkpoints:
        try:
            run_config.save(config, run.workdir)
        except OSError as error:
            raise UserError(
                f'{run.workdir} cannot be written ({error.strerror}): make room, or choose another --workdir'
            ) from error
    if not place:
        return run.initial_state()
    run.first_step, position = place
    run.batches.set_state(position)  # type: ignore[attr-defined]
    info(f'continuing {run.workdir} from step {run.first_step} of {run.total_steps}')
    return devices.from_first_host(state, run.state_like)


def _check_position(run: Run, step: int, saved: dict[str, Any]) -> None:
    """Whether a run at `step` may continue with its data and epochs; `saved`: its `training_data` at that time.

    Raises:
      UserError: where it has done more steps than there are, or the data are others than the user knows of.
    """
    if step > run.total_steps:
        raise UserError(
            f'{run.workdir} has done {step} steps, and with this config there are {run.total_steps}: raise '
            'config.train.epochs, or evaluate it with --mode=eval'
        )
    fingerprint = run.training_data['fingerprint']
    if saved.get('fingerprint', fingerprint) == fingerprint:  # checkpoints of earlier versions have none
        return
    before, now = saved['images'], run.training_data['images']
    images = f'{before} images then, {now} now' if before != now else f'{now} images, but other files, boxes or labels'
    if run.accepted_data != fingerprint:
        raise UserError(
            f'the training data of {run.workdir} have changed since step {step} ({images}): put the old data back, or '
            f'continue with the new ones by --config.dataset.fingerprint={fingerprint}'
        )
    info(f'note: the training data have changed since step {step} ({images})')


def open_sources(config: Any) -> tuple[data.CheckableSource, data.CheckableSource]:
    """(training, evaluation) data, with the same classes."""
    d = config.dataset
    train_source = data.open_source(d.source, d.train_split, d.class_names)
    return train_source, data.open_source(d.source, d.eval_split, train_source.class_names)


def report(metrics: dict[str, float], workdir: Path) -> None:
    """Prints the tables a run ends with."""
    classes = [name.removeprefix('AP/') for name in metrics if name.startswith('AP/')]
    result('\n' + evaluate.summary(metrics, tuple(classes)))
    info(f'\n{workdir}: report.html  config.json  metrics.jsonl  checkpoints/  tensorboard/  pictures/')
