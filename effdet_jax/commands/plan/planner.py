"""What a run will need, before it starts: size of the network, memory, time, and whether its anchors fit the data."""

import dataclasses
import datetime
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np

from effdet_jax import data
from effdet_jax.commands.plan import anchor_report
from effdet_jax.errors import UserError
from effdet_jax.inference.detector import image_anchors, make_detect
from effdet_jax.model import EfficientDet, build_model
from effdet_jax.model.cost import Cost, cost_of_parts
from effdet_jax.model.efficientdet import BACKBONE_LEVELS
from effdet_jax.model.feature_network import FEATURE_NETWORKS
from effdet_jax.records.console import info, stage, table, track
from effdet_jax.records.network_drawing import save_drawing
from effdet_jax.runtime import devices
from effdet_jax.training import footprint
from effdet_jax.training.compiled import compile_step
from effdet_jax.training.footprint import HostBatch, PlannedStep, StepMemory
from effdet_jax.training.freeze import unfreeze_step

MIN_LEVEL = BACKBONE_LEVELS[0]
CLASSES_WITHOUT_DATA = 90  # COCO's
OBJECTS_WITHOUT_DATA = 8  # of an image
SAMPLE = 2000  # images looked at, where each would have to be read or drawn
SECONDS_OF_INPUT = 5.0
INPUT_BATCH = 8
UNITS = {'B': 1, 'KB': 1e3, 'MB': 1e6, 'GB': 1e9, 'TB': 1e12, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30, 'TIB': 2**40}


def plan(
    config: Any, memory: int | None = None, with_data: bool = True, with_step: bool = True, fit: bool = False
) -> Iterator[str]:
    """The plan of a config, section by section, in Markdown; what is quick comes first.

    `memory`: bytes of one device; None: those of the device that this runs on. `with_data`: opens the training split.
    `with_step`: compiles the step, which takes minutes for large networks, and runs it. `fit`: proposes anchors.

    Raises:
      UserError: for anything in the config or the data that the user can mend.
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

    batch_size = devices.host_batch_size('config.train.batch_size', config.train.batch_size, config.train.accumulate)
    t = config.train
    frozen = math.isinf(unfreeze_step(t.freeze, t.unfreeze_epoch, 1))  # otherwise what matters is the time after
    step = footprint.plan_step(config, model, image_anchors(config), frozen)

    def batch_of(images: int) -> HostBatch:
        return footprint.random_batch(config, images, num_classes, objects)

    if not with_step:
        yield _memory_table(config, step.memory(batch_of(batch_size), None))
        return
    here, line, compiled = _compile_two(step, batch_of, batch_size, config.train.accumulate)
    yield _memory_table(config, here)
    limit, whose = (memory, '--memory') if memory else device_memory()
    yield _what_fits(config, batch_size, line, limit, whose)
    yield _evaluation(config, model, step)
    most = line.largest(limit, config.train.accumulate) * jax.local_device_count()
    if most == 0:
        yield 'No batch fits, so no time is measured.'
        return
    runs = min(batch_size, most)
    if compiled is None or runs < batch_size:
        with stage(f'compiling the training step for batch {runs}'):
            compiled = compile_step(step.lower(batch_of(runs)))
    with stage(f'measuring steps of {runs} images'):
        seconds = footprint.seconds_per_step(compiled, step.random_state(), batch_of(runs)) / runs * batch_size
    yield _time(config, seconds, runs, batch_size, source)


def draw_feature_network(config: Any, path: Path) -> None:
    """Writes a picture of the feature network, drawn from its table, with what it costs: SVG or PNG.

    Raises:
      UserError: where the file cannot be written, or the config names no feature network.
    """
    m, network, (height, width) = config.model, config.model.feature_network, config.image.size
    cost = feature_network_cost(config)
    title = (
        f'{network.name}, P{MIN_LEVEL}-P{m.max_level}, {m.cells} x {m.channels} channels, {network.fusion} fusion'
        f'{" per channel" * network.per_channel}{", plain convolutions" * (not network.separable)}\n'
        f'{cost.parameters:,} parameters, {cost.macs / 1e9:.3g} billion multiply-adds at {height}x{width}'
    )
    try:
        save_drawing(path, FEATURE_NETWORKS[network.name](MIN_LEVEL, m.max_level), MIN_LEVEL, title, m.cells)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror or error}): choose another --draw') from error
    info(f'{path}: the feature network {network.name}')


def feature_network_cost(config: Any) -> Cost:
    """Of the cells and of the projection that makes P6."""
    parts = cost_of_parts(build_model(config.model, CLASSES_WITHOUT_DATA), tuple(config.image.size))
    ours = [cost for part, cost in parts.items() if part == 'fpn' or part.startswith('resample_')]
    return Cost(sum(cost.parameters for cost in ours), sum(cost.macs for cost in ours))


class Line(NamedTuple):
    """Bytes on a device as a function of its batch: `fixed + per_image * batch`, through two compiled batches."""

    fixed: float
    per_image: float
    batches: tuple[int, int]

    def at(self, batch: int) -> float:
        """Predicted bytes."""
        return self.fixed + self.per_image * batch

    def largest(self, limit: float, multiple: int = 1) -> int:
        """The largest batch, a multiple of `multiple`, that fits into `limit` bytes; 0 where none does."""
        return max(0, math.floor((limit - self.fixed) / self.per_image / multiple) * multiple)


def line_through(points: dict[int, float]) -> Line:
    """Through {batch of a device: bytes}, which has two items."""
    (a, bytes_a), (b, bytes_b) = sorted(points.items())
    per_image = (bytes_b - bytes_a) / (b - a)
    return Line(bytes_a - per_image * a, per_image, (a, b))


def parse_bytes(text: str) -> int:
    """'16GiB', '24 GB', '900MiB' in bytes.

    Raises:
      UserError: where it is no such thing.
    """
    found = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*', text.upper())
    if not found or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise UserError(f'--memory={text} is no amount of memory: write a number and a unit, such as 16GiB or 24GB')
    return size


def device_memory() -> tuple[int, str]:
    """(bytes that a program of ours may have on one device, whose they are)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' in statistics:
        return statistics['bytes_limit'], f'a {jax.local_devices()[0].device_kind}'
    # On a CPU what this process has already taken (Python, the compiler) will be taken in training, too.
    machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    what = f'this machine ({_amount(machine)}, of which Python and the compiler have taken {_amount(taken)})'
    return (machine - taken) // jax.local_device_count(), what


def _open(config: Any) -> data.CheckableSource:
    d = config.dataset
    try:
        return data.open_source(d.source, d.train_split, d.class_names)
    except UserError as error:
        raise UserError(f'{error} (or plan without the data: --no-data)') from error


def _network(config: Any, model: EfficientDet) -> str:
    height, width = config.image.size
    with stage('counting parameters'):
        costs = cost_of_parts(model, (height, width))
    rows = [(part, cost.parameters, cost.macs / 1e9) for part, cost in costs.items()]
    rows.append(('total', sum(c.parameters for c in costs.values()), sum(c.macs for c in costs.values()) / 1e9))
    title = f'Network: {config.name}, {model.num_classes} classes, {height}x{width} pixels\n'
    return table(('part', 'parameters', 'multiply-accumulates of an image, billions'), rows, title)


def _compile_two(
    step: PlannedStep, batch_of: Callable[[int], HostBatch], batch_size: int, accumulate: int
) -> tuple[StepMemory, Line, jax.stages.Compiled | None]:
    """(memory at this batch, memory as a line, the compiled step: None where the compiler finds it too large)."""
    num_devices = jax.local_device_count()
    unit = num_devices * accumulate
    compiled, compiled_bytes = None, {}
    with stage(f'compiling the training step for batch {batch_size}'):
        try:
            compiled = compile_step(step.lower(batch_of(batch_size)))
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
    here = step.memory(batch_of(batch_size), compiled)
    if compiled:
        compiled_bytes[batch_size // num_devices] = float(here.total)
    others = [batch_size // 2 // unit * unit or 2 * batch_size] if compiled else [unit, 2 * unit]
    for size in others:
        with stage(f'compiling the training step for batch {size}'):
            other = footprint.compile_layout(step.lower(batch_of(size)))
        compiled_bytes[size // num_devices] = float(step.memory(batch_of(size), other).total)
    line = line_through(compiled_bytes)
    if compiled is None:
        here = dataclasses.replace(here, temporary=round(line.at(batch_size // num_devices) - here.total))
    return here, line, compiled


def _memory_table(config: Any, memory: StepMemory) -> str:
    c = config
    rows = [
        ('parameters and batch statistics', memory.variables),
        (f'state of the optimiser ({c.optimizer.name})', memory.optimizer),
        ('moving average', memory.average),
        ('batches: this one and the next', memory.batches),
        ('activations and all else that a step needs', memory.temporary),
    ]
    if memory.temporary is not None:
        rows.append(('total', memory.total))
    title = (
        f'Memory of a training step on each device: batch {c.train.batch_size} on {devices.describe_devices()}, '
        f'{c.model.dtype}, remat={c.model.remat}, accumulate={c.train.accumulate}\n'
    )
    host = c.image.size[0] * c.image.size[1] * 3 * c.train.batch_size // jax.process_count() * c.dataset.prefetch
    note = (
        f'On the host up to {_amount(host)} of batches wait their turn (config.dataset.prefetch={c.dataset.prefetch}).'
    )
    return (
        table(('what', 'MiB'), [(what, None if size is None else round(size / 2**20)) for what, size in rows], title)
        + f'\n\n{note}'
    )


def _what_fits(config: Any, batch_size: int, line: Line, limit: int, whose: str) -> str:
    t, num_devices = config.train, jax.local_device_count()
    most = line.largest(limit, t.accumulate) * jax.device_count()
    needed = line.at(batch_size // num_devices)
    sizes = ' and '.join(str(batch * jax.device_count()) for batch in line.batches)
    text = (
        f'Largest batch in {_amount(limit)} of {whose}: {most:,}. A prediction: the line through the compiled batches '
        f'{sizes}, {_amount(line.fixed)} and {_amount(line.per_image)} for each image on a device.'
    )
    if needed <= limit:
        return text
    parts = (p for p in range(t.accumulate + 1, batch_size + 1) if batch_size // num_devices % p == 0)
    fits = next((p for p in parts if line.at(math.ceil(batch_size / num_devices / p * t.accumulate)) <= limit), None)
    split = f' or split it with --config.train.accumulate={fits}' if fits else ''
    return (
        f'{text}\n\nBatch {t.batch_size} does not fit: take --config.train.batch_size={most}{split}; '
        '--config.model.remat=True and --config.model.dtype=bfloat16 need less for each image.'
    )


def _evaluation(config: Any, model: EfficientDet, step: PlannedStep) -> str:
    images = devices.host_batch_size('config.eval.batch_size', config.eval.batch_size)
    batch = devices.shard(
        {'image': np.zeros((images, *config.image.size, 3), np.uint8), 'valid_size': np.zeros((images, 2), np.int32)}
    )
    with stage(f'compiling evaluation for batch {images}'):
        detect = devices.map_devices(make_detect(config, model))
        lowered = detect.lower(footprint.replicated(step.state.best_variables), batch['image'], batch['valid_size'])
        temporary = footprint.temporary_bytes(footprint.compile_layout(lowered))
    own = temporary + footprint.tree_bytes(batch) // jax.local_device_count()
    state = footprint.tree_bytes(step.state)
    return (
        f'Evaluation of {config.eval.batch_size} images at a time (config.eval.batch_size) needs {_amount(own)} on '
        f'each device beside the state of the training, together {_amount(own + state)}.'
    )


def _time(config: Any, seconds: float, runs: int, batch_size: int, source: data.CheckableSource | None) -> str:
    speeds = [(f'training step on {devices.describe_devices()}, random data', seconds)]
    notes = ['Evaluations and start come on top.']
    if runs < batch_size:
        notes.append(f'The step was measured with {runs} images, the most that fit here, and scaled up.')
    if config.train.freeze and config.train.unfreeze_epoch is not None:
        notes.append(f'Before epoch {config.train.unfreeze_epoch:g}, while a part is frozen, steps are shorter.')
    if source is None:
        rows = [(what, f'{s:.3g}', f'{config.train.batch_size / s:.1f}') for what, s in speeds]
        return '\n\n'.join([table(('what', 'seconds for a step', 'images/s'), rows, 'Time\n'), ' '.join(notes)])
    with stage('measuring the input'):
        input_seconds = batch_size / _input_images_per_second(config, source)
    speeds.append((f'input: reading, decoding, resizing in {config.dataset.threads} threads', input_seconds))
    if jax.default_backend() == 'cpu':
        notes.append('On a CPU both share the cores: together they take up to the sum.')
    elif input_seconds > seconds:
        notes.append('The device would wait for data: raise config.dataset.threads if there are cores left.')
    speeds.append(('the slower one rules', max(seconds, input_seconds)))
    steps_per_epoch = max(len(source) // config.train.batch_size, 1)
    rows = [
        (what, f'{s:.3g}', f'{config.train.batch_size / s:.1f}', _duration(s * steps_per_epoch),
         _duration(s * steps_per_epoch * config.train.epochs))
        for what, s in speeds
    ]  # fmt: skip
    header = ('what', 'seconds for a step', 'images/s', 'an epoch', f'all {config.train.epochs:g} epochs')
    title = f'Time: {len(source):,} images, {steps_per_epoch:,} steps of {config.train.batch_size} in an epoch\n'
    return '\n\n'.join([table(header, rows, title), ' '.join(notes)])


def _input_images_per_second(config: Any, source: data.Source) -> float:
    """Of this host, after the first batch. Small batches: with large ones a few would have to do."""
    threads = config.dataset.threads
    size = min(config.train.batch_size, INPUT_BATCH)
    batches = iter(
        data.train_batches(
            source, image_size=tuple(config.image.size), batch_size=size, max_boxes=config.dataset.max_boxes,
            scale_range=tuple(config.augment.scale), seed=config.seed, threads=threads, prefetch=1,
        )
    )  # fmt: skip
    next(batches)
    start, images = perf_counter(), 0
    while images == 0 or perf_counter() - start < SECONDS_OF_INPUT:
        next(batches)
        images += size
    return images / (perf_counter() - start)


def _amount(size: float) -> str:
    return f'{size / 2**20:,.0f} MiB' if size < 2**30 else f'{size / 2**30:,.1f} GiB'


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
