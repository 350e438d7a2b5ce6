"""Measure the speed of a config on this machine: python -m effdet_jax benchmark --config=configs/d0.py --what=train

infer: the network alone, resized images to boxes, photographs to boxes. train: the training step. data: the stages of
the input pipeline. startup: from the command to the first step, with an empty and with a full compilation cache. Any
key of the config is a flag: --config.model.dtype=bfloat16. Run nothing else on the machine meanwhile.
"""

import json
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli
from effdet_jax.errors import explaining_write_errors

CONFIG = config_flags.DEFINE_config_file('config', None, cli.CONFIG_HELP, lock_config=True)
WHAT = flags.DEFINE_enum('what', 'infer', ['infer', 'train', 'data', 'startup'], 'what to measure')
BATCH = flags.DEFINE_list('batch', ['1', '8'], 'batch sizes of infer; for train set --config.train.batch_size')
REPEATS = flags.DEFINE_integer(
    'repeats', None, 'blocks of half a second (infer, train; default 10) or starts (startup; default 3)', lower_bound=1
)
LOWER = flags.DEFINE_bool('lower-only', False, 'startup: trace and lower the training step without compiling it')
PROFILE = flags.DEFINE(cli.PATH, 'profile', None, 'infer, train: folder for traces of a few calls')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'JSON file for all measurements')

DEFAULT_REPEATS = {'infer': 10, 'train': 10, 'startup': 3}


def main(_: Sequence[str]) -> None:
    what = WHAT.value
    if not all(size.isdecimal() and int(size) for size in BATCH.value):
        raise app.UsageError(f'--batch={",".join(BATCH.value)}: give whole numbers, e.g. --batch=1,8')
    if PROFILE.value and what not in ('infer', 'train'):
        raise app.UsageError(f'--profile works with --what=infer and train, not with {what}')
    if LOWER.value and what != 'startup':
        raise app.UsageError(f'--lower-only works with --what=startup, not with {what}')
    # After the flags: --help must not wait for jax.
    import jax

    from effdet_jax.commands.benchmark import benchmarker, speed_tables, start_times
    from effdet_jax.records.console import info, result
    from effdet_jax.records.files import write_atomically

    jax.config.update('jax_enable_compilation_cache', False)  # in this process, not in those of startup
    config, profile = CONFIG.value, PROFILE.value
    repeats = REPEATS.value or DEFAULT_REPEATS.get(what, 0)
    rows = list(
        {
            'infer': lambda: benchmarker.infer(config, tuple(map(int, BATCH.value)), repeats, profile),
            'train': lambda: benchmarker.train(config, repeats, profile),
            'data': lambda: benchmarker.read(config),
            'startup': lambda: start_times.measure(config, repeats, not LOWER.value),
        }[what]()
    )
    settings = speed_tables.settings(config, what)
    result('\n' + speed_tables.to_markdown(settings, rows))
    if profile:
        info(
            f'\nTraces are in {profile}. To view them, drop a trace.json.gz onto https://ui.perfetto.dev, or '
            f'pip install xprof and run xprof --logdir={profile}'
        )
    if OUT.value:
        content = json.dumps({'settings': settings, 'rows': rows}, indent=1) + '\n'
        with explaining_write_errors(OUT.value, 'choose another --out'):
            write_atomically(OUT.value, content.encode())


if __name__ == '__main__':
    cli.run(main, required=('config',))
