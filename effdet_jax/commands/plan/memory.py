"""Memory of training and evaluation, and the largest batch that fits: from compiled programs, without running them."""

import dataclasses
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from effdet_jax.errors import UserError
from effdet_jax.inference.detector import make_detect
from effdet_jax.model import EfficientDet
from effdet_jax.records.console import stage, table
from effdet_jax.runtime import devices
from effdet_jax.training import footprint
from effdet_jax.training.compiled import compile_step
from effdet_jax.training.footprint import HostBatch, PlannedStep, StepMemory

UNITS = {'B': 1, 'KB': 1e3, 'MB': 1e6, 'GB': 1e9, 'TB': 1e12, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30, 'TIB': 2**40}


class Line(NamedTuple):
    """Bytes on one device as a linear function of its batch size, through two compiled batch sizes."""

    fixed: float
    per_image: float
    batches: tuple[int, int]

    def at(self, batch: int) -> float:
        """The predicted bytes."""
        return self.fixed + self.per_image * batch

    def largest(self, limit: float, multiple: int = 1) -> int:
        """The largest multiple of `multiple` that fits into `limit` bytes as a batch, or 0."""
        return max(0, math.floor((limit - self.fixed) / self.per_image / multiple) * multiple)


def line_through(points: dict[int, float]) -> Line:
    """The line through two points, {batch size of a device: bytes}."""
    (a, bytes_a), (b, bytes_b) = sorted(points.items())
    per_image = (bytes_b - bytes_a) / (b - a)
    return Line(bytes_a - per_image * a, per_image, (a, b))


def parse_bytes(text: str) -> int:
    """The bytes in '16GiB', '24 GB' or '900MiB'.

    Raises:
      UserError: if the text is not a positive amount with a unit.
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*', text.upper())
    if not match or not (size := int(float(match[1]) * UNITS[match[2]])):
        raise UserError(f'--memory={text} is not an amount of memory: use a number and a unit, such as 16GiB or 24GB')
    return size


def device_memory() -> tuple[int, str]:
    """(bytes available to this program on one device, description of the device)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' in statistics:
        return statistics['bytes_limit'], f'a {jax.local_devices()[0].device_kind}'
    # On a CPU, training will also need what Python and the compiler use in this process.
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    description = f'this machine ({_amount(total)}, of which Python and the compiler use {_amount(used)})'
    return (total - used) // jax.local_device_count(), description


def compile_two(
    step: PlannedStep, batch_of: Callable[[int], HostBatch], batch_size: int, accumulate: int
) -> tuple[StepMemory, Line, jax.stages.Compiled | None]:
    """(memory at this batch size, memory for any batch size, compiled step or None if it exceeds the memory)."""
    num_devices = jax.local_device_count()
    unit = num_devices * accumulate
    compiled, bytes_at = None, {}
    with stage(f'compiling the training step for batch {batch_size}'):
        try:
            compiled = compile_step(step.lower(batch_of(batch_size)))
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
    memory = step.memory(batch_of(batch_size), compiled)
    if compiled:
        bytes_at[batch_size // num_devices] = float(memory.total)
    for size in [batch_size // 2 // unit * unit or 2 * batch_size] if compiled else [unit, 2 * unit]:
        with stage(f'compiling the training step for batch {size}'):
            layout = footprint.compile_layout(step.lower(batch_of(size)))
        bytes_at[size // num_devices] = float(step.memory(batch_of(size), layout).total)
    line = line_through(bytes_at)
    if compiled is None:
        temporary = round(line.at(batch_size // num_devices) - memory.total)
        memory = dataclasses.replace(memory, temporary=temporary)
    return memory, line, compiled


def memory_table(config: Any, memory: StepMemory) -> str:
    """The memory of a training step on each device, and of the batches on the host, as Markdown."""
    c = config
    rows = [
        ('parameters and batch statistics', memory.variables),
        (f'optimizer state ({c.optimizer.name})', memory.optimizer),
        ('moving average', memory.average),
        ('this batch and the next', memory.batches),
        ('activations and other temporaries', memory.temporary),
    ]
    if memory.temporary is not None:
        rows.append(('total', memory.total))
    title = (
        f'Memory of a training step on each device: batch {c.train.batch_size} on {devices.describe_devices()}, '
        f'{c.model.dtype}, remat={c.model.remat}, gradient_accumulation_steps={c.train.gradient_accumulation_steps}\n'
    )
    grid = table(('what', 'MiB'), [(what, None if size is None else round(size / 2**20)) for what, size in rows], title)
    host = c.image.size[0] * c.image.size[1] * 3 * c.train.batch_size // jax.process_count() * c.dataset.prefetch
    prefetch = f'config.dataset.prefetch={c.dataset.prefetch}'
    return f'{grid}\n\nPrefetched batches take up to {_amount(host)} on the host ({prefetch}).'


def largest_batch(config: Any, batch_size: int, line: Line, limit: int, description: str) -> str:
    """The largest batch within `limit` bytes per device, and advice if the config's own does not fit."""
    t, per_device = config.train, batch_size // jax.local_device_count()
    steps = t.gradient_accumulation_steps
    largest = line.largest(limit, steps) * jax.device_count()
    sizes = ' and '.join(str(batch * jax.device_count()) for batch in line.batches)
    text = (
        f'Largest batch in {_amount(limit)} of {description}: {largest:,}. Estimated from compiled batches {sizes}: '
        f'{_amount(line.fixed)} plus {_amount(line.per_image)} per image on each device.'
    )
    if line.at(per_device) <= limit:
        return text
    splits = (n for n in range(steps + 1, batch_size + 1) if per_device % n == 0)
    fits = next((n for n in splits if line.at(math.ceil(per_device / n * steps)) <= limit), None)
    accumulate = f' or --config.train.gradient_accumulation_steps={fits}' if fits else ''
    return (
        f'{text}\n\nBatch {t.batch_size} does not fit: use --config.train.batch_size={largest}{accumulate}; '
        '--config.model.remat=True and --config.model.dtype=bfloat16 reduce the memory per image.'
    )


def evaluation_memory(config: Any, model: EfficientDet, step: PlannedStep) -> str:
    """The memory of an evaluation during training."""
    images = devices.host_batch_size('config.eval.batch_size', config.eval.batch_size)
    batch = devices.shard(
        {'image': np.zeros((images, *config.image.size, 3), np.uint8), 'valid_size': np.zeros((images, 2), np.int32)}
    )
    with stage(f'compiling evaluation for batch {images}'):
        detect = devices.map_devices(make_detect(config, model))
        lowered = detect.lower(footprint.replicated(step.state.best_variables), batch['image'], batch['valid_size'])
        temporary = footprint.temporary_bytes(footprint.compile_layout(lowered))
    own = temporary + footprint.tree_bytes(batch) // jax.local_device_count()
    total = own + footprint.tree_bytes(step.state)
    return (
        f'Evaluation of {config.eval.batch_size} images at a time (config.eval.batch_size) needs {_amount(own)} on '
        f'each device, {_amount(total)} with the training state.'
    )


def _amount(size: float) -> str:
    return f'{size / 2**20:,.0f} MiB' if size < 2**30 else f'{size / 2**30:,.1f} GiB'
