"""Train and evaluate: python -m effdet_jax.main --config=configs/d3.py [--workdir=runs/d3]

The default work directory is runs/NAME: runs/d3 for configs/d3.py, runs/d3_voc2007_report for
configs/d3.py:voc2007,report. The same command again continues the run.
Any key of the config is a flag: --config.train.epochs=40.
With several hosts, start the command on each. TPU VMs and Slurm need no more flags; other clusters need --coordinator,
--num_processes and --process_id.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file('config', None, cli.CONFIG_HELP, lock_config=True)
WORKDIR = flags.DEFINE(
    cli.PATH, 'workdir', None, 'folder for checkpoints, metrics and pictures; by default runs/NAME, from the config'
)
MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train, or evaluate the best checkpoint of the workdir')
COORDINATOR = flags.DEFINE_string('coordinator', '', 'several processes: HOST:PORT of process 0, with a free port')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'several processes: their number', lower_bound=1)
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'several processes: number of this one, from 0', lower_bound=0)


def main(_: Sequence[str]) -> None:
    from effdet_jax.records.console import info

    workdir = WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS['config']))
    if not WORKDIR.value:
        info(f'work directory: {workdir} (--workdir=DIR chooses another)')
    from effdet_jax import evaluate, train  # after the flags: --help must not wait for jax
    from effdet_jax.runtime import devices

    devices.start_hosts(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    run = {'train': train.train_and_evaluate, 'eval': evaluate.evaluate_best}[MODE.value]
    with devices.failing_together():
        metrics = run(CONFIG.value, workdir)
    if metrics:  # none if the run was stopped by a signal
        train.print_summary(metrics, workdir)


def default_workdir(config: str) -> Path:
    """runs/NAME for `configs/NAME.py`, runs/NAME_WORDS for `configs/NAME.py:WORDS`, its own folder for a saved config.

    Every preset gets its own folder. A run with the same preset but other keys is refused there, not mixed in.
    """
    file, _, words = config.partition(':')
    if Path(file) == cli.SAVED:
        return Path(words)
    return Path('runs') / '_'.join(re.findall(r'[\w.=-]+', f'{Path(file).stem} {words}'))


if __name__ == '__main__':
    cli.run(main, required=('config',))
