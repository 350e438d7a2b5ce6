"""Feature networks: a cell is a table of nodes, and a network repeats its cell.

Tan, Pang, Le 2020, section 3. Inputs of a cell have the ids 0..L-1 (P3 upward); node k has the id L + k. Every node
brings its inputs to its own level, fuses them with a weight per edge, and applies activation, convolution and batch
norm. The last node of each level is that level's output.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.errors import UserError
from effdet_jax.model import layers
from effdet_jax.model.batch_norm import ACTIVATIONS

FUSION_EPSILON = 1e-4


class Node(NamedTuple):
    level: int
    inputs: tuple[int, ...]
    attention: bool = False  # merge the first two inputs by `global_attention`, then fuse with the rest


def fpn(min_level: int, max_level: int) -> tuple[Node, ...]:
    """Top-down: a node for every level (Lin et al. 2017; figure 2a)."""
    table, inputs = _start(min_level, max_level)
    _walk(table, reversed(inputs), inputs)
    return tuple(table[len(inputs) :])


def panet(min_level: int, max_level: int) -> tuple[Node, ...]:
    """Top-down, then bottom-up over what that gave (Liu et al. 2018; figure 2b)."""
    table, inputs = _start(min_level, max_level)
    down = _walk(table, reversed(inputs), inputs)
    _walk(table, inputs, {level: (node,) for level, node in down.items()})
    return tuple(table[len(inputs) :])


def bifpn(min_level: int, max_level: int) -> tuple[Node, ...]:
    """Top-down, then bottom-up; the nodes at both ends that would have a single input are left out (figure 2d)."""
    table, inputs = _start(min_level, max_level)
    _there_and_back(table, list(reversed(inputs)), inputs)
    return tuple(table[len(inputs) :])


def qufpn(min_level: int, max_level: int) -> tuple[Node, ...]:
    """BiFPN, and beside it the same bottom-up first; then a node per level reads both (google/automl's `qufpn`)."""
    table, inputs = _start(min_level, max_level)
    down_first = _there_and_back(table, list(reversed(inputs)), inputs)
    up_first = _there_and_back(table, list(inputs), inputs)
    for level in reversed(inputs):
        table.append(Node(level, (down_first[level], up_first[level])))
    return tuple(table[len(inputs) :])


def fully_connected(min_level: int, max_level: int) -> tuple[Node, ...]:
    """One node per level, which reads every input: the fully-connected FPN that the paper compares with.

    It gives no figure; that a cell is a single layer of nodes is our reading of its name.
    """
    levels = range(min_level, max_level + 1)
    return tuple(Node(level, tuple(range(len(levels)))) for level in levels)


def nasfpn(min_level: int, max_level: int) -> tuple[Node, ...]:
    """The cell that Ghiasi, Lin, Le 2019 found (figure 6), whose seven nodes merge two maps each.

    By the rule of that search a map that nobody reads joins the output of its level: here the inputs P5 and P7. The
    search was for P3-P7. For P3-P8 we add one node behind it, which reads the input P8 and the new P7, as BiFPN's does.

    Raises:
      UserError: for other levels.
    """
    if min_level != 3 or max_level not in (7, 8):
        raise UserError(f'nasfpn was found for P3-P7, not P{min_level}-P{max_level}: set config.model.max_level=7 or 8')
    p4, p5, p6, p7 = range(1, 5)
    first = max_level - min_level + 1
    p4_attended, p4_summed, p3_out, p4_out, p5_out, p7_out, _ = range(first, first + 7)
    nodes = (
        Node(4, (p4, p6), attention=True),
        Node(4, (p4, p4_attended)),
        Node(3, (0, p4_summed)),
        Node(4, (p4_summed, p3_out)),
        Node(5, (p3_out, p4_out, p5), attention=True),
        Node(7, (p4_summed, p5_out, p7), attention=True),
        Node(6, (p5_out, p7_out), attention=True),
    )
    return nodes if max_level == 7 else (*nodes, Node(8, (5, p7_out)))


FEATURE_NETWORKS: dict[str, Callable[[int, int], tuple[Node, ...]]] = {
    f.__name__: f for f in (bifpn, fpn, panet, nasfpn, qufpn, fully_connected)
}


def _start(min_level: int, max_level: int) -> tuple[list[Node], dict[int, tuple[int, ...]]]:
    """(a table in which the inputs stand for themselves, so that its length is the next id; {level: ids there})."""
    levels = range(min_level, max_level + 1)
    return [Node(level, ()) for level in levels], {level: (i,) for i, level in enumerate(levels)}


def _walk(
    table: list[Node], order: Iterable[int], ids: Mapping[int, tuple[int, ...]], skip_first: bool = False
) -> dict[int, int]:
    """Adds a node per level, in this order: it reads its level's `ids` and the node before it.

    With `skip_first` the first level, where there is nothing to fuse, gets none. Returns {level: newest id}.
    """
    newest: dict[int, int] = {}
    before: tuple[int, ...] = ()
    for level in order:
        if skip_first and not newest:
            newest[level] = ids[level][-1]
        else:
            newest[level] = len(table)
            table.append(Node(level, (*ids[level], *before)))
        before = (newest[level],)
    return newest


def _there_and_back(table: list[Node], order: list[int], inputs: Mapping[int, tuple[int, ...]]) -> dict[int, int]:
    """Two walks, the second one backwards over the inputs and the first. Returns {level: newest id}."""
    there = _walk(table, order, inputs, skip_first=True)
    both = {level: tuple(dict.fromkeys((*ids, there[level]))) for level, ids in inputs.items()}
    return _walk(table, reversed(order), both, skip_first=True)


def _fast(weights: Array) -> Array:
    """Fast normalised fusion: w_i / (eps + sum_j w_j) with w >= 0 by a ReLU (equation 3 of section 3.3)."""
    weights = nn.relu(weights)
    return weights / (weights.sum(axis=0) + FUSION_EPSILON)


# fusion name -> edge weights [E], or [E, F] per channel, to as many factors; None is a plain sum without parameters
FUSIONS: dict[str, Callable[[Array], Array] | None] = {
    'fast': _fast,
    'softmax': functools.partial(jax.nn.softmax, axis=0),
    'sum': None,
}


def global_attention(a: Float[Array, 'B H W C'], b: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    """GP of Ghiasi, Lin, Le 2019 (figure 4b): `a`, and of `b` those channels that are strong anywhere in `a`.

    The figure of the network does not tell which of two maps is pooled. In the authors' code (tensorflow/models,
    nasfpn), whose order of inputs is ours, it is the first one, by its maximum; mmdetection pools the same one, by its
    mean.
    """
    # Not a.max(): its gradient looks for the largest value by ==, and where XLA computes `a` twice, rounding otherwise,
    # there may be none, which is nan (seen on CPU).
    return a + b * nn.sigmoid(nn.max_pool(a, a.shape[1:3]))


class Resample(nn.Module):
    """One edge: 1x1 convolution and batch norm where the channel count differs, then resize to the node's level."""

    channels: int
    norm: layers.Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C'], height: int, width: int, train: bool) -> Float[Array, 'B h w F']:
        if x.shape[-1] != self.channels:
            x = layers.PointwiseConv(self.channels, layers.glorot, dtype=self.dtype, name='conv')(x)
            x = self.norm('bn')(x, train)
        return layers.resize_to(x, height, width)


class FusionNode(nn.Module):
    """Weighted fusion of the inputs at size (height, width), then activation, convolution, batch norm.

    `attention`: the first two inputs are merged into one by `global_attention` before. `per_channel`: every channel of
    an edge has a weight. `separable`: a depthwise and a pointwise convolution, otherwise one of 3x3.
    """

    channels: int
    fusion: str
    activation: str
    norm: layers.Norm
    dtype: Any
    per_channel: bool = False
    separable: bool = True
    attention: bool = False

    @nn.compact
    def __call__(
        self, inputs: tuple[Float[Array, 'B _ _ _'], ...], height: int, width: int, train: bool
    ) -> Float[Array, 'B h w F']:
        resampled = [
            Resample(self.channels, self.norm, self.dtype, name=f'resample_{i}')(x, height, width, train)
            for i, x in enumerate(inputs)
        ]
        if self.attention:
            resampled = [global_attention(*resampled[:2]), *resampled[2:]]
        normalise = FUSIONS[self.fusion]
        if normalise is None or len(resampled) == 1:  # a map on its own has nothing to be weighed against
            x = sum(resampled[1:], start=resampled[0])
        else:
            shape = (len(resampled), self.channels) if self.per_channel else (len(resampled),)
            weights = self.param('edge_weights', nn.initializers.ones, shape, jnp.float32)
            factors = normalise(weights).astype(self.dtype)
            weighted: list[Array] = [factor * x for factor, x in zip(factors, resampled, strict=True)]
            x = sum(weighted[1:], start=weighted[0])
        x = ACTIVATIONS[self.activation](x)
        if self.separable:
            # Named here, not inside a SeparableConv, because the published tree has node/{dw, pw, bn}.
            x = layers.DepthwiseConv(3, 1, layers.depthwise_glorot, self.dtype, name='dw')(x)
            x = layers.PointwiseConv(self.channels, layers.glorot, dtype=self.dtype, name='pw')(x)
        else:
            x = nn.Conv(self.channels, (3, 3), kernel_init=layers.glorot, dtype=self.dtype, name='conv')(x)
        return self.norm('bn')(x, train)


class Cell(nn.Module):
    """One pass over the node table: a map per level in, a map per level out (P3 upward).

    `make_node`: a `FusionNode` but for its `attention` and `name`.
    """

    nodes: tuple[Node, ...]
    min_level: int
    make_node: Callable[..., Callable]

    @nn.compact
    def __call__(self, features: list[Float[Array, 'B _ _ _']], train: bool) -> list[Float[Array, 'B _ _ _']]:
        sizes = [f.shape[1:3] for f in features]
        maps = list(features)
        outputs = {}  # the last node of each level
        for k, node in enumerate(self.nodes):
            level = node.level - self.min_level
            apply = self.make_node(attention=node.attention, name=f'node_{k}')
            maps.append(apply(tuple(maps[i] for i in node.inputs), *sizes[level], train))
            outputs[level] = maps[-1]
        return [outputs[level] for level in range(len(features))]


class FeatureNetwork(nn.Module):
    """`cells` repeats of the cell `name`: one map per level in, one map of `channels` per level out."""

    name_of_cell: str
    min_level: int
    max_level: int
    channels: int
    cells: int
    fusion: str
    activation: str
    norm: layers.Norm
    dtype: Any = jnp.float32
    remat: bool = False
    per_channel: bool = False
    separable: bool = True

    @nn.compact
    def __call__(self, features: list[Float[Array, 'B _ _ _']], train: bool) -> list[Float[Array, 'B _ _ F']]:
        nodes = FEATURE_NETWORKS[self.name_of_cell](self.min_level, self.max_level)
        if missing := {*range(self.min_level, self.max_level + 1)} - {node.level for node in nodes}:
            raise UserError(
                f'feature network {self.name_of_cell} has no node at P{min(missing)}: every level needs one'
            )
        node_class: Any = nn.remat(FusionNode, static_argnums=(2, 3, 4)) if self.remat else FusionNode
        make_node = functools.partial(
            node_class, self.channels, self.fusion, self.activation, self.norm, self.dtype, self.per_channel,
            self.separable,
        )  # fmt: skip
        for r in range(self.cells):
            features = Cell(nodes, self.min_level, make_node, name=f'cell_{r}')(features, train)
        return features
