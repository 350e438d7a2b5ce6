"""Writes a golden's network as the Keras file of the official implementation, to import it like a released one.

    python -m experiments.certify.official_checkpoint d0 OUT.h5

The golden (tests/goldens/network_d0.npz) holds what the official code computed; its weights follow from their names.
"""

import sys
from pathlib import Path

import h5py

from tests import goldens


def main(name: str, out: str) -> None:
    arrays = goldens.official_arrays(goldens.load(f'network_{name}')['variables'])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(out, 'w') as file:
        for variable, array in arrays.items():
            layer = variable.split('/')[0]  # Keras repeats it before its variables
            file[f'{layer}/{variable}:0'] = array
    print(f'{out}: {len(arrays)} variables')


if __name__ == '__main__':
    main(*sys.argv[1:])
