"""The plan of a run: size of the network, match of the anchors, memory, time."""

import datetime
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from effdet_jax import data
from effdet_jax.build import host_batch_size
from effdet_jax.commands.plan import anchor_report
from effdet_jax.commands.plan.memory import compile_two, device_memory, evaluation_memory, largest_batch, memory_table
from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import EfficientDet, build_model
from effdet_jax.model.cost import Cost, cost_of_parts
from effdet_jax.model.efficientdet import BACKBONE_LEVELS
from effdet_jax.model.feature_network import FEATURE_NETWORKS
from effdet_jax.records.console import info, stage, table, track
from effdet_jax.records.network_drawing import save_drawing
from effdet_jax.runtime import devices
from effdet_jax.training import footprint
from effdet_jax.training.compiled import compile_step
from effdet_jax.training.footprint import HostBatch
from effdet_jax.training.freeze import unfreeze_step

MIN_LEVEL = BACKBONE_LEVELS[0]
CLASSES_WITHOUT_DATA = 90  # COCO's
OBJECTS_WITHOUT_DATA = 8  # per image
SAMPLE = 2000  # images listed if each has to be read or rendered
SECONDS_OF_INPUT = 5.0
INPUT_BATCH = 8


def plan(
    config: Any, memory: int | None = None, with_data: bool = True, with_step: bool = True, fit: bool = False
) -> Iterator[str]:
    """Yields the sections of the plan in Markdown, quick ones first.

    `memory`: bytes of one device, by default of the devices in use. `with_data`: open the training split. `with_step`:
    compile the training step, which takes minutes for large networks, and run it. `fit`: propose anchors.

    Raises:
      UserError: if the config or the data are invalid.
    """
    source = _open(config) if with_data else None
    num_classes = len(source.class_names if source else config.dataset.class_names) or CLASSES_WITHOUT_DATA
    model = build_model(config.model, num_classes, devices.AXIS)
    yield _network(config, model)
    objects = OBJECTS_WITHOUT_DATA
    if source:
        with stage('reading annotations'):
            listing = source.listing(SAMPLE, track)
        objects = math.ceil(len(listing.labels) / max(len(listing.images), 1))
        yield from anchor_report.sections(config, listing, fit)

    batch_size = host_batch_size(config)
    t = config.train
    frozen = math.isinf(unfreeze_step(t.freeze, t.unfreeze_epoch, 1))  # otherwise, time the unfrozen step
    step = footprint.plan_step(config, model, image_anchors(config), frozen)

    def batch_of(images: int) -> HostBatch:
        return footprint.random_batch(config, images, num_classes, objects)

    if not with_step:
        yield memory_table(config, step.memory(batch_of(batch_size), None))
        return
    step_memory, line, compiled = compile_two(step, batch_of, batch_size, config.train.gradient_accumulation_steps)
    yield memory_table(config, step_memory)
    limit, description = (memory, '--memory') if memory else device_memory()
    yield largest_batch(config, batch_size, line, limit, description)
    yield evaluation_memory(config, model, step)
    largest = line.largest(limit, config.train.gradient_accumulation_steps) * jax.local_device_count()
    if largest == 0:
        yield 'No batch fits, so no time is measured.'
        return
    images = min(batch_size, largest)
    if compiled is None or images < batch_size:
        with stage(f'compiling the training step for batch {images}'):
            compiled = compile_step(step.lower(batch_of(images)))
    with stage(f'measuring steps of {images} images'):
        seconds = footprint.seconds_per_step(compiled, step.random_state(), batch_of(images)) / images * batch_size
    yield _time(config, seconds, images, batch_size, source)


def draw_feature_network(config: Any, path: Path) -> None:
    """Draws the feature network, with its cost, to an SVG or PNG file.

    Raises:
      UserError: if the file cannot be written.
    """
    m, network, (height, width) = config.model, config.model.feature_network, config.image.size
    cost = feature_network_cost(config)
    title = (
        f'{network.name}, P{MIN_LEVEL}-P{m.max_level}, {m.fpn_cells} x {m.fpn_channels} channels, {network.fusion} '
        f'fusion{" per channel" * network.per_channel}{", plain convolutions" * (not network.separable)}\n'
        f'{cost.parameters:,} parameters, {cost.macs / 1e9:.3g} billion multiply-adds at {height}x{width}'
    )
    try:
        save_drawing(path, FEATURE_NETWORKS[network.name](MIN_LEVEL, m.max_level), MIN_LEVEL, title, m.fpn_cells)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror or error}): choose another --draw') from error
    info(f'wrote a picture of the feature network {network.name} to {path}')


def feature_network_cost(config: Any) -> Cost:
    """The cost of the feature network, including the projection that makes P6."""
    parts = cost_of_parts(build_model(config.model, CLASSES_WITHOUT_DATA), tuple(config.image.size))
    costs = [cost for part, cost in parts.items() if part == 'fpn' or part.startswith('resample_')]
    return Cost(sum(cost.parameters for cost in costs), sum(cost.macs for cost in costs))


def _open(config: Any) -> data.CheckableSource:
    d = config.dataset
    try:
        return data.open_source(d.source, d.train_split, d.class_names)
    except UserError as error:
        raise UserError(f'{error} (or use --no-data to plan without the data)') from error


def _network(config: Any, model: EfficientDet) -> str:
    height, width = config.image.size
    with stage('counting parameters'):
        costs = cost_of_parts(model, (height, width))
    rows = [(part, cost.parameters, cost.macs / 1e9) for part, cost in costs.items()]
    rows.append(('total', sum(c.parameters for c in costs.values()), sum(c.macs for c in costs.values()) / 1e9))
    title = f'Network: {config.name}, {model.num_classes} classes, {height}x{width} pixels\n'
    return table(('part', 'parameters', 'billion multiply-adds per image'), rows, title)


def _time(config: Any, seconds: float, measured: int, batch_size: int, source: data.CheckableSource | None) -> str:
    t, c = config.train, config.dataset
    speeds = [(f'training step on {devices.describe_devices()}, random data', seconds)]
    notes = ['Start-up and evaluations take additional time.']
    if measured < batch_size:
        notes.append(f'The step was measured with {measured} images, the most that fit, and scaled up.')
    if t.freeze and t.unfreeze_epoch is not None:
        notes.append(f'Steps are faster before epoch {t.unfreeze_epoch:g}, while some layers are frozen.')
    header, title, step_counts = ['what', 'seconds per step', 'images/s'], 'Time\n', []
    if source is not None:
        with stage('measuring the input'):
            rate = data.batch_rate(
                source, image_size=tuple(config.image.size), scale_range=tuple(config.augment.scale),
                threads=c.threads, batch_size=min(batch_size, INPUT_BATCH), seconds=SECONDS_OF_INPUT,
            )  # fmt: skip
        input_seconds = batch_size / rate
        speeds.append((f'input pipeline with {c.threads} threads', input_seconds))
        speeds.append(('slower of the two', max(seconds, input_seconds)))
        if jax.default_backend() == 'cpu':
            notes.append('On a CPU both share the cores, so a step can take up to the sum of both.')
        elif input_seconds > seconds:
            notes.append('The device waits for data: raise config.dataset.threads if the CPU has idle cores.')
        steps = max(len(source) // t.batch_size, 1)
        header += ['one epoch', f'all {t.epochs:g} epochs']
        title = f'Time: {len(source):,} images, {steps:,} steps of {t.batch_size} per epoch\n'
        step_counts = [steps, steps * t.epochs]
    rows = [
        (what, f'{s:.3g}', f'{t.batch_size / s:.1f}', *(_duration(s * count) for count in step_counts))
        for what, s in speeds
    ]
    return '\n\n'.join([table(header, rows, title), ' '.join(notes)])


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
