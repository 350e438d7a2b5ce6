r"""Memory of training steps on a CPU as `plan` predicts it, beside what the process really takes.

    python -m experiments.benchmarks.memory --config=configs/d0.py --config.image.size='(256, 256)' \
        --config.train.batch_size=8

One setting in one process, since memory that an earlier one has freed would hide what the next one needs. Linux only.
Counted: how far the peak of the resident set (VmHWM of /proc/self/status, reset when everything is compiled) rises
above the resident set with the state in place, and the size of that state; so state, batches, activations, and
whatever the allocators add. Not counted: Python, libraries, the compiler and the programs, which were there before.
"""

import sys

import jax
from ml_collections import config_flags

from effdet_jax import cli, measuring
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.records.metrics import say, table
from effdet_jax.training import footprint, parallel
from effdet_jax.training.step import compile_step

CONFIG = config_flags.DEFINE_config_file('config', None, 'FILE', lock_config=True)
NUM_CLASSES, OBJECTS = 90, 8


def main(_) -> None:
    config = CONFIG.value
    model = build_model(config.model, NUM_CLASSES, parallel.AXIS)
    step = footprint.plan_step(config, model, image_anchors(config), frozen=False)
    batch = footprint.random_batch(config, config.train.batch_size, NUM_CLASSES, OBJECTS)
    compiled = compile_step(step.lower(batch))
    predicted = step.memory(batch, compiled).total
    state, state_bytes = step.random_state(), footprint.tree_bytes(step.state)
    measuring.settle()
    before = measuring.resident_bytes() - state_bytes
    seconds = footprint.seconds_per_step(compiled, state, batch)
    measured = measuring.peak_bytes() - before
    c = config
    setting = (
        f'{c.name} {c.image.size[0]}x{c.image.size[1]}, batch {c.train.batch_size}',
        c.model.remat,
        c.train.accumulate,
    )
    header = ('setting', 'remat', 'accumulate', 'predicted MiB', 'measured MiB', 'predicted / measured', 's for a step')
    row = *map(str, setting), round(predicted / 2**20), round(measured / 2**20), predicted / measured, f'{seconds:.2f}'
    say(f'{parallel.describe_devices()}, jax {jax.__version__}, Python {sys.version.split()[0]}\n')
    say(table(header, [row]))


if __name__ == '__main__':
    cli.run(main, required=('config',))
