"""The training loop: restore -> step -> log -> evaluate -> save."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from effdet_jax import config as run_config
from effdet_jax import data, evaluate, inspection
from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors, make_detect
from effdet_jax.model import build_model
from effdet_jax.records.checkpoint import Checkpoints, has_checkpoints, load_variables
from effdet_jax.records.metrics import MetricsLog, Progress, Waiting, read_metrics, say, table
from effdet_jax.training import parallel
from effdet_jax.training.optimizer import path_matches, thaw_step
from effdet_jax.training.state import TrainState, Variables, init_state, init_variables
from effdet_jax.training.step import map_train_step
from effdet_jax.training.transfer import transfer

HEADLINE = ('AP', 'AP50', 'AP75')


def train_and_evaluate(config: Any, workdir: Path) -> dict[str, float]:
    """Trains what `config` describes, or goes on where `workdir` stands; returns the metrics of the last evaluation.

    Raises:
      UserError: for anything in the config, the data or the work directory that the user can mend.
    """
    run = build(config, workdir)
    say(f'{run.name}: {run.total_steps} steps of {run.batch_size} images on {parallel.describe_devices()}')
    state, pending, waiting, left_out, replaced, metrics = run.state, [], Waiting(), 0, 0, {}
    with (
        contextlib.closing(run.checkpoints),  # an interrupted run, too, waits for the one that is being written
        MetricsLog(workdir / parallel.host_folder(), run.first_step) as log,
        Progress(run.total_steps, run.first_step, description='training') as progress,
    ):
        log.text('config', f'```json\n{config.to_json_best_effort(indent=2)}\n```')
        for step in range(run.first_step + 1, run.total_steps + 1):
            with waiting:
                batch = next(run.batches)
            state, step_metrics = run.train_step(state, parallel.shard(batch), step - 1 < run.thaw_step)
            pending.append(step_metrics)
            left_out += int(batch['dropped'].sum())
            replaced += run.unreadable.count(batch['unreadable'])
            jax.block_until_ready(pending[-2:][0])  # the host runs one step ahead of the device, and no further
            if step == run.first_step + 1:
                say(f'compiled in {waiting.elapsed():.0f} s')
                waiting.reset()
            else:
                waiting.count(run.batch_size)

            evaluates, saves = step in run.evaluation_steps, step in run.save_steps
            # Logged before every save too: so no mean spans a restart, and a continued run logs the same numbers.
            if step % run.log_interval == 0 or saves:
                means = {name: float(np.mean(values)) for name, values in _columns(jax.device_get(pending)).items()}
                means['images_per_second'] = waiting.per_second()
                means['waiting_for_data'] = waiting.share()
                means['boxes_left_out'] = left_out  # of images with more than config.dataset.max_boxes
                means['images_replaced'] = replaced  # that cannot be read
                log.write(step, {f'train/{name}': mean for name, mean in means.items()})
                progress.update(step, {shown: means[name] for shown, name in SHOWN.items()})
                pending.clear()
                left_out = replaced = 0
                waiting.reset()
            if evaluates:
                metrics, found = run.evaluate(state.best_variables)
                log.write(step, {f'eval/{name}': value for name, value in metrics.items()})
                log.pictures(step, evaluate.draw(run.eval_source, found, run.num_pictures))
                say(f'step {step}  ' + '  '.join(f'{name} {metrics[name]:.3f}' for name in HEADLINE))
            if saves:
                scores = {f'eval/{name}': value for name, value in metrics.items()} if evaluates else None
                run.save(step, state, scores)
            if evaluates or saves:
                waiting.reset()
    return metrics or run.last_evaluation()


# Weights expect these as they were in their training; a run that starts from them may still choose others.
MEANING_OF_WEIGHTS = ('model.anchors.', 'image.mean', 'image.std', 'image.padding')

SHOWN = {'loss': 'loss', 'images/s': 'images_per_second', 'waiting': 'waiting_for_data'}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@dataclasses.dataclass
class Run:
    """Everything a config describes, ready for the loop."""

    name: str
    config: dict[str, Any]
    workdir: Path
    eval_source: data.Source
    batches: Iterator[dict[str, np.ndarray]]
    unreadable: data.Unreadable
    state: TrainState  # replicated
    train_step: Callable
    evaluate: Callable
    checkpoints: Checkpoints
    first_step: int
    total_steps: int
    batch_size: int
    thaw_step: float
    log_interval: int
    evaluation_steps: set[int]
    save_steps: set[int]
    num_pictures: int

    def save(self, step: int, state: TrainState, scores: dict[str, float] | None) -> None:
        position = self.batches.get_state()  # type: ignore[attr-defined]  # Grain's iterators have one
        self.checkpoints.save(step, parallel.first_replica(state), position, self.config, scores)

    def last_evaluation(self) -> dict[str, float]:
        """Of a run that had nothing left to do."""
        rows = [row for row in read_metrics(self.workdir / 'metrics.jsonl') if 'eval/AP' in row]
        last = rows[-1] if rows else {}
        return {name.removeprefix('eval/'): value for name, value in last.items() if name != 'step'}


def build(config: Any, workdir: Path) -> Run:
    """From a config to a run: opens the data, makes or restores the state. Nothing is written before all of it stands.

    Raises:
      UserError: as `train_and_evaluate`.
    """
    if (workdir / 'import.json').exists():
        raise UserError(
            f'{workdir} holds imported weights, which training would replace: choose another --workdir and add '
            f'--config.train.init_from={workdir}'
        )
    c = run_config.Recorded(config)
    train_source, eval_source = open_sources(c)
    remember_classes(config, eval_source, c.dataset.category_ids)
    run_config.refuse_another(config, workdir)
    model = build_model(c.model, len(train_source.class_names), parallel.AXIS)
    anchors_N4 = image_anchors(c)

    t = c.train
    host_batch = parallel.host_batch_size('config.train.batch_size', t.batch_size, t.accumulate)
    steps_per_epoch = max(len(train_source) // t.batch_size, 1)
    total_steps = max(int(t.epochs * steps_per_epoch), 1)
    host, num_hosts = parallel.host()
    batches = iter(
        data.train_batches(
            train_source, image_size=tuple(c.image.size), batch_size=host_batch, max_boxes=c.dataset.max_boxes,
            scale_range=tuple(c.augment.scale), seed=c.seed, host=host, num_hosts=num_hosts, threads=c.dataset.threads,
            prefetch=c.dataset.prefetch,
        )
    )  # fmt: skip

    unreadable = data.Unreadable(train_source, c.dataset.max_unreadable, say)

    train_step, optimizer = map_train_step(c, model, anchors_N4, steps_per_epoch, total_steps)
    detect = parallel.map_devices(make_detect(c, model))
    evaluate_all = evaluate.make_evaluate(c, eval_source, detect)

    variables, init_from = init_variables(model, c.seed), t.init_from
    _check_freeze(t.freeze, variables)
    if init_from and not has_checkpoints(workdir):
        variables = start_from(Path(init_from), variables, config)
    state = init_state(variables, optimizer, t.ema_decay)
    if c.checkpoint.best not in (known := [f'eval/{name}' for name in evaluate.SUMMARY]):
        raise UserError(f'config.checkpoint.best={c.checkpoint.best!r} is unknown: choose one of {", ".join(known)}')

    def every(epochs: float) -> set[int]:
        interval = max(round(epochs * steps_per_epoch), 1)
        return {*range(interval, total_steps, interval), total_steps}

    evaluation_steps = every(c.eval.every_epochs)
    save_steps = every(c.checkpoint.every_epochs) | evaluation_steps
    keep, best, thaws_at = c.checkpoint.keep, c.checkpoint.best, thaw_step(c, steps_per_epoch)
    name, log_interval, num_pictures = c.name, c.log.every_steps, c.eval.pictures
    run_config.refuse_unread(c)

    # Everything stands: from here on the work directory is touched.
    run_config.save(config, workdir)
    checkpoints = Checkpoints(workdir, keep=keep, best=best)
    first_step = checkpoints.latest_step() or 0
    if first_step:
        restored = checkpoints.restore(first_step, jax.tree.map(np.asarray, state))
        state = restored.state
        batches.set_state(restored.data_position)
        say(f'continuing {workdir} from step {first_step} of {total_steps}')
    return Run(
        name, run_config.to_json(config), workdir, eval_source, batches, unreadable, parallel.replicate(state),
        train_step, evaluate_all, checkpoints, first_step, total_steps, t.batch_size, thaws_at, log_interval,
        evaluation_steps, save_steps, num_pictures,
    )  # fmt: skip


def open_sources(config: Any) -> tuple[data.CheckableSource, data.CheckableSource]:
    """(training, evaluation) data, with the same classes. Prints what the labels alone tell is wrong with them."""
    d = config.dataset
    train_source = data.open_source(d.source, d.train_split, d.class_names)
    eval_source = data.open_source(d.source, d.eval_split, train_source.class_names)
    inspection.check_before_training(config, train_source, eval_source)
    return train_source, eval_source


def remember_classes(config: Any, source: data.Source, category_ids: Sequence[int]) -> None:
    """Fills in what the config left to the data, so that `config.json` alone says what a label means."""
    with config.unlocked():
        config.dataset.class_names = source.class_names
        config.dataset.category_ids = tuple(category_ids) or source.category_ids


def start_from(workdir: Path, fresh: Variables, config: Any) -> Variables:
    """`fresh` with the best weights of another run; prints what was loaded, and what it was used to see."""
    step, weights = load_variables(workdir)
    for key, theirs, ours in run_config.differences(run_config.load(workdir), config, MEANING_OF_WEIGHTS):
        say(f'note: {workdir} was trained with {key}={theirs}, this run has {ours}')
    variables, rows = transfer(fresh, weights)
    title = f'starting from {workdir}, step {step}'
    say(table(('part', 'loaded', 're-initialised', 'skipped'), rows, title))
    return variables


def _check_freeze(pattern: str, variables: Variables) -> None:
    paths = traverse_util.flatten_dict(variables['params'])
    if pattern and not any(path_matches(pattern, path) for path in paths):
        raise UserError(
            f'config.train.freeze={pattern!r} matches no parameter: paths look like {"/".join(next(iter(paths)))}'
        )


def evaluate_best(config: Any, workdir: Path) -> dict[str, float]:
    """Metrics of the best checkpoint of `workdir` on the config's evaluation split.

    Raises:
      UserError: where the work directory holds no run of this config.
    """
    _, source = open_sources(config)
    remember_classes(config, source, config.dataset.category_ids)
    run_config.refuse_another(config, workdir, only=run_config.NETWORK_KEYS)
    step, variables = load_variables(workdir)
    say(f'evaluating {workdir}, step {step}, on {len(source)} images')
    detect = parallel.map_devices(make_detect(config, build_model(config.model, len(source.class_names))))
    metrics, _ = evaluate.make_evaluate(config, source, detect)(parallel.replicate(variables))
    return metrics


def report(metrics: dict[str, float], workdir: Path) -> None:
    """Prints the tables a run ends with."""
    classes = [name.removeprefix('AP/') for name in metrics if name.startswith('AP/')]
    say('\n' + evaluate.summary(metrics, tuple(classes)))
    say(f'\n{workdir}: config.json  metrics.jsonl  checkpoints/  tensorboard/  pictures/')
