"""A certificate: outputs of another implementation are met layer by layer, or nothing is imported."""

import json

import containers
import goldens
import imports
import numpy as np
import pytest
from flax import traverse_util

from effdet_jax.commands.import_weights import importer
from effdet_jax.configs import default
from effdet_jax.errors import UserError
from effdet_jax.model import build_model
from effdet_jax.weights import certificate

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')


@pytest.fixture(scope='module')
def lite0(tmp_path_factory):
    """(config, file, golden) of the official Lite0 with the goldens' weights."""
    golden = goldens.load('network_lite0')
    config = default.get_config('lite0')
    config.dataset.class_names = tuple(f'class {i}' for i in range(int(golden['num_classes'])))
    file = containers.keras_h5(tmp_path_factory.mktemp('lite0'), goldens.official_arrays(golden['variables']))
    return config, file, golden


@pytest.mark.slow
def test_the_official_network_is_certified(lite0, tmp_path, capsys):
    config, file, golden = lite0
    workdir = tmp_path / 'imported'
    importer.import_weights(config, file, workdir, reference=goldens.FOLDER / 'network_lite0.npz')
    rows = json.loads((workdir / 'certificate.json').read_text())
    assert [row['name'] for row in rows] == [name for name in golden if name.startswith(('feature', 'class', 'box'))]
    for row in rows:
        assert row['shape'] == list(golden[row['name']].shape)
        assert row['largest'] == np.abs(golden[row['name']]).max()
        assert row['relative'] == pytest.approx(row['difference'] / row['largest'])
        assert row['relative'] < certificate.TOLERANCE
    printed = capsys.readouterr().out
    assert all(row['name'] in printed for row in rows)
    assert f'certified: {len(rows)} outputs' in printed


@pytest.fixture(scope='module')
def small():
    """(model, variables, normalised images, outputs of some layers) of a small network."""
    model = build_model(imports.config().model, imports.MEMBER.classes)
    variables = traverse_util.unflatten_dict(imports.WRITTEN)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    wanted = ['feature_p3', 'class_p7', 'backbone/stem/bn', 'fpn/cell_0/node_3/bn', 'class_net/conv_0@p4']
    return model, variables, images, certificate.layer_outputs(model, variables, images, wanted)


def test_names_of_layers(small):
    *_, outputs = small
    assert {name: output.shape for name, output in outputs.items()} == {
        'feature_p3': (1, 8, 8, 40),
        'class_p7': (1, 1, 1, 9 * 5),
        'backbone/stem/bn': (1, 32, 32, 32),
        'fpn/cell_0/node_3/bn': (1, 8, 8, 16),
        'class_net/conv_0@p4': (1, 4, 4, 16),
    }


def test_a_layer_is_what_its_weights_make_of_its_input(small):
    """Batch norm in closed form, from the outputs of two neighbouring layers."""
    model, variables, images, _ = small
    layer = 'backbone/blocks_4/'
    outputs = certificate.layer_outputs(model, variables, images, [f'{layer}project_conv', f'{layer}project_bn'])
    bn = {
        path[-1]: array
        for path, array in imports.WRITTEN.items()
        if path[1:-1] == ('backbone', 'blocks_4', 'project_bn')
    }
    x = outputs[f'{layer}project_conv']
    expected = (x - bn['mean']) / np.sqrt(bn['var'] + 1e-3) * bn['scale'] + bn['bias']
    np.testing.assert_allclose(outputs[f'{layer}project_bn'], expected, atol=1e-4)


def test_a_layer_that_does_not_exist(small):
    model, variables, images, _ = small
    with pytest.raises(UserError, match=r'outputs of backbone/blocks_99/dw_conv, which are no layers of this model'):
        certificate.layer_outputs(model, variables, images, ['backbone/blocks_99/dw_conv', 'feature_p3'])


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        (
            'class_p7',
            lambda x: x * 1.001,
            r'class_p7 differs from .* by 1\.0e-03 of its largest value.*nothing was imported',
        ),
        ('fpn/cell_0/node_3/bn', np.negative, r'fpn/cell_0/node_3/bn differs .* by 2\.0e\+00'),
        ('backbone/stem/bn', lambda x: x * np.nan, r'backbone/stem/bn differs'),
        (
            'feature_p3',
            lambda x: x.transpose(0, 3, 1, 2),
            r'feature_p3 has shape \[1, 40, 8, 8\] in the reference but \[1, 8, 8, 40\]',
        ),
    ],
)
def test_another_output_is_refused_and_nothing_written(name, change, message, small, tmp_path):
    _, _, images, outputs = small
    np.savez(reference := tmp_path / 'reference.npz', image=images, **(outputs | {name: change(outputs[name])}))
    with pytest.raises(UserError, match=message):
        importer.import_weights(imports.config(), imports.file(tmp_path), tmp_path / 'imported', reference=reference)
    assert not (tmp_path / 'imported').exists()


@pytest.mark.slow
def test_a_certificate_of_layers(small, tmp_path):
    _, _, images, outputs = small
    np.savez(reference := tmp_path / 'reference.npz', image=images, **outputs)
    importer.import_weights(imports.config(), imports.file(tmp_path), tmp_path / 'imported', reference=reference)
    rows = json.loads((tmp_path / 'imported' / 'certificate.json').read_text())
    assert [row['name'] for row in rows] == list(outputs)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'feature_p3': np.zeros(3)}, 'has no input: add the array image or image_shape'),
        ({'image': np.zeros((1, 8, 8, 3))}, 'and 0 outputs: give'),
        ({'image': np.zeros((8, 8, 3)), 'feature_p3': np.zeros(3)}, r'an image of shape \(8, 8, 3\) and 1 outputs'),
        (None, 'is not a readable .npz'),
        (b'PK\x03\x04 is how an archive begins', 'is not a readable .npz'),
        (b'neither is this', 'is not a readable .npz'),
        (b'', 'is not a readable .npz'),
        (np.zeros(3), 'is not a readable .npz'),
    ],
)
def test_reference_files(content, message, tmp_path):
    path = tmp_path / 'reference.npz'
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, np.ndarray):
        with path.open('wb') as file:
            np.save(file, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        certificate.read_reference(path)
    assert str(path) in str(error.value)


def test_the_fixed_input_is_that_of_the_goldens(tmp_path):
    np.savez(path := tmp_path / 'reference.npz', image_shape=[1, 4, 5, 3], class_p3=np.zeros(1))
    images, outputs = certificate.read_reference(path)
    np.testing.assert_array_equal(images, goldens.network_input([1, 4, 5, 3]))
    assert list(outputs) == ['class_p3']
