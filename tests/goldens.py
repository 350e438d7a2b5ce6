"""The goldens: what the official implementation (google/automl @ 6a54c874, TensorFlow 2.15, float32) computes.

All boxes are yxyx pixels. The networks come without weights: those follow from a variable's name by the rule below.
effdet_keys.json.gz holds {model: {key: shape}} of the state_dict of effdet 0.4.1's models (timm 1.0.31, torch 2.13).
"""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_suffix('')


def load(name):
    """{key: array} of goldens/NAME.npz."""
    with np.load(FOLDER / f'{name}.npz') as file:
        return dict(file)


def effdet_keys():
    """{'tf_efficientdet_d0': {key: shape}, ...}"""
    return json.loads(gzip.decompress((FOLDER / 'effdet_keys.json.gz').read_bytes()))


def official_arrays(variables):
    """{official name: float32 array} for entries 'NAME 3x3x32x1' (a scalar has no shape)."""
    arrays = {}
    for entry in variables:
        name, _, shape = str(entry).partition(' ')
        arrays[name] = _weight(name, tuple(int(n) for n in shape.split('x')) if shape else ())
    return arrays


def network_input(image_shape):
    """The images, float32, already normalised."""
    return _normal('image', tuple(image_shape)).astype(np.float32)


def _normal(seed, shape):
    return np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape)


def _weight(name, shape):
    z = _normal(name, shape)
    kind = name.rpartition('/')[-1]
    if kind == 'moving_variance':
        value = np.exp(0.3 * z)
    elif kind == 'gamma':
        value = np.exp(0.2 * z)
    elif kind in ('moving_mean', 'beta', 'bias'):
        value = 0.1 * z
    elif kind.startswith('WSM'):
        value = 0.8 + 0.5 * z  # some are negative: the ReLU of the fusion matters
    elif kind == 'depthwise_kernel':
        value = z / np.sqrt(shape[0] * shape[1])
    else:
        value = z / np.sqrt(np.prod(shape[:-1]))
    return np.asarray(value, np.float32)
