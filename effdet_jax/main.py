"""Train and evaluate: python -m effdet_jax.main --config=configs/d3.py [--workdir=runs/d3]

Without --workdir the run goes to runs/NAME: runs/d3 for configs/d3.py, runs/d3_voc2007_report for
configs/d3.py:voc2007,report.
Start it again with the same --workdir and it continues. Any key of the config is a flag: --config.train.epochs=40.
On several hosts start it on every one; TPU VMs and Slurm need no more flags, others --coordinator and the two after it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007', lock_config=True
)
WORKDIR = flags.DEFINE(
    cli.PATH,
    'workdir',
    None,
    'where the run keeps its checkpoints, metrics and pictures; else runs/NAME by the config',
)
MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train, or evaluate the best checkpoint of the workdir')
COORDINATOR = flags.DEFINE_string('coordinator', '', 'several processes: HOST:PORT of process 0, free to listen on')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'several processes: how many', lower_bound=1)
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'several processes: which one this is, from 0', lower_bound=0)


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise app.UsageError(f'unexpected {" ".join(arguments)}: everything is a flag, --config=FILE --workdir=DIR')
    from effdet_jax.records.console import info

    workdir = WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS['config']))
    if not WORKDIR.value:
        info(f'work directory: {workdir} (--workdir=DIR names another)')
    from effdet_jax import evaluate, train  # after the flags: --help must not wait for jax
    from effdet_jax.runtime import devices

    devices.start_hosts(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    run = {'train': train.train_and_evaluate, 'eval': evaluate.evaluate_best}[MODE.value]
    with devices.failing_together():
        metrics = run(CONFIG.value, workdir)
    if metrics:  # a run that was told to stop has none
        train.report(metrics, workdir)


def default_workdir(config: str) -> Path:
    """runs/NAME for `configs/NAME.py`, runs/NAME_WORDS for `configs/NAME.py:WORDS`; for a saved config its own folder.

    So the runs of different presets are kept apart; two runs of one preset with different keys refuse each other.
    """
    file, _, words = config.partition(':')
    if Path(file) == cli.SAVED:
        return Path(words)
    return Path('runs') / '_'.join(re.findall(r'[\w.=-]+', f'{Path(file).stem} {words}'))


if __name__ == '__main__':
    cli.run(main, required=('config',))
