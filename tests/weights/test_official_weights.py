import flax.traverse_util
import goldens
import jax
import numpy as np
import pytest
from quick import slow_but

from effdet_jax.configs import default, scaling
from effdet_jax.errors import UserError
from effdet_jax.model import build_model
from effdet_jax.weights import from_official, names

# Variables of the official checkpoints: all, and those that are trained (docs/reference.md, Models).
OFFICIAL_VARIABLES = {
    'd0': (709, 493), 'd1': (912, 640), 'd2': (987, 699), 'd3': (1165, 823), 'd4': (1354, 960), 'd5': (1482, 1048),
    'd6': (1565, 1059), 'd7': (1565, 1059), 'd7x': (1902, 1286), 'lite0': (588, 372), 'lite1': (719, 457),
    'lite2': (775, 497), 'lite3': (922, 590), 'lite3x': (922, 590), 'lite4': (1068, 684),
}  # fmt: skip


@pytest.mark.parametrize('name', slow_but(['d0', 'd3', 'd7x', 'lite0'], 'd0'))
def test_official_weights_give_the_official_outputs(name):
    golden = goldens.load(f'network_{name}')
    config = default.get_config(name).model
    model = build_model(config, int(golden['num_classes']))
    arrays = goldens.official_arrays(golden['variables'])
    variables = from_official(arrays, names.shapes_of(model), config.backbone)

    def apply(variables, images):
        return model.apply(variables, images, capture_intermediates=lambda module, _: module.name == 'backbone')

    with jax.default_matmul_precision('highest'):  # accelerators round to fewer bits by default
        outputs, state = jax.jit(apply)(variables, goldens.network_input(golden['image_shape']))
    (features,) = state['intermediates']['backbone']['__call__']
    ours = {f'feature_p{level}': feature for level, feature in features.items()}
    # The golden maps are [1, H, W, 9 * outputs]; ours are the same numbers, one level after the other.
    levels = [(key, golden[key].size) for key in sorted(golden) if key.startswith('class_p')]
    first = 0
    for key, size in levels:
        rows = size // model.num_classes
        ours[key] = outputs.class_logits[:, first : first + rows]
        ours[key.replace('class', 'box')] = outputs.box_regressions[:, first : first + rows]
        first += rows
    assert first == outputs.class_logits.shape[1] and len(levels) == config.max_level - 2
    worst = {
        key: np.abs(np.asarray(value).reshape(golden[key].shape) - golden[key]).max() / np.abs(golden[key]).max()
        for key, value in ours.items()
    }
    assert max(worst.values()) < 2e-5, worst


@pytest.mark.parametrize('name', slow_but(OFFICIAL_VARIABLES, 'd0', 'lite0'))
def test_official_names_are_all_there_and_none_is_used_twice(name, shapes):
    flat = flax.traverse_util.flatten_dict(shapes(name))
    official = dict(names.their_names(flat, scaling.SCALES[name].backbone, names.SCHEMES['keras']))
    assert official.keys() == flat.keys()
    every = [n for found in official.values() for n in found]
    trained = [n for path, found in official.items() if path[0] == 'params' for n in found]
    assert len(set(every)) == len(every)
    assert (len(every), len(trained)) == OFFICIAL_VARIABLES[name]


@pytest.mark.slow
def test_names_of_first_cell_projections(shapes):
    # Which input a projection reads, and its slot, are part of the official name (docs/reference.md, Names).
    expected = {
        'd0': ['1/resample_0_2_6', '2/resample_0_1_7', '3/resample_0_0_8', '4/resample_0_1_9', '5/resample_0_2_10'],
        'd7x': ['2/resample_0_2_8', '3/resample_0_1_9', '4/resample_0_0_10', '5/resample_0_1_11', '6/resample_0_2_12'],
    }
    for name, projections in expected.items():
        flat = flax.traverse_util.flatten_dict(shapes(name))
        keras = names.their_names(flat, scaling.SCALES[name].backbone, names.SCHEMES['keras'])
        official = (n for _, found in keras for n in found)
        kernels = sorted(n for n in official if n.startswith('fpn_cells') and n.endswith('conv2d/kernel'))
        assert kernels == [f'fpn_cells/cell_0/fnode{p}/conv2d/kernel' for p in projections]


@pytest.fixture(scope='module')
def lite0_arrays():
    return goldens.official_arrays(goldens.load('network_lite0')['variables'])


@pytest.fixture(scope='module')
def load_lite0():
    config = default.get_config('lite0').model
    shapes = names.shapes_of(build_model(config, num_classes=7))
    return lambda arrays: from_official(arrays, shapes, config.backbone)


KERNEL = 'class_net/class-predict/pointwise_kernel'


def test_layouts(lite0_arrays, load_lite0):
    params = load_lite0(lite0_arrays)['params']
    np.testing.assert_array_equal(params['class_net']['predict']['pw']['kernel'], lite0_arrays[KERNEL])
    theirs = lite0_arrays['efficientnet-lite0/blocks_3/depthwise_conv2d/depthwise_kernel']  # k, k, C, 1
    np.testing.assert_array_equal(params['backbone']['blocks_3']['dw_conv']['kernel'][:, :, 0], theirs[..., 0])


def test_missing_array_is_named(lite0_arrays, load_lite0):
    with pytest.raises(UserError, match=rf'1 missing.*{KERNEL}.*0 unexpected'):
        load_lite0({name: array for name, array in lite0_arrays.items() if name != KERNEL})


def test_array_left_over_is_named(lite0_arrays, load_lite0):
    with pytest.raises(UserError, match=r'0 missing.*1 unexpected.*global_step'):
        load_lite0(lite0_arrays | {'global_step': np.zeros(())})


def test_array_of_another_shape_is_named(lite0_arrays, load_lite0):
    with pytest.raises(UserError, match=rf'{KERNEL} has shape \(1, 1, 64, 810\)'):
        load_lite0(lite0_arrays | {KERNEL: np.zeros((1, 1, 64, 810), np.float32)})


def test_weights_of_another_model_do_not_load(load_lite0):
    with pytest.raises(UserError, match=r'missing.*unexpected'):
        load_lite0(goldens.official_arrays(goldens.load('network_d0')['variables']))
