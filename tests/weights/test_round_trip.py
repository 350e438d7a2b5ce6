"""A network written in each format (docs/reference.md, Checkpoints) reads as the same variables, exactly."""

import re
from argparse import Namespace

import containers
import numpy as np
import pytest
import writers
from flax import traverse_util
from writers import Member, to_tensorflow, to_torch

from effdet_jax.configs import default
from effdet_jax.model import build_model
from effdet_jax.weights import families, names, readers

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')

MEMBERS = {
    'lite': Member('lite0'),
    'swish': Member('b0', cells=1, head_layers=1, weighted=True),
    'to_p8': Member('b0', cells=2, head_layers=1, max_level=8),
}


@pytest.fixture(scope='module')
def ours():
    """`ours(member)`: (layers, random variables, shapes of our model's variables)."""
    made = {}

    def make(member):
        if member not in made:
            c = default.get_config('d0').model
            c.update(backbone=member.backbone, fpn_channels=member.channels, fpn_cells=member.cells)
            c.update(head_layers=member.head_layers, max_level=member.max_level)
            c.feature_network.fusion = 'fast' if member.weighted else 'sum'
            shapes = traverse_util.flatten_dict(names.shapes_of(build_model(c, member.classes)))
            layers = writers.layers(member)
            made[member] = layers, writers.draw(layers), shapes
        return made[member]

    return make


def read(source, shapes, member):
    """(our variables, what they were recognised as); none may be missing, unexpected or mismatched."""
    found = families.recognise(readers.read(source).arrays)
    wanted = {path: shape for path, shape in shapes.items() if found.is_detector or path[1] == 'backbone'}
    matched = names.match_weights(found.arrays, wanted, member.backbone, found.scheme)
    assert (matched.missing, matched.mismatched, matched.unexpected) == ({}, {}, [])
    return matched.arrays, found


def assert_same(read, written):
    assert read.keys() == written.keys()
    for path in written:
        assert read[path].dtype == np.float32
        np.testing.assert_array_equal(read[path], written[path], err_msg='/'.join(path))


def level_first(arrays):
    """Batch norm of the heads by level, then repeat, and without `.bn`."""
    return {re.sub(r'bn_rep\.(\d+)\.(\d+)\.bn', r'bn_rep.\2.\1', name): array for name, array in arrays.items()}


def prefixed(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def raw(arrays):
    return {name: np.asarray(array + 1) for name, array in arrays.items()}


DETECTORS = {
    'keras h5': ('keras', containers.keras_h5),
    'tf1': ('keras', containers.tf1),
    'tf1 without averages': ('keras', containers.tf1_plain),
    'tf1 tar.gz': ('keras', containers.released),
    'tf2': ('objects', containers.tf2),
    'pth': ('effdet', containers.pth),
    'pth of the old kind': ('effdet', lambda f, a: containers.pth(f, a, _use_new_zipfile_serialization=False)),
    'pth state_dict': ('effdet', lambda f, a: containers.pth(f, {'epoch': 3, 'args': Namespace(), 'state_dict': a})),
    'pth averages': ('effdet', lambda f, a: containers.pth(f, {'state_dict': raw(a), 'state_dict_ema': a})),
    'pth module.': ('effdet', lambda f, a: containers.pth(f, {'state_dict': prefixed('module.', a)})),
    'pth model.': ('effdet', lambda f, a: containers.pth(f, prefixed('model.', a))),
    'pth level first': ('effdet', lambda f, a: containers.pth(f, level_first(a))),
    'safetensors': ('effdet', containers.safe),
    'safetensors module.': ('effdet', lambda f, a: containers.safe(f, prefixed('module.', a))),
}


# Every form once; every way to name things with every network.
EVERY = [(form, 'lite') for form in DETECTORS]
EVERY += [(form, name) for form in ('keras h5', 'tf1', 'tf2', 'pth level first', 'safetensors') for name in MEMBERS]


@pytest.mark.parametrize(('form', 'name'), dict.fromkeys(EVERY))
def test_detectors(form, name, ours, tmp_path):
    implementation, write = DETECTORS[form]
    layers, written, shapes = ours(member := MEMBERS[name])
    rename = to_torch if implementation == 'effdet' else to_tensorflow
    source = write(tmp_path, rename(layers, written, implementation))
    arrays, found = read(source, shapes, member)
    assert_same(arrays, written)
    assert (found.family, found.is_detector) == ('effdet' if implementation == 'effdet' else 'official', True)
    assert families.num_classes(found, 9) == member.classes
    _, _, repeats, squeeze = writers.BACKBONES[member.backbone]
    size = sum(repeats), squeeze, member.cells, member.channels, member.head_layers
    assert families.size_of(found) == size


@pytest.mark.parametrize('write', [containers.bfloat16, containers.bfloat16_safe])
def test_numbers_of_16_bits(write, ours, tmp_path):
    layers, written, shapes = ours(MEMBERS['lite'])
    source = write(tmp_path, to_torch(layers, written))
    # bfloat16 keeps the upper half of the bits; what was lost is at most one part in 256.
    arrays, _ = read(source, shapes, MEMBERS['lite'])
    for path in written:
        np.testing.assert_allclose(arrays[path], written[path], rtol=2**-8)
        assert not np.any(arrays[path].view(np.uint32) & 0xFFFF)


def with_classifier(names):
    """Adds what an ImageNet network has after its last block: {name: shape} for a last block of 320 channels."""

    def add(arrays):
        return arrays | {name: np.ones(shape, np.float32) for name, shape in names.items()}

    return add


OFFICIAL_HEAD = {
    'conv2d/kernel': (1, 1, 320, 1280), 'tpu_batch_normalization/gamma': (1280,),
    'tpu_batch_normalization/moving_mean': (1280,), 'dense/kernel': (1280, 10), 'dense/bias': (10,),
}  # fmt: skip
TIMM_HEAD = {'conv_head.weight': (1280, 320, 1, 1), 'classifier.weight': (10, 1280), 'classifier.bias': (10,)}
PORT_HEAD = {'_conv_head.weight': (1280, 320, 1, 1), '_fc.weight': (10, 1280), '_fc.bias': (10,)}
BN2, BN1 = (
    {f'{bn}.{leaf}': (1280,) for leaf in ('weight', 'bias', 'running_mean', 'running_var')} for bn in ('bn2', '_bn1')
)


def official(layers, written, variant):
    arrays = to_tensorflow(layers, written, 'keras')
    return with_classifier(prefixed(f'efficientnet-{variant}/head/', OFFICIAL_HEAD))(arrays)


def timm(layers, written, _):
    arrays = {name.removeprefix('backbone.'): array for name, array in to_torch(layers, written).items()}
    return with_classifier(TIMM_HEAD | BN2)(arrays)


def port(layers, written, _):
    return with_classifier(PORT_HEAD | BN1)(to_torch(layers, written, 'port'))


BACKBONES = {
    'official tf1': (official, containers.tf1, 'official'),
    'official h5': (official, containers.keras_h5, 'official'),
    'timm pth': (timm, containers.pth, 'timm'),
    'timm safetensors': (timm, containers.safe, 'timm'),
    'port': (port, containers.pth, 'port'),
}


@pytest.mark.parametrize('name', ['lite', 'swish'])
@pytest.mark.parametrize('form', BACKBONES)
def test_backbones_alone(form, name, ours, tmp_path):
    rename, write, family = BACKBONES[form]
    layers, written, shapes = ours(member := MEMBERS[name])
    layers = [layer for layer in layers if layer.ours.startswith('backbone/')]
    written = {path: array for path, array in written.items() if path[1] == 'backbone'}
    source = write(tmp_path, rename(layers, written, member.backbone))
    arrays, found = read(source, shapes, member)
    assert_same(arrays, written)
    assert (found.family, found.is_detector) == (family, False)
    assert families.size_of(found) == (16, name == 'swish', 0, 0, 0)
    assert "ImageNet's classifier" in found.unused.values()
