"""From a config to the objects of a training run: the only place where the two meet."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax

from effdet_jax import config as run_config
from effdet_jax import data, evaluate, inspection
from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors, make_detect
from effdet_jax.model import EfficientDet, build_model
from effdet_jax.records.checkpoint import has_checkpoints
from effdet_jax.records.console import info, result
from effdet_jax.records.wandb_run import import_wandb
from effdet_jax.runtime import devices
from effdet_jax.training.compiled import map_train_step
from effdet_jax.training.freeze import check_freeze, unfreeze_step
from effdet_jax.training.run import RecordOptions, Run, RunData, Timetable
from effdet_jax.training.state import TrainState, arrays_like, init_state, init_variables, state_shapes
from effdet_jax.training.transfer import check_start, start_from
from effdet_jax.weights.names import shapes_of


def build_run(config: Any, workdir: Path) -> Run:
    """Opens the data and checks everything that can be checked. Writes nothing.

    Raises:
      UserError: for anything in the config, the data or the work directory that the user can fix.
    """
    if (workdir / 'import.json').exists():
        raise UserError(
            f'{workdir} holds imported weights, which training would replace: choose another --workdir and add '
            f'--config.train.init_from={workdir}'
        )
    run_config.check(config)
    c = run_config.Recorded(config)  # in the end every key must have been read
    train_source, eval_source = open_sources(c)
    evaluate.remember_classes(config, eval_source, c.dataset.category_ids)
    run_config.refuse_another(config, workdir)
    for line in run_config.changes_to_tell(config, workdir):
        info(f'note: {line}')
    model = build_model(c.model, len(train_source.class_names), devices.AXIS)
    epoch_steps = steps_per_epoch(c, len(train_source))
    timetable, shapes = make_timetable(c, epoch_steps), shapes_of(model)
    train_step, optimizer = map_train_step(c, model, image_anchors(c), epoch_steps, timetable.total_steps)
    inspection.check_sources(c, {'train': train_source, 'eval': eval_source})
    run = Run(
        name=c.name,
        config=config,
        workdir=workdir,
        data=RunData(
            batch_size=c.train.batch_size,
            batches=train_batches(c, train_source, host_batch_size(c)),
            unreadable=data.Unreadable(train_source, c.dataset.max_unreadable_fraction, result),
            train_source=train_source,
            eval_source=eval_source,
            identity={'fingerprint': data.fingerprint(train_source), 'images': len(train_source)},
            accepted=c.dataset.accepted_fingerprint,
        ),
        timetable=timetable,
        records=RecordOptions(
            keep=c.checkpoint.keep,
            best=c.checkpoint.best,
            num_pictures=c.eval.pictures,
            wandb=c.log.wandb,
            max_skipped=c.train.max_skipped_steps,
        ),
        state_like=arrays_like(state_shapes(shapes, optimizer, c.train.ema_decay, c.adversarial.weight > 0)),
        initial_state=_initial_state(config, c, model, shapes, optimizer, workdir),
        train_step=train_step,
        evaluate=evaluate.make_evaluate(c, eval_source, devices.map_devices(make_detect(c, model))),
    )
    if run.records.wandb:
        import_wandb(run.records.wandb)  # now: to miss it later would waste the user's time
    run_config.refuse_unread(c)
    return run


def open_sources(config: Any) -> tuple[data.CheckableSource, data.CheckableSource]:
    """(training, evaluation) data, with the same classes."""
    d = config.dataset
    train_source = data.open_source(d.source, d.train_split, d.class_names)
    return train_source, data.open_source(d.source, d.eval_split, train_source.class_names)


def train_batches(config: Any, source: data.Source, batch_size: int, **options: Any) -> Iterator[dict[str, np.ndarray]]:
    """This host's endless batches of the training data: data.train_batches, whose `options` replace the config's."""
    host, num_hosts = devices.host()
    d = config.dataset
    of_config: dict[str, Any] = dict(
        image_size=tuple(config.image.size), max_boxes=d.max_boxes, scale_range=tuple(config.augment.scale),
        seed=config.seed, threads=d.threads, prefetch=d.prefetch, cache_bytes=int(d.cache_gb * 1e9),
    )  # fmt: skip
    return iter(
        data.train_batches(source, batch_size=batch_size, host=host, num_hosts=num_hosts, **(of_config | options))
    )


def host_batch_size(config: Any) -> int:
    """This host's share of config.train.batch_size. Raises UserError where the devices cannot share it evenly."""
    t = config.train
    return devices.host_batch_size('config.train.batch_size', t.batch_size, t.gradient_accumulation_steps)


def steps_per_epoch(config: Any, num_images: int) -> int:
    return max(num_images // config.train.batch_size, 1)


def make_timetable(config: Any, epoch_steps: int) -> Timetable:
    """`epoch_steps`: steps per epoch."""
    t, total_steps = config.train, max(int(config.train.epochs * epoch_steps), 1)

    def every(epochs: float) -> set[int]:
        interval = max(round(epochs * epoch_steps), 1)
        return {*range(interval, total_steps, interval), total_steps}

    evaluations = every(config.eval.every_epochs)
    return Timetable(
        total_steps=total_steps,
        unfreeze_step=unfreeze_step(t.freeze, t.unfreeze_epoch, epoch_steps),
        log_interval=config.log.every_steps,
        evaluations=evaluations,
        saves=every(config.checkpoint.every_epochs) | evaluations,
    )


def _initial_state(
    config: Any, c: Any, model: EfficientDet, shapes: Any, optimizer: optax.GradientTransformation, workdir: Path
) -> Callable[[], TrainState]:
    """A function that makes the state of step 0: random weights, or those of config.train.init_from.

    Raises:
      UserError: if config.train.freeze matches nothing, or the run to start from does not fit.
    """
    seed, init_from, ema_decay, attacked = c.seed, c.train.init_from, c.train.ema_decay, c.adversarial.weight > 0
    check_freeze(c.train.freeze, shapes)
    if init_from and not has_checkpoints(workdir):
        check_start(Path(init_from), shapes)

    def initial_state() -> TrainState:
        variables = init_variables(model, seed)
        if init_from:
            variables = start_from(Path(init_from), variables, config)
        return init_state(variables, optimizer, ema_decay, attacked)

    return initial_state
