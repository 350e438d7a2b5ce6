"""How fast a config is on this machine: python -m effdet_jax benchmark --config=configs/d0.py --what=train

infer: the network, resized images to boxes, photographs to boxes. train: the training step. data: the stages of the
input. startup: from the command to the first step, with an empty compilation cache and with a full one. Any key of the
config is a flag: --config.model.dtype=bfloat16. Figures of a machine that does something else, too, mean little.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli
from effdet_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007', lock_config=True
)
WHAT = flags.DEFINE_enum('what', 'infer', ['infer', 'train', 'data', 'startup'], 'what to measure')
BATCH = flags.DEFINE_list('batch', ['1', '8'], 'batch sizes of infer; that of train is --config.train.batch_size')
REPEATS = flags.DEFINE_integer(
    'repeats', None, 'blocks of half a second (infer, train; 10 unless given), starts (startup; 3)', lower_bound=1
)
LOWER = flags.DEFINE_bool('lower-only', False, 'startup: stop where the step is traced and lowered, do not compile')
PROFILE = flags.DEFINE(cli.PATH, 'profile', None, 'infer, train: a folder for traces of a few calls')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'JSON file for everything measured')

REPEATS_UNLESS_GIVEN = {'infer': 10, 'train': 10, 'startup': 3}


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag, --config=FILE --what=infer')
    what = WHAT.value
    if not all(size.isdecimal() and int(size) for size in BATCH.value):
        raise app.UsageError(f'--batch={",".join(BATCH.value)}: write whole numbers, e.g. --batch=1,8')
    if PROFILE.value and what not in ('infer', 'train'):
        raise app.UsageError(f'--profile traces infer and train, not {what}')
    if LOWER.value and what != 'startup':
        raise app.UsageError(f'--lower-only belongs to --what=startup, not to {what}')
    # After the flags: --help must not wait for jax.
    import jax

    from effdet_jax.commands.benchmark import benchmarker, speed_tables, start_times
    from effdet_jax.records.console import info, result

    jax.config.update('jax_enable_compilation_cache', False)  # of this process, not of the starts
    config, profile = CONFIG.value, PROFILE.value
    repeats = REPEATS.value or REPEATS_UNLESS_GIVEN.get(what, 0)
    rows = list(
        {
            'infer': lambda: benchmarker.infer(config, tuple(map(int, BATCH.value)), repeats, profile),
            'train': lambda: benchmarker.train(config, repeats, profile),
            'data': lambda: benchmarker.read(config),
            'startup': lambda: start_times.measure(config, repeats, not LOWER.value),
        }[what]()
    )
    settings = speed_tables.settings(config, what)
    result('\n' + speed_tables.report(settings, rows))
    if profile:
        info(
            f'\nTraces lie in {profile}. Look at them: drop a trace.json.gz onto https://ui.perfetto.dev, or '
            f'pip install xprof and xprof --logdir={profile}'
        )
    if OUT.value:
        _write(OUT.value, {'settings': settings, 'rows': rows})


def _write(out: Path, measured: dict[str, Any]) -> None:
    from effdet_jax.records.files import write_atomically

    try:
        write_atomically(out, (json.dumps(measured, indent=1) + '\n').encode())
    except OSError as error:
        raise UserError(f'--out={out} cannot be written ({error.strerror}): choose another file') from error


if __name__ == '__main__':
    cli.run(main, required=('config',))
