"""Estimate what a run needs before it starts: python -m effdet_jax plan --config=configs/d3.py:voc2007 [--memory=16GiB]

Shows parameters and multiply-adds, how well the anchors match the data, the memory of a training step, the largest
batch that fits, and the time of an epoch. The training step is compiled for the devices of this machine, so use one
like the machine you will train on. Any key of the config is a flag: --config.model.remat=True.
"""

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007', lock_config=True
)
MEMORY = flags.DEFINE_string('memory', '', 'memory of one device, such as 16GiB; by default that of this machine')
BATCH = flags.DEFINE_integer('batch', None, 'same as --config.train.batch_size', lower_bound=1)
NO_STEP = flags.DEFINE_bool('no-step', False, 'do not compile the training step: fast, but no activations and times')
NO_DATA = flags.DEFINE_bool('no-data', False, 'do not open the training data: no anchors, 90 classes by default')
FIT = flags.DEFINE_bool('fit', False, 'propose an anchor scale and aspect ratios by k-means on IoU')
DRAW = flags.DEFINE(cli.PATH, 'draw', None, 'write a picture of the feature network to this SVG or PNG file')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'write the plan to this Markdown file')


def main(_: Sequence[str]) -> None:
    if FIT.value and NO_DATA.value:
        raise app.UsageError('--fit needs the data: remove --no-data')
    from effdet_jax.commands.plan import planner  # imported late to keep --help fast
    from effdet_jax.commands.plan.memory import parse_bytes
    from effdet_jax.records.console import result
    from effdet_jax.records.files import write_atomically

    config = CONFIG.value
    if BATCH.value:
        config.train.batch_size = BATCH.value
    memory = parse_bytes(MEMORY.value) if MEMORY.value else None
    if DRAW.value:
        planner.draw_feature_network(config, DRAW.value)
    sections = []
    for section in planner.plan(config, memory, not NO_DATA.value, not NO_STEP.value, FIT.value):
        result(f'\n{section}')
        sections.append(section)
    if OUT.value:
        write_atomically(OUT.value, ('\n\n'.join(sections) + '\n').encode())


if __name__ == '__main__':
    cli.run(main, required=('config',))
