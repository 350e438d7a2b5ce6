r"""Memory of training steps as `plan` predicts it, beside what they really take.

    python -m experiments.benchmarks.memory --config=configs/d0.py --config.image.size='(256, 256)' \
        --config.train.batch_size=8

One setting in one process, since memory that an earlier one has freed would hide what the next one needs.

On a CPU (Linux): how far the peak of the resident set (VmHWM of /proc/self/status, reset when everything is compiled)
rises above the resident set with the state in place, and the size of that state; so state, batches, activations, and
whatever the allocators add. Not counted: Python, libraries, the compiler and the programs, which were there before.
Elsewhere: the peak of the device's allocator.

With --largest it goes on to the largest batch that should fit, by the line through this batch and its double, and runs
a step of that. Where the compiler asks for more than the line says, the line goes through what it asked for.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from effdet_jax.commands import cli
from effdet_jax.commands.plan.memory import device_memory, line_through, parse_bytes
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.records.console import info, result, table
from effdet_jax.records.files import write_atomically
from effdet_jax.runtime import devices, timing
from effdet_jax.training import footprint
from effdet_jax.training.compiled import compile_step

CONFIG = config_flags.DEFINE_config_file('config', None, 'FILE', lock_config=True)
LARGEST = flags.DEFINE_bool('largest', False, 'find the largest batch that fits, and run it')
LIMIT = flags.DEFINE_string('memory', '', 'of a device, for --largest, e.g. 16GiB; default: what this one has')
OUT = flags.DEFINE_string('out', '', 'JSON file for everything measured')
NUM_CLASSES, OBJECTS = 90, 8
MIB = 2**20

Row = dict[str, Any]


def main(_) -> None:
    config, report = CONFIG.value, {'device': devices.describe_devices(), 'jax': jax.__version__, 'rows': []}
    info(f'{report["device"]}, jax {jax.__version__}, Python {sys.version.split()[0]}\n')

    def keep(row: Row) -> None:
        report['rows'].append(row)
        if OUT.value:
            write_atomically(Path(OUT.value), (json.dumps(report, indent=1) + '\n').encode())

    try:
        first = measure(config, config.train.batch_size)
        keep(first)
        if LARGEST.value:
            report['limit'] = limit = parse_bytes(LIMIT.value) if LIMIT.value else device_memory()[0]
            keep(other := predict(config, 2 * first['batch']))
            while (largest := _largest(first, other, limit, config.train.gradient_accumulation_steps)) > first['batch']:
                keep(other := measure(config, largest, limit))
                if other['predicted'] <= limit:
                    break
            report['largest'] = largest
    finally:
        result('\n' + summary(config, report) + '\n')


def _largest(first: Row, other: Row, limit: float, multiple: int) -> int:
    """Of the batches below `limit` on the line through two of them; less than `other` where that is above it."""
    line = line_through({row['batch']: float(row['predicted']) for row in (first, other)})
    largest = line.largest(limit, multiple) if line.per_image > 0 else other['batch']
    return min(largest, other['batch'] - multiple) if other['predicted'] > limit else largest


def predict(config: Any, batch: int) -> Row:
    """{'batch', 'predicted': bytes}."""
    step, arrays = _step(config), _arrays(config, batch)
    return {'batch': batch, 'predicted': step.memory(arrays, footprint.compile_layout(step.lower(arrays))).total}


def measure(config: Any, batch: int, limit: float = math.inf) -> Row:
    """{'batch', 'predicted': bytes, 'measured': bytes, 'seconds': of a step}; without the last two above `limit`."""
    step, arrays = _step(config), _arrays(config, batch)
    compiled = compile_step(step.lower(arrays))
    predicted = step.memory(arrays, compiled).total
    if predicted > limit:
        return {'batch': batch, 'predicted': predicted}
    state, on_cpu = step.random_state(), jax.default_backend() == 'cpu'
    before = 0
    if on_cpu:
        timing.settle()
        before = timing.resident_bytes() - footprint.tree_bytes(step.state)
    seconds = footprint.seconds_per_step(compiled, state, arrays)
    measured = timing.peak_bytes() - before if on_cpu else jax.local_devices()[0].memory_stats()['peak_bytes_in_use']
    return {'batch': batch, 'predicted': predicted, 'measured': measured, 'seconds': seconds}


def _step(config: Any) -> footprint.PlannedStep:
    model = build_model(config.model, NUM_CLASSES, devices.AXIS)
    return footprint.plan_step(config, model, image_anchors(config), frozen=False)


def _arrays(config: Any, batch: int) -> footprint.HostBatch:
    return footprint.random_batch(config, batch, NUM_CLASSES, OBJECTS)


def summary(config: Any, report: dict[str, Any]) -> str:
    """A Markdown table."""
    c, rows = config, []
    for row in report['rows']:
        setting = f'{c.name} {c.image.size[0]}x{c.image.size[1]}, {c.model.dtype}, batch {row["batch"]}'
        predicted, measured = row['predicted'], row.get('measured')
        rows.append(
            (setting, str(c.model.remat), str(c.train.gradient_accumulation_steps), round(predicted / MIB),
             measured and round(measured / MIB), measured and predicted / measured,
             f'{row["seconds"]:.2f}' if measured else '-')
        )  # fmt: skip
    header = ('setting', 'remat', 'accumulate', 'predicted MiB', 'measured MiB', 'predicted / measured', 's for a step')
    title = f'Memory of a training step, {report["device"]}\n'
    text = table(header, rows, title) if rows else title
    if 'largest' in report:
        text += f'\n\nLargest batch in {report["limit"] / MIB:,.0f} MiB: {report["largest"]}'
    return text


if __name__ == '__main__':
    cli.run(main, required=('config',))
