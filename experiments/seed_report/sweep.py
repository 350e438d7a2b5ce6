r"""Claims of docs/seed_report.md on the embedded shapes: three sizes, two rates, the backbone frozen at first or not.

    python -m experiments.seed_report.sweep runs/seed_report --config=configs/d0.py:report \
        --config.image.size='(128, 128)' --config.train.epochs=1 --config.train.batch_size=8
"""

import sys

from effdet_jax.configs.scaling import SCALES
from experiments import sweeps

# What makes D1 of D0 but for the size of its input, which is the same here for all.
SIZE_KEYS = ('backbone', 'fpn_channels', 'fpn_cells', 'head_layers', 'stochastic_depth')
NEVER = {'train.freeze': ''}
HALF = {'train.freeze': 'backbone', 'train.unfreeze_epoch': 0.5}  # of one epoch


def rows() -> list[sweeps.Row]:
    sizes = {name: {f'model.{key}': getattr(SCALES[name], key) for key in SIZE_KEYS} for name in ('d0', 'd1', 'd3')}
    return [
        *(sweeps.Row(name, NEVER | size) for name, size in sizes.items()),
        sweeps.Row('d0_rate_1e-5', NEVER | {'schedule.learning_rate': 1e-5}),
        sweeps.Row('d0_frozen_half', HALF),
    ]


if __name__ == '__main__':
    sys.exit(sweeps.main(rows(), str(__doc__).splitlines()[0]))
