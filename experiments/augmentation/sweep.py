r"""Each augmentation of the device alone, and none: AP at equal steps.

    python -m experiments.augmentation.sweep runs/augmentation --config=configs/bccd.py \
        --config.dataset.source=voc:path/to/bccd
"""

import sys

from experiments import sweeps

# name of the row -> how often each augmentation is applied. What they do is left at its default.
PROBABILITIES = {
    'none': {},
    'color_jitter': {'color_jitter': 0.8},
    'rand_augment': {'rand_augment': 0.5},
    'mosaic': {'mosaic': 0.5},
    'mixup': {'mixup': 0.25},
    'erasing': {'erasing': 0.5},
}


def rows() -> list[sweeps.Row]:
    return [
        sweeps.Row(label, {f'augment.{name}.probability': share for name, share in shares.items()})
        for label, shares in PROBABILITIES.items()
    ]


if __name__ == '__main__':
    sys.exit(sweeps.main(rows(), str(__doc__).splitlines()[0]))
