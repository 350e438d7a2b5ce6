"""Feature networks: a cell is a table of nodes, and a network repeats its cell.

Tan, Pang, Le 2020, section 3. Inputs of a cell have the ids 0..L-1 (P3 upward); node k has the id L + k. Every node
brings its inputs to its own level, fuses them with a weight per edge, and applies activation, separable convolution and
batch norm. The last node of each level is that level's output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.model import layers

FUSION_EPSILON = 1e-4


class Node(NamedTuple):
    level: int
    inputs: tuple[int, ...]


def bifpn(min_level: int, max_level: int) -> tuple[Node, ...]:
    """Top-down, then bottom-up; the nodes at both ends that would have a single input are left out (figure 3d).

    Every node reads what its level has so far, then the newest of the level it comes from.
    """
    levels = range(min_level, max_level + 1)
    ids = {level: [i] for i, level in enumerate(levels)}
    nodes: list[Node] = []

    def add(level: int, source: int) -> None:
        nodes.append(Node(level, (*ids[level], ids[source][-1])))
        ids[level].append(len(levels) + len(nodes) - 1)

    for level in reversed(levels[:-1]):
        add(level, level + 1)
    for level in levels[1:]:
        add(level, level - 1)
    return tuple(nodes)


FEATURE_NETWORKS: dict[str, Callable[[int, int], tuple[Node, ...]]] = {'bifpn': bifpn}


def _fast(weights_E: Array) -> Array:
    """Fast normalised fusion: w_i / (eps + sum_j w_j) with w >= 0 by a ReLU (equation 3 of section 3.3)."""
    weights_E = nn.relu(weights_E)
    return weights_E / (weights_E.sum() + FUSION_EPSILON)


# fusion name -> edge weights [E] to factors [E]; None is a plain sum without parameters
FUSIONS: dict[str, Callable[[Array], Array] | None] = {'fast': _fast, 'softmax': jax.nn.softmax, 'sum': None}


class Resample(nn.Module):
    """One edge: 1x1 convolution and batch norm where the channel count differs, then resize to the node's level."""

    channels: int
    norm: layers.Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C'], height: int, width: int, train: bool) -> Float[Array, 'B h w F']:
        if x.shape[-1] != self.channels:
            x = layers.PointwiseConv(self.channels, layers.glorot, dtype=self.dtype, name='conv')(x)
            x = self.norm(name='bn')(x, train)
        return layers.resize_to(x, height, width)


class FusionNode(nn.Module):
    """Weighted fusion of the inputs at size (height, width), then activation, separable convolution, batch norm."""

    channels: int
    fusion: str
    activation: str
    norm: layers.Norm
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: tuple[Float[Array, 'B _ _ _'], ...], height: int, width: int, train: bool
    ) -> Float[Array, 'B h w F']:
        resampled = [
            Resample(self.channels, self.norm, self.dtype, name=f'resample_{i}')(x, height, width, train)
            for i, x in enumerate(inputs)
        ]
        normalise = FUSIONS[self.fusion]
        if normalise is None:
            x = sum(resampled[1:], start=resampled[0])
        else:
            weights_E = self.param('edge_weights', nn.initializers.ones, (len(inputs),), jnp.float32)
            factors_E = normalise(weights_E).astype(self.dtype)
            weighted = [factor * x for factor, x in zip(factors_E, resampled, strict=True)]
            x = sum(weighted[1:], start=weighted[0])
        x = layers.ACTIVATIONS[self.activation](x)
        # Named here, not inside a SeparableConv, because the published tree has node/{dw, pw, bn}.
        x = layers.DepthwiseConv(3, 1, layers.depthwise_glorot, self.dtype, name='dw')(x)
        x = layers.PointwiseConv(self.channels, layers.glorot, dtype=self.dtype, name='pw')(x)
        return self.norm(name='bn')(x, train)


class Cell(nn.Module):
    """One pass over the node table: a map per level in, a map per level out (P3 upward)."""

    nodes: tuple[Node, ...]
    min_level: int
    channels: int
    fusion: str
    activation: str
    norm: layers.Norm
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, features: list[Float[Array, 'B _ _ _']], train: bool) -> list[Float[Array, 'B _ _ _']]:
        node_class: Any = nn.remat(FusionNode, static_argnums=(2, 3, 4)) if self.remat else FusionNode
        sizes = [f.shape[1:3] for f in features]
        maps = list(features)
        outputs = dict(enumerate(features))
        for k, node in enumerate(self.nodes):
            level = node.level - self.min_level
            apply = node_class(self.channels, self.fusion, self.activation, self.norm, self.dtype, name=f'node_{k}')
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

    @nn.compact
    def __call__(self, features: list[Float[Array, 'B _ _ _']], train: bool) -> list[Float[Array, 'B _ _ F']]:
        nodes = FEATURE_NETWORKS[self.name_of_cell](self.min_level, self.max_level)
        for r in range(self.cells):
            cell = Cell(
                nodes, self.min_level, self.channels, self.fusion, self.activation, self.norm, self.dtype, self.remat,
                name=f'cell_{r}',
            )  # fmt: skip
            features = cell(features, train)
        return features
