import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from quick import slow_but

from effdet_jax.errors import UserError
from effdet_jax.model import feature_network, layers
from effdet_jax.model.feature_network import FEATURE_NETWORKS, FUSIONS, FeatureNetwork, Node, bifpn, nasfpn

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')

RANGES = [(3, 7), (3, 8)]

# As in (docs/reference.md, Nodes of BiFPN). Ids 0..L-1 are the inputs, P3 upward; node k has the id L + k.
BIFPN_3_7 = 'P6:3,4 | P5:2,5 | P4:1,6 | P3:0,7 | P4:1,7,8 | P5:2,6,9 | P6:3,5,10 | P7:4,11'
BIFPN_3_8 = 'P7:4,5 | P6:3,6 | P5:2,7 | P4:1,8 | P3:0,9 | P4:1,9,10 | P5:2,8,11 | P6:3,7,12 | P7:4,6,13 | P8:5,14'
TABLES = {
    ('bifpn', 7): BIFPN_3_7,
    ('bifpn', 8): BIFPN_3_8,
    ('fpn', 7): 'P7:4 | P6:3,5 | P5:2,6 | P4:1,7 | P3:0,8',
    ('fpn', 8): 'P8:5 | P7:4,6 | P6:3,7 | P5:2,8 | P4:1,9 | P3:0,10',
    ('panet', 7): 'P7:4 | P6:3,5 | P5:2,6 | P4:1,7 | P3:0,8 | P3:9 | P4:8,10 | P5:7,11 | P6:6,12 | P7:5,13',
    ('panet', 8): (
        'P8:5 | P7:4,6 | P6:3,7 | P5:2,8 | P4:1,9 | P3:0,10 | '
        'P3:11 | P4:10,12 | P5:9,13 | P6:8,14 | P7:7,15 | P8:6,16'
    ),
    ('qufpn', 7): (
        f'{BIFPN_3_7} | P4:1,0 | P5:2,13 | P6:3,14 | P7:4,15 | P6:3,15,16 | P5:2,14,17 | P4:1,13,18 | P3:0,19 | '
        'P7:12,16 | P6:11,17 | P5:10,18 | P4:9,19 | P3:8,20'
    ),
    ('qufpn', 8): (
        f'{BIFPN_3_8} | P4:1,0 | P5:2,16 | P6:3,17 | P7:4,18 | P8:5,19 | P7:4,19,20 | P6:3,18,21 | P5:2,17,22 | '
        'P4:1,16,23 | P3:0,24 | P8:15,20 | P7:14,21 | P6:13,22 | P5:12,23 | P4:11,24 | P3:10,25'
    ),
    ('fully_connected', 7): ' | '.join(f'P{level}:0,1,2,3,4' for level in range(3, 8)),
    ('fully_connected', 8): ' | '.join(f'P{level}:0,1,2,3,4,5' for level in range(3, 9)),
}  # fmt: skip

# Ghiasi et al. 2019, figure 6: level, operation, two inputs, whether it is the level's output.
NAS_FPN = [
    (4, 'GP', (1, 3), False), (4, 'sum', (1, 5), False), (3, 'sum', (0, 6), True), (4, 'sum', (6, 7), True),
    (5, 'GP', (7, 8), True), (7, 'GP', (6, 9), True), (6, 'GP', (9, 10), True),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'max_level'), TABLES)
def test_node_tables(name, max_level):
    nodes = FEATURE_NETWORKS[name](3, max_level)
    assert ' | '.join(f'P{node.level}:{",".join(map(str, node.inputs))}' for node in nodes) == TABLES[name, max_level]
    assert not any(node.attention for node in nodes)


def test_nodes_of_nas_fpn():
    nodes = nasfpn(3, 7)
    last = {node.level: k for k, node in enumerate(nodes)}
    assert [
        (node.level, 'GP' if node.attention else 'sum', node.inputs[:2], last[node.level] == k)
        for k, node in enumerate(nodes)
    ] == NAS_FPN
    # The inputs P5 and P7, which no node reads, join the outputs of their levels.
    assert [(node.level, node.inputs[2:]) for node in nodes if node.inputs[2:]] == [(5, (2,)), (7, (4,))]


def test_nas_fpn_to_p8_is_that_to_p7_and_one_node():
    *nodes, p8 = nasfpn(3, 8)
    ids = [0, 1, 2, 3, 4, *range(6, 13)]  # P8 is input 5
    assert nodes == [node._replace(inputs=tuple(ids[i] for i in node.inputs)) for node in nasfpn(3, 7)]
    assert p8 == (8, (5, 11), False)  # 11 is the output P7


def test_nas_fpn_of_other_levels_is_refused():
    with pytest.raises(UserError, match=r'found for P3-P7, not P3-P6: set config\.model\.max_level=7 or 8'):
        nasfpn(3, 6)


@pytest.mark.parametrize(('min_level', 'max_level'), RANGES)
@pytest.mark.parametrize('name', FEATURE_NETWORKS)
def test_every_map_is_read_or_an_output(name, min_level, max_level):
    nodes, count = FEATURE_NETWORKS[name](min_level, max_level), max_level - min_level + 1
    last = {node.level: count + k for k, node in enumerate(nodes)}
    assert set(last) == set(range(min_level, max_level + 1))
    assert all(max(node.inputs) < count + k for k, node in enumerate(nodes))  # only what is there already
    assert {i for node in nodes for i in node.inputs} | set(last.values()) == set(range(count + len(nodes)))


@pytest.mark.parametrize(('min_level', 'max_level'), [(3, 5), (2, 7), (3, 9)])
def test_bifpn_of_any_levels(min_level, max_level):
    nodes, count = bifpn(min_level, max_level), max_level - min_level + 1
    assert len(nodes) == 2 * (count - 1)
    level_of = [*range(min_level, max_level + 1), *(node.level for node in nodes)]
    for k, node in enumerate(nodes):
        assert max(node.inputs) < count + k  # only what is there already
        *own, other = (level_of[i] for i in node.inputs)
        assert set(own) == {node.level} and abs(other - node.level) == 1


def test_factors_of_fast_fusion():
    weights = jnp.asarray([0.5, -2.0, 1.5])
    np.testing.assert_allclose(FUSIONS['fast'](weights), np.array([0.5, 0, 1.5]) / (2 + 1e-4), rtol=1e-6)
    np.testing.assert_array_equal(FUSIONS['fast'](-jnp.ones(2)), [0, 0])


def test_factors_of_softmax_fusion():
    weights = np.array([0.5, -2.0, 1.5])
    np.testing.assert_allclose(
        FUSIONS['softmax'](jnp.asarray(weights)), np.exp(weights) / np.exp(weights).sum(), rtol=1e-6
    )


@functools.cache
def fused_by(fusion, **options):
    """A node whose convolution and batch norm do nothing: its output is relu6 of the fused inputs."""
    node = feature_network.FusionNode(4, fusion, 'relu6', layers.Norm(), jnp.float32, **options)
    inputs = tuple(jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (3, 1, 4, 6, 4)), jnp.float32))
    variables = node.init(jax.random.key(0), inputs, 4, 6, False)
    params = variables['params']
    params['dw']['kernel'] = jnp.zeros((3, 3, 1, 4)).at[1, 1].set(1.0)
    params['pw']['kernel'] = jnp.eye(4)[None, None]
    params['bn']['scale'] = jnp.full(4, np.sqrt(1 + 1e-3))
    return node, variables, inputs


@pytest.mark.parametrize(
    ('fusion', 'factors'),
    [
        ('fast', np.array([0.5, 0.0, 1.5]) / 2.0001),
        ('softmax', np.exp([0.5, -2.0, 1.5]) / np.exp([0.5, -2.0, 1.5]).sum()),
        ('sum', np.ones(3)),
    ],
)
def test_node_weights_its_inputs(fusion, factors):
    node, variables, inputs = fused_by(fusion)
    if fusion == 'sum':
        assert 'edge_weights' not in variables['params']
    else:
        np.testing.assert_array_equal(variables['params']['edge_weights'], np.ones(3))
        variables['params']['edge_weights'] = jnp.asarray([0.5, -2.0, 1.5])
    expected = np.einsum('e,e...->...', factors, np.asarray(inputs))
    np.testing.assert_allclose(node.apply(variables, inputs, 4, 6, False), np.minimum(expected, 6), rtol=1e-5)


@pytest.mark.parametrize('fusion', ['fast', 'softmax'])
def test_node_weighs_every_channel(fusion):
    node, variables, inputs = fused_by(fusion, per_channel=True)
    np.testing.assert_array_equal(variables['params']['edge_weights'], np.ones((3, 4)))
    w_EF = np.random.default_rng(1).uniform(-1, 2, (3, 4))
    variables['params']['edge_weights'] = jnp.asarray(w_EF, jnp.float32)
    positive_EF = np.maximum(w_EF, 0) if fusion == 'fast' else np.exp(w_EF)
    factors_EF = positive_EF / (positive_EF.sum(axis=0) + (1e-4 if fusion == 'fast' else 0))
    expected = np.einsum('ec,ebhwc->bhwc', factors_EF, np.asarray(inputs))
    np.testing.assert_allclose(node.apply(variables, inputs, 4, 6, False), np.minimum(expected, 6), rtol=1e-5)


@pytest.mark.parametrize('num_inputs', [2, 3])
def test_node_with_attention(num_inputs):
    node, variables, inputs = fused_by('fast', attention=True)
    a, b, c = map(np.asarray, inputs)
    merged = a + b / (1 + np.exp(-a.max(axis=(1, 2), keepdims=True)))
    if num_inputs == 3:
        variables['params']['edge_weights'] = jnp.asarray([0.5, 1.5])
        merged = (0.5 * merged + 1.5 * c) / 2.0001
    expected = np.minimum(merged, 6)  # two inputs become one, which has no weight
    np.testing.assert_allclose(node.apply(variables, inputs[:num_inputs], 4, 6, False), expected, rtol=1e-5)


def test_node_with_one_input_has_no_weight():
    node, variables, inputs = fused_by('softmax')
    assert 'edge_weights' not in node.init(jax.random.key(0), inputs[:1], 4, 6, False)['params']
    np.testing.assert_allclose(node.apply(variables, inputs[:1], 4, 6, False), inputs[0], rtol=1e-5)


def test_node_with_a_plain_convolution():
    node = feature_network.FusionNode(4, 'sum', 'relu6', layers.Norm(), jnp.float32, separable=False)
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 5, 4, 4)), jnp.float32)
    variables = node.init(jax.random.key(0), (x,), 5, 4, False)
    kernel = variables['params']['conv']['kernel']
    assert jax.tree.map(jnp.shape, variables['params']['conv']) == {'kernel': (3, 3, 4, 4), 'bias': (4,)}
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 5, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(node.apply(variables, (x,), 5, 4, False), expected / np.sqrt(1 + 1e-3), atol=1e-5)


def test_node_projects_only_inputs_of_another_width_and_resizes_all():
    node = feature_network.FusionNode(8, 'fast', 'swish', layers.Norm(), jnp.float32)
    inputs = (jnp.ones((2, 5, 7, 12)), jnp.ones((2, 3, 4, 8)), jnp.ones((2, 9, 14, 8)))
    shapes = jax.eval_shape(lambda: node.init_with_output(jax.random.key(0), inputs, 5, 7, False))
    assert shapes[0].shape == (2, 5, 7, 8)
    params = jax.tree.map(jnp.shape, shapes[1]['params'])
    assert params.keys() == {'edge_weights', 'resample_0', 'dw', 'pw', 'bn'}
    assert params['resample_0'] == {
        'conv': {'kernel': (1, 1, 12, 8), 'bias': (8,)},
        'bn': {'scale': (8,), 'bias': (8,)},
    }


def test_projection_comes_before_pooling():
    # A 1x1 convolution with negative weights turns a maximum into a minimum.
    edge = feature_network.Resample(1, layers.Norm(), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 4, 4, 2)), jnp.float32)
    variables = edge.init(jax.random.key(0), x, 2, 2, False)
    variables['params']['conv'] = {'kernel': -jnp.ones((1, 1, 2, 1)), 'bias': jnp.asarray([0.25])}
    padded = np.pad(np.asarray(x).sum(-1), ((0, 0), (0, 1), (0, 1)), constant_values=np.inf)
    minima = [[padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].min() for j in range(2)] for i in range(2)]
    expected = (0.25 - np.array(minima)) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(edge.apply(variables, x, 2, 2, False)[0, :, :, 0], expected, rtol=1e-5, atol=1e-6)


def network(name, max_level, fusion='fast', **options):
    options = {'channels': 4, 'cells': 1} | options
    return FeatureNetwork(name, 3, max_level, fusion=fusion, activation='swish', norm=layers.Norm(), **options)


def pyramid(size, max_level, channels):
    """Random maps from P3 of this size upward; those from the backbone, P3 to P5, are wider than the others."""
    rng, maps = np.random.default_rng(0), []
    for level in range(3, max_level + 1):
        width = channels + 2 * (6 - level) if level < 6 else channels
        maps.append(jnp.asarray(rng.standard_normal((1, *size, width)), jnp.float32))
        size = tuple((n + 1) // 2 for n in size)
    return maps


def shapes_of(model, features):
    """(outputs, variables) as shapes."""
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), features)


@pytest.mark.parametrize('max_level', slow_but([7, 8], 7))
@pytest.mark.parametrize(('fusion', 'size'), [('sum', (1, 1)), ('fast', (13, 22)), ('softmax', (33, 9))])
@pytest.mark.parametrize('name', FEATURE_NETWORKS)
def test_every_level_keeps_its_size(name, fusion, size, max_level):
    per_channel = fusion == 'softmax'
    model = network(name, max_level, fusion, cells=2, per_channel=per_channel, separable=fusion != 'sum')
    features = pyramid(size, max_level, 4)
    outputs, variables = shapes_of(model, features)
    assert [x.shape for x in outputs] == [(*x.shape[:3], 4) for x in features]
    cells = variables['params']
    assert cells.keys() == {'cell_0', 'cell_1'}
    for k, node in enumerate(FEATURE_NETWORKS[name](3, max_level)):
        projected = {f'resample_{slot}' for slot, i in enumerate(node.inputs) if i < 3}
        terms = len(node.inputs) - node.attention
        for r in range(2):
            layer = cells[f'cell_{r}'][f'node_{k}']
            convolution = {'dw', 'pw'} if fusion != 'sum' else {'conv'}
            weights = {'edge_weights'} if fusion != 'sum' and terms > 1 else set()
            assert layer.keys() == (projected if r == 0 else set()) | convolution | weights | {'bn'}
            if weights:
                assert layer['edge_weights'].shape == ((terms, 4) if per_channel else (terms,))


@pytest.mark.parametrize('name', slow_but(FEATURE_NETWORKS, 'bifpn'))
def test_the_gradient_reaches_every_parameter(name):
    # Stored statistics: those of the batch would take out the biases before them.
    model, features = network(name, 8, 'softmax', per_channel=True), pyramid((5, 6), 8, 4)
    rng = np.random.default_rng(1)
    _, shapes = shapes_of(model, features)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 1, leaf.shape), jnp.float32), shapes)

    def loss(params):
        outputs = model.apply({**variables, 'params': params}, features, False)
        return sum(jnp.sum(output**2) for output in outputs)

    fast_to_compile = {'xla_backend_optimization_level': 0}
    gradients = jax.jit(jax.grad(loss), compiler_options=fast_to_compile)(variables['params'])
    leaves = traverse_util.flatten_dict(gradients, sep='/')
    assert [path for path, leaf in leaves.items() if not np.isfinite(leaf).all()] == []
    assert [path for path, leaf in leaves.items() if not np.any(leaf)] == []


def test_parameters_counted_by_hand():
    # NAS-FPN with 8 channels over inputs of 14, 12, 10, 8 and 8: P3 is read once, P4 twice, P5 once.
    _, shapes = shapes_of(network('nasfpn', 7, channels=8), pyramid((8, 8), 7, 8))
    projections = sum(width * 8 + 8 + 2 * 8 for width in (14, 12, 12, 10))
    convolutions = 7 * (9 * 8 + 8 * 8 + 8 + 2 * 8)
    weights = 3 * 2 + 2 * 2  # three sums; P5 and P7, where an input joins. The other two nodes merge by attention only
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == projections + convolutions + weights


def test_every_level_needs_a_node(monkeypatch):
    monkeypatch.setitem(FEATURE_NETWORKS, 'two', lambda low, high: (Node(3, (0, 1)), Node(7, (4, 5))))
    network = FeatureNetwork('two', 3, 7, 8, 1, 'fast', 'swish', layers.Norm())
    maps = [jnp.zeros((1, 2**size, 2**size, 8)) for size in (4, 3, 2, 1, 0)]
    with pytest.raises(UserError, match='feature network two has no node at P4: every level needs one'):
        network.init(jax.random.key(0), maps, False)
