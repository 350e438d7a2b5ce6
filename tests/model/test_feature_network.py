import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax.model import feature_network, layers
from effdet_jax.model.feature_network import FUSIONS, Node, bifpn

# Spec 3. Ids 0..L-1 are the inputs, P3 upward; node k has the id L + k.
P3_TO_P7 = [
    Node(6, (3, 4)), Node(5, (2, 5)), Node(4, (1, 6)), Node(3, (0, 7)),
    Node(4, (1, 7, 8)), Node(5, (2, 6, 9)), Node(6, (3, 5, 10)), Node(7, (4, 11)),
]  # fmt: skip
P3_TO_P8 = [
    Node(7, (4, 5)), Node(6, (3, 6)), Node(5, (2, 7)), Node(4, (1, 8)), Node(3, (0, 9)),
    Node(4, (1, 9, 10)), Node(5, (2, 8, 11)), Node(6, (3, 7, 12)), Node(7, (4, 6, 13)), Node(8, (5, 14)),
]  # fmt: skip


@pytest.mark.parametrize(('max_level', 'nodes'), [(7, P3_TO_P7), (8, P3_TO_P8)])
def test_nodes_of_bifpn(max_level, nodes):
    assert list(bifpn(3, max_level)) == nodes


@pytest.mark.parametrize(('min_level', 'max_level'), [(3, 5), (2, 7), (3, 9)])
def test_bifpn_of_any_levels(min_level, max_level):
    nodes, count = bifpn(min_level, max_level), max_level - min_level + 1
    assert len(nodes) == 2 * (count - 1)
    level_of = [*range(min_level, max_level + 1), *(node.level for node in nodes)]
    for k, node in enumerate(nodes):
        assert max(node.inputs) < count + k  # only what is there already
        *own, other = (level_of[i] for i in node.inputs)
        assert set(own) == {node.level} and abs(other - node.level) == 1
    # The level's output is its last node; every other node is read by a later one.
    last = {node.level: count + k for k, node in enumerate(nodes)}
    assert set(last) == set(range(min_level, max_level + 1))
    read = {i for node in nodes for i in node.inputs}
    assert read | set(last.values()) == set(range(count + len(nodes)))


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
def fused_by(fusion):
    """A node whose convolution and batch norm do nothing: its output is relu6 of the fused inputs."""
    node = feature_network.FusionNode(4, fusion, 'relu6', layers.Norm(), jnp.float32)
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
