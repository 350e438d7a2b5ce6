import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from effdet_jax.configs import default
from effdet_jax.detection.anchors import level_sizes, make_anchors
from effdet_jax.model import build_model, efficientnet, heads, layers
from effdet_jax.weights.names import shapes_of

pytestmark = pytest.mark.usefixtures('depthwise_by_xla', 'short_backbone')


@pytest.fixture(scope='module')
def short_backbone():
    """Six blocks, one of them residual."""
    stages = [efficientnet.Stage(3, n, s, e, 16 * i) for i, (n, s, e) in enumerate(STAGES, start=1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet, 'STAGES', stages)
        yield


STAGES = ((1, 1, 1), (1, 2, 6), (3, 2, 6), (1, 2, 6), (1, 2, 6))  # repeats, stride, expansion


def tiny(num_classes=3, **changes):
    """A small detector that has every kind of layer."""
    config = default.get_config('nano').model
    config.update({'fpn_channels': 16, 'fpn_cells': 1, 'head_layers': 1, 'max_level': 6, 'stochastic_depth': 0.3})
    config.update_from_flattened_dict(changes)
    return build_model(config, num_classes)


@pytest.fixture(scope='module')
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 96, 96, 3)), jnp.float32)


@pytest.fixture(scope='module')
def params():
    """Random parameters, none of them zero or one."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape)
        if path[-1] == 'kernel':
            z /= np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(0.1 * z if path[-1] == 'bias' else np.exp(0.2 * z) if z.ndim == 1 else z, jnp.float32)

    return traverse_util.path_aware_map(draw, shapes_of(tiny())['params'])


@pytest.fixture(scope='module')
def train_step(params, images):
    """`train_step(model)`: outputs, gradients and batch statistics of one training pass."""

    def loss(params, statistics, model):
        outputs, updates = model.apply(
            {'params': params, 'batch_stats': statistics}, images, train=True, mutable=['batch_stats'],
            rngs={'stochastic_depth': jax.random.key(1)},
        )  # fmt: skip
        return sum(jnp.mean(output**2) for output in outputs), (outputs, updates['batch_stats'])

    def step(model):
        statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes_of(model)['batch_stats'])
        fast_to_compile = {'xla_backend_optimization_level': 0}
        gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2, compiler_options=fast_to_compile)
        gradients, (outputs, statistics) = gradient(params, statistics, model)
        return {'outputs': outputs._asdict(), 'statistics': statistics, 'gradients': gradients}

    return step


@pytest.fixture(scope='module')
def trained(train_step):
    return train_step(tiny())


@pytest.fixture(scope='module')
def variables(params, trained):
    """The parameters with the statistics of `images`."""
    return {'params': params, 'batch_stats': trained['statistics']}


@pytest.fixture(scope='module')
def apply():
    return jax.jit(tiny().apply)


@pytest.fixture(scope='module')
def outputs(apply, variables, images):
    return apply(variables, images)


def assert_close(a, b, tolerance):
    """Leaf by leaf, relative to its largest value, or to a hundredth of the largest of all: some leaves are nothing but
    rounding, such as the gradient of a bias that batch norm removes.
    """
    a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (a, b))
    assert a.keys() == b.keys()
    largest = max(float(jnp.abs(leaf).max()) for leaf in b.values())
    for path, expected in b.items():
        scale = max(float(jnp.abs(expected).max()), 1e-2 * largest)
        np.testing.assert_allclose(a[path], expected, rtol=0, atol=tolerance * scale, err_msg=path)


@pytest.mark.parametrize(('size', 'max_level'), [((65, 97), 7), ((1, 1), 7), ((40, 200), 8), ((128, 96), 6)])
def test_any_height_and_width_has_a_row_per_anchor(size, max_level):
    model = tiny(max_level=max_level)
    shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *size, 3)))[0]
    num_anchors = len(make_anchors(level_sizes(size, 3, max_level), size))
    assert shapes.class_logits.shape == (2, num_anchors, 3)
    assert shapes.box_regressions.shape == (2, num_anchors, 4)


def test_anchors_per_position_follow_the_config():
    config = default.get_config('nano').model
    config.anchors.update({'scales_per_octave': 2, 'aspect_ratios': (1.0, 3.0)})
    model = build_model(config, 5)
    outputs = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))[0]
    assert outputs.class_logits.shape == (1, (16 + 4 + 1 + 1 + 1) * 4, 5)


def test_before_training_every_anchor_says_object_with_probability_one_percent():
    head = heads.Head(3, 9, 1, 8, 3, 'swish', layers.Norm(), nn.initializers.constant(heads.CLASS_BIAS))
    outputs, variables = head.init_with_output(jax.random.key(0), [jnp.zeros((1, 2, 2, 8))], False)
    np.testing.assert_allclose(variables['params']['predict']['pw']['bias'], np.full(27, -4.59512), rtol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(outputs), np.full((1, 36, 3), 0.01), rtol=1e-5)


def test_evaluation_treats_each_image_alone(apply, variables, images, outputs):
    beside_another = apply(variables, images.at[0].multiply(-2.0))
    for a, b in zip(beside_another, outputs, strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        assert float(jnp.abs(a[0] - b[0]).mean()) > 0.1 * float(b.std())


def test_training_updates_every_batch_statistic_and_reaches_every_parameter(trained):
    for kind in ('statistics', 'gradients'):
        leaves = traverse_util.flatten_dict(trained[kind], sep='/')
        assert all(np.isfinite(leaf).all() for leaf in leaves.values())
        assert [path for path, leaf in leaves.items() if not np.any(leaf)] == []


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(train_step, trained):
    model = tiny(remat=True)
    assert jax.tree.map(jnp.shape, shapes_of(model)) == jax.tree.map(jnp.shape, shapes_of(tiny()))
    again = train_step(model)
    # The same draws of stochastic depth and the same statistics; only the order of sums differs.
    for kind, tolerance in (('outputs', 1e-5), ('statistics', 1e-5), ('gradients', 1e-4)):
        assert_close(again[kind], trained[kind], tolerance)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(variables, images, outputs):
    model = tiny(dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(model))} == {jnp.dtype('float32')}

    def record(variables, images):
        chosen = ('backbone', 'fpn')
        return model.apply(variables, images, capture_intermediates=lambda module, _: module.name in chosen)

    low, state = jax.jit(record)(variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(state['intermediates'])} == {jnp.dtype('bfloat16')}
    assert {output.dtype for output in low} == {jnp.dtype('float32')}
    for a, b in zip(low, outputs, strict=True):
        # Some forty layers of eight-bit mantissas; another function would differ by more than the spread.
        assert 0 < float(jnp.abs(a - b).mean()) < 0.15 * float(b.std())
