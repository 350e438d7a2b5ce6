r"""With and without adversarial examples (Det-AdvProp), at equal steps.

python -m experiments.advprop.sweep runs/advprop --config=configs/bccd.py --config.dataset.source=voc:path/to/bccd
"""

import sys

from experiments import sweeps

ROWS = [sweeps.Row('without', {}), sweeps.Row('with', {'adversarial.weight': 1.0})]

if __name__ == '__main__':
    sys.exit(sweeps.main(ROWS, str(__doc__).splitlines()[0]))
