"""Write an HTML report about a run: python -m effdet_jax report --workdir=runs/d3 [--out=FILE]

Evaluates the best checkpoint on the evaluation split and writes one self-contained HTML page: metrics, curves, kinds of
error, and the best and worst images. Any key of the config can be changed: --config.dataset.source=voc:FOLDER.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from effdet_jax import config as run_config
from effdet_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'by default the config of the work directory', lock_config=True
)
WORKDIR = flags.DEFINE(cli.PATH, 'workdir', None, 'the training run')
OUT = flags.DEFINE(cli.PATH, 'out', None, 'the page to write; by default report.html in the work directory')


def main(_: Sequence[str]) -> None:
    workdir = WORKDIR.value
    assert workdir  # required
    config = CONFIG.value or run_config.load(workdir)  # raises if this is no work directory
    from effdet_jax import evaluate, reporting  # after the flags: --help must not wait for jax
    from effdet_jax.records.console import result
    from effdet_jax.runtime import devices

    devices.start_hosts()
    out = OUT.value or workdir / reporting.FILE
    best = evaluate.best_evaluation(config, workdir)
    if devices.is_first_host():
        reporting.write_report(config, workdir, out, best.source, best.step, best.metrics, best.results)
        result(f'AP {best.metrics["AP"]:.3f}  AP50 {best.metrics["AP50"]:.3f}  {out}')


if __name__ == '__main__':
    cli.run(main, required=('workdir',))
