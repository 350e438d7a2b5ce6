r"""Freezing (docs/seed_report.md, Training) with a backbone that knows ImageNet: BCCD, Lite0, Adam.

    python -m experiments.seed_report.pretrained runs/seed_report_pretrained --config=configs/bccd.py:lite0,report \
        --config.dataset.source=voc:path/to/bccd --config.train.init_from=runs/lite0_imagenet --config.train.epochs=10
"""

import sys

from experiments import sweeps

ROWS = [
    sweeps.Row('never_frozen', {'train.freeze': ''}),
    sweeps.Row('frozen_half', {'train.freeze': 'backbone', 'train.unfreeze_epoch': 5.0}),
    sweeps.Row('frozen', {'train.freeze': 'backbone', 'train.unfreeze_epoch': 10.0}),
]

if __name__ == '__main__':
    sys.exit(sweeps.main(ROWS, str(__doc__).splitlines()[0]))
