"""What a run will need, before it starts: python -m effdet_jax plan --config=configs/d3.py:voc2007 [--memory=16GiB]

Parameters and multiply-accumulates, how the anchors fit the data, the memory of a training step and the largest batch
that fits, the time of an epoch. The compiler says what the step needs on the devices of this machine, so run it on one
like the one that you will train on. Any key of the config is a flag: --config.model.remat=True.
"""

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007', lock_config=True
)
MEMORY = flags.DEFINE_string('memory', '', 'of one device, e.g. 16GiB; without it, that of the device of this machine')
BATCH = flags.DEFINE_integer('batch', None, 'short for --config.train.batch_size', lower_bound=1)
NO_STEP = flags.DEFINE_bool('no-step', False, 'do not compile the training step: seconds, but no activations, no time')
NO_DATA = flags.DEFINE_bool('no-data', False, 'do not open the training data: no anchors, 90 classes unless named')
FIT = flags.DEFINE_bool('fit', False, 'propose anchor scale and aspect ratios by k-means on IoU')
DRAW = flags.DEFINE(cli.PATH, 'draw', None, 'SVG or PNG file for a picture of the feature network')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'Markdown file for the plan')


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag, --config=FILE --memory=16GiB')
    if FIT.value and NO_DATA.value:
        raise app.UsageError('--fit needs the data: leave --no-data away')
    from effdet_jax.commands.plan import planner  # after the flags: --help must not wait for jax
    from effdet_jax.records.console import result
    from effdet_jax.records.files import write_atomically

    config = CONFIG.value
    if BATCH.value:
        config.train.batch_size = BATCH.value
    memory = planner.parse_bytes(MEMORY.value) if MEMORY.value else None
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
