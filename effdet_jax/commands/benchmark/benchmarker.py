"""Measures inference, the training step and the input pipeline on this machine. `start_times` measures the start."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np

from effdet_jax import data
from effdet_jax.build import host_batch_size
from effdet_jax.commands.benchmark.peaks import Peak, peak
from effdet_jax.errors import explaining_write_errors
from effdet_jax.inference.detector import Detector, Thresholds, image_anchors, make_detect, make_detect_pixels
from effdet_jax.model import EfficientDet, build_model
from effdet_jax.model.cost import cost_of_parts
from effdet_jax.records.console import stage, track
from effdet_jax.runtime import devices, process, timing, xla
from effdet_jax.training import footprint
from effdet_jax.training.compiled import compile_step, map_train_step
from effdet_jax.training.state import init_state, init_variables

PHOTO = 480, 640  # height and width of the photographs, the most common size in COCO
CLASSES_WITHOUT_DATA = 90
OBJECTS = 8  # per training image
SECONDS_OF_A_BLOCK = 0.5
PROFILED_CALLS = 3
MIB = 2**20

Row = dict[str, Any]


class Task(NamedTuple):
    """Something to time."""

    what: str
    batch: int  # images per call
    flops: float  # of the convolutions in one call
    start: Callable[[], tuple[Callable[[], Any], float | None]]  # -> (function to time, bytes moved per call, if known)
    ahead: int = 0  # unfinished calls when the next one starts


def infer(config: Any, batches: Sequence[int], repeats: int, profile: Path | None = None) -> Iterator[Row]:
    """A row for each stage and batch size: the network only, resized images to boxes, photographs to boxes."""
    model = build_model(config.model, num_classes(config))
    with stage('initialising weights'):
        variables = jax.block_until_ready(init_variables(model, config.seed))
    flops = forward_flops(config, model)
    best = _peak(config)
    for batch in batches:
        for what, make in INFERENCE.items():
            start = functools.partial(make, config, model, variables, batch)
            yield _timed(Task(what, batch, flops * batch, start), repeats, best, profile)


def train(config: Any, repeats: int, profile: Path | None = None) -> Iterator[Row]:
    """One row: the training step, as the training loop runs it."""
    classes = num_classes(config)
    model = build_model(config.model, classes, devices.AXIS)
    batch_size = host_batch_size(config)
    with stage('initialising weights'):
        variables = init_variables(model, config.seed)
    anchors_N4, batch = image_anchors(config), footprint.random_batch(config, batch_size, classes, OBJECTS)

    def start() -> tuple[Callable[[], Any], float | None]:
        step, optimizer = map_train_step(config, model, anchors_N4, 10**6, 10**6)  # long warm-up: a tiny learning rate
        state = devices.replicate(
            init_state(variables, optimizer, config.train.ema_decay, config.adversarial.weight > 0)
        )
        compiled = compile_step(step.lower(state, devices.shard(batch), False))

        def call() -> Any:
            nonlocal state
            state, metrics = compiled(state, devices.shard(batch))
            return metrics

        return call, _bytes_moved(compiled)

    flops = 3 * forward_flops(config, model) * batch_size  # forward, gradient of the inputs, gradient of the kernels
    num_devices = jax.local_device_count()
    task = Task('training step', batch_size, flops / num_devices, start, devices.steps_ahead())
    yield _timed(task, repeats, _peak(config), profile)


def read(config: Any) -> Iterator[Row]:
    """A row for each stage of the input pipeline, on the training data of the config."""
    d = config.dataset
    source = data.open_source(d.source, d.train_split, d.class_names)
    with stage('measuring the input pipeline'):
        rates = data.stage_rates(
            source, image_size=tuple(config.image.size), scale_range=tuple(config.augment.scale),
            threads=os.cpu_count() or 1,
        )  # fmt: skip
    for what, images_per_second in rates.items():
        yield {'what': what, 'images/s': images_per_second}


def num_classes(config: Any) -> int:
    """The number of classes in the config, or COCO's 90 if it names none. Does not open the data."""
    return len(config.dataset.class_names) or CLASSES_WITHOUT_DATA


def forward_flops(config: Any, model: EfficientDet) -> float:
    """Operations per image: two for each multiply-accumulate of the convolutions."""
    height, width = config.image.size
    return 2 * sum(cost.macs for cost in cost_of_parts(model, (height, width)).values())


def _network(config: Any, model: EfficientDet, variables: Any, batch: int) -> tuple[Callable[[], Any], float | None]:
    images = jax.device_put(np.random.default_rng(0).standard_normal((batch, *config.image.size, 3), np.float32))
    compiled = xla.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, images).compile()
    return lambda: compiled(variables, images), _bytes_moved(compiled)


def _resized_to_boxes(
    config: Any, model: EfficientDet, variables: Any, batch: int
) -> tuple[Callable[[], Any], float | None]:
    """From images that the host has resized, as in evaluation, to boxes."""
    images = np.random.default_rng(0).integers(0, 256, (batch, *config.image.size, 3), np.uint8)
    sizes = np.tile(np.array(config.image.size, np.int32), (batch, 1))
    compiled = xla.jit(make_detect(config, model)).lower(variables, images, sizes).compile()
    return lambda: jax.device_get(compiled(variables, images, sizes)), _bytes_moved(compiled)


def _photograph_to_boxes(
    config: Any, model: EfficientDet, variables: Any, batch: int
) -> tuple[Callable[[], Any], float | None]:
    """From photographs to boxes in NumPy, by calling a `Detector`."""
    classes, c = num_classes(config), config.eval
    function = functools.partial(xla.jit(make_detect_pixels(config, model)), variables)
    names = tuple(f'class {label}' for label in range(classes))
    thresholds = Thresholds(c.score_threshold, c.nms_iou_threshold, c.sigma)
    detector = Detector([function], names, tuple(range(1, classes + 1)), thresholds, batch_size=batch)
    photos = list(np.random.default_rng(0).integers(0, 256, (batch, *PHOTO, 3), np.uint8))
    detector(photos)
    return lambda: detector(photos), None


INFERENCE = {
    'network only': _network,
    'resized image to boxes': _resized_to_boxes,
    f'photograph {PHOTO[0]}x{PHOTO[1]} to boxes': _photograph_to_boxes,
}


def _timed(task: Task, repeats: int, best: Peak, profile: Path | None) -> Row:
    """Compiles, warms up and measures a task; returns a row for the tables."""
    name = f'{task.what}, batch {task.batch}'
    before = perf_counter()
    with stage(f'compiling {name}'):
        call, moved = task.start()
        compile_seconds = perf_counter() - before
    wait = jax.block_until_ready
    wait(call())
    timing.settle()
    calls = timing.calls_in(SECONDS_OF_A_BLOCK, timing.seconds_of(lambda: wait(call())))
    blocks = [
        timing.seconds_per_call(call, wait, calls, task.ahead) for _ in track(range(repeats), repeats, name)
    ]  # fmt: skip
    memory = _peak_memory()
    with _trace(profile, name):
        for _ in range(PROFILED_CALLS if profile else 0):
            wait(call())
    seconds = timing.spread(blocks)
    return {
        'what': task.what,
        'batch': task.batch,
        'seconds': seconds.as_dict(),
        'images/s': task.batch / seconds.median,
        'flops/s': task.flops / seconds.median,
        'share of peak flops': task.flops / seconds.median / best.flops,
        'bytes moved': moved,
        'share of peak bandwidth': moved and moved / seconds.median / best.bandwidth,
        'peak': best._asdict(),
        'peak memory': memory,
        'compile_s': compile_seconds,
        'blocks': blocks,
    }


def _peak(config: Any) -> Peak:
    with stage('finding the peak of this device'):
        return peak(config.model.dtype)


def _bytes_moved(compiled: jax.stages.Compiled) -> float | None:
    """Bytes moved between fused kernels and memory on each device, as counted by the compiler."""
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return costs.get('bytes accessed') if costs else None


def _peak_memory() -> int:
    """Peak bytes of the device since the start of this process; on a CPU, of the process since the warm-up."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get('peak_bytes_in_use') or timing.peak_bytes()


def _trace(profile: Path | None, name: str) -> AbstractContextManager:
    if profile is None:
        return nullcontext()
    # The profiler's records fragment the memory that glibc keeps, so every call would have to allocate anew.
    process.keep_scratch_memory(process.KEPT_BY_GLIBC)
    with explaining_write_errors(profile, 'choose another --profile'):
        return jax.profiler.trace(str(profile / name.replace(', ', '-').replace(' ', '_')))
