r"""How a node weighs what it fuses: fast normalised, softmax, plain sum; everything else equal.

python -m experiments.fusion.sweep runs/fusion --config=configs/quickstart.py --seeds=3
"""

import sys

from experiments import sweeps

# Tan, Pang, Le 2020, comparison of softmax and fast fusion: COCO AP with fast fusion less that with softmax, and how
# much faster fast fusion is on a GPU, for its three models.
PAPER = 'fast fusion: 0.08 to 0.30 AP less than softmax, 1.26 to 1.31 times as fast (GPU)'


def rows() -> list[sweeps.Row]:
    return [sweeps.Row(fusion, {'model.feature_network.fusion': fusion}) for fusion in ('fast', 'softmax', 'sum')]


if __name__ == '__main__':
    sys.exit(sweeps.main(rows(), f'{str(__doc__).splitlines()[0]} The paper: {PAPER}.'))
