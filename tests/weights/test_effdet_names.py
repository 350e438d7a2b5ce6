"""effdet's own keys and shapes, as its models list them, against the names and layouts that the importer expects."""

import goldens
import numpy as np
import pytest
import writers
from flax import traverse_util
from quick import slow_but

from effdet_jax.configs.scaling import SCALES
from effdet_jax.weights import families, names

COUNTER = '.num_batches_tracked'


@pytest.fixture(scope='module')
def keys():
    return goldens.effdet_keys()


@pytest.mark.parametrize('name', slow_but(['d0', 'lite0', 'd7x'], 'd0', 'lite0'))
def test_every_key_has_its_place_and_every_place_its_key(name, keys, shapes):
    theirs = {key: tuple(shape) for key, shape in keys[f'tf_efficientdet_{name}'].items()}
    # Arrays without memory: only their shapes matter.
    found = families.recognise({key: np.broadcast_to(np.float32(0), shape) for key, shape in theirs.items()})
    assert found.unused.keys() == {key for key in theirs if key.endswith(COUNTER)}
    wanted = traverse_util.flatten_dict(shapes(name))
    matched = names.match_weights(found.arrays, wanted, SCALES[name].backbone, found.scheme)
    assert (matched.missing, matched.mismatched, matched.unexpected) == ({}, {}, [])
    assert sorted(key for every in matched.names.values() for key in every) == sorted(theirs.keys() - found.unused)


@pytest.mark.parametrize(
    ('name', 'member'),
    [('d0', ('b0', 64, 3, 3, 7, True, 90)), ('lite0', ('lite0', 64, 3, 3, 7, False, 90))],
)
def test_the_files_of_these_tests_are_like_effdets(name, member, keys):
    layers = writers.layers(writers.Member(*member))
    written = writers.to_torch(layers, writers.draw(layers))
    assert {key: list(array.shape) for key, array in written.items()} == keys[f'tf_efficientdet_{name}']


def test_the_files_of_these_tests_are_like_the_official_ones():
    layers = writers.layers(writers.Member('b0', 64, 3, 3, 7, True, 90))
    written = writers.to_tensorflow(layers, writers.draw(layers), 'keras')
    official = goldens.official_arrays(goldens.load('network_d0')['variables'])
    classes = int(goldens.load('network_d0')['num_classes'])
    assert written.keys() == official.keys()
    for name, array in official.items():
        if not name.startswith('class_net/class-predict'):  # of so many classes
            assert np.shape(written[name]) == array.shape
    assert official['class_net/class-predict/bias'].shape == (9 * classes,)
