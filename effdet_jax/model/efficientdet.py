"""EfficientDet: backbone -> feature network -> class and box networks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effdet_jax.model import efficientnet, feature_network, heads, layers

BACKBONE_LEVELS = (3, 4, 5)


class Outputs(NamedTuple):
    """Raw predictions, float32; N anchors ordered level, y, x, anchor."""

    class_logits: Float[Array, 'B N K']
    box_regressions: Float[Array, 'B N 4']  # ty, tx, th, tw


class EfficientDet(nn.Module):
    """The whole network, for images of any height and width.

    `axis_name` names the mapped axis over which training batch statistics are shared. `remat` recomputes each block in
    the backward pass instead of keeping its activations. `fusion`, `per_channel` and `separable` are about the nodes of
    the feature network (`feature_network.FusionNode`).
    """

    num_classes: int
    backbone: str
    feature_network: str
    fusion: str
    channels: int
    cells: int
    head_layers: int
    max_level: int = 7
    num_anchors: int = 9
    stochastic_depth: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False
    axis_name: str | None = None
    per_channel: bool = False
    separable: bool = True

    @nn.compact
    def __call__(self, images: Float[Array, 'B H W 3'], train: bool = False) -> Outputs:
        """Normalised images -> predictions.

        In training, `batch_stats` must be mutable and stochastic depth needs its rng stream.
        """
        norm = layers.Norm(self.dtype, self.axis_name)
        min_level = BACKBONE_LEVELS[0]
        activation = 'relu6' if efficientnet.VARIANTS[self.backbone].lite else 'swish'

        by_level = efficientnet.EfficientNet(
            self.backbone, self.stochastic_depth, norm, self.dtype, self.remat, name='backbone'
        )(images, train)
        features = [by_level[level] for level in BACKBONE_LEVELS]
        for level in range(BACKBONE_LEVELS[-1] + 1, self.max_level + 1):
            # P6 is projected to the network's width, then pooled; higher levels are pooled only.
            resample = feature_network.Resample(self.channels, norm, self.dtype, name=f'resample_p{level}')
            height, width = ((n + 1) // 2 for n in features[-1].shape[1:3])
            features.append(resample(features[-1], height, width, train))
        features = feature_network.FeatureNetwork(
            self.feature_network, min_level, self.max_level, self.channels, self.cells, self.fusion, activation, norm,
            self.dtype, self.remat, self.per_channel, self.separable, name='fpn',
        )(features, train)  # fmt: skip

        def head(outputs: int, bias: float, name: str) -> Array:
            module = heads.Head(
                outputs, self.num_anchors, self.head_layers, self.channels, min_level, activation, norm,
                nn.initializers.constant(bias), self.dtype, name=name,
            )  # fmt: skip
            return module(features, train).astype(jnp.float32)

        return Outputs(head(self.num_classes, heads.CLASS_BIAS, 'class_net'), head(4, 0.0, 'box_net'))


DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build_model(model_config: Any, num_classes: int, axis_name: str | None = None) -> EfficientDet:
    """The network that `config.model` describes, for `num_classes` classes (there is no background class)."""
    c, network = model_config, model_config.feature_network
    return EfficientDet(
        num_classes=num_classes,
        backbone=c.backbone,
        feature_network=network.name,
        fusion=network.fusion,
        channels=c.fpn_channels,
        cells=c.fpn_cells,
        head_layers=c.head_layers,
        max_level=c.max_level,
        num_anchors=c.anchors.scales_per_octave * len(c.anchors.aspect_ratios),
        stochastic_depth=c.stochastic_depth,
        dtype=DTYPES[c.dtype],
        remat=c.remat,
        axis_name=axis_name,
        per_channel=network.per_channel,
        separable=network.separable,
    )
