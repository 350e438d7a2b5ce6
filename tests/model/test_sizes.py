"""Anchors and blocks of the published models: (docs/reference.md, Models) and (docs/reference.md, Backbone)."""

import flax.linen as nn
import pytest

from effdet_jax.configs import default
from effdet_jax.detection.anchors import level_sizes, make_anchors
from effdet_jax.model import build_model, efficientnet, layers
from effdet_jax.weights.names import shapes_of

ANCHORS = {
    'd0': 49_104, 'd1': 76_725, 'd2': 110_484, 'd3': 150_381, 'd4': 196_416, 'd5': 306_900, 'd6': 306_900,
    'd7': 441_936, 'd7x': 442_260, 'lite0': 19_206, 'lite1': 27_621, 'lite2': 37_629, 'lite3': 49_104,
    'lite3x': 76_725, 'lite4': 76_725,
}  # fmt: skip

BACKBONES = {  # stem, output channels of the stages, blocks of the stages
    'b0': (32, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    'b1': (32, (16, 24, 40, 80, 112, 192, 320), (2, 3, 3, 4, 4, 5, 2)),
    'b2': (32, (16, 24, 48, 88, 120, 208, 352), (2, 3, 3, 4, 4, 5, 2)),
    'b3': (40, (24, 32, 48, 96, 136, 232, 384), (2, 3, 3, 5, 5, 6, 2)),
    'b4': (48, (24, 32, 56, 112, 160, 272, 448), (2, 4, 4, 6, 6, 8, 2)),
    'b5': (48, (24, 40, 64, 128, 176, 304, 512), (3, 5, 5, 7, 7, 9, 3)),
    'b6': (56, (32, 40, 72, 144, 200, 344, 576), (3, 6, 6, 8, 8, 11, 3)),
    'b7': (64, (32, 48, 80, 160, 224, 384, 640), (4, 7, 7, 10, 10, 13, 4)),
    'lite0': (32, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    'lite1': (32, (16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    'lite2': (32, (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
    'lite3': (32, (24, 32, 48, 96, 136, 232, 384), (1, 3, 3, 5, 5, 6, 1)),
    'lite4': (32, (24, 32, 56, 112, 160, 272, 448), (1, 4, 4, 6, 6, 8, 1)),
}
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)


@pytest.mark.parametrize('name', ANCHORS)
def test_anchors(name):
    config = default.get_config(name)
    size, anchors = config.image.size, config.model.anchors
    sizes = level_sizes(size, 3, config.model.max_level)
    made = make_anchors(sizes, size, anchors.scale, anchors.scales_per_octave, anchors.aspect_ratios)
    assert made.shape == (ANCHORS[name], 4)


@pytest.mark.parametrize('name', BACKBONES)
def test_block_table(name):
    stem, channels, repeats = BACKBONES[name]
    variant = efficientnet.VARIANTS[name]
    assert efficientnet.stem_channels(variant) == stem
    inputs = (stem, *channels)
    expected = [
        (KERNELS[s], STRIDES[s] if r == 0 else 1, EXPANSIONS[s], inputs[s] if r == 0 else channels[s], channels[s])
        for s in range(7)
        for r in range(repeats[s])
    ]
    table = efficientnet.block_table(variant)
    assert [block[:5] for block in table] == expected
    ends = {block.ends_level: (i, block.out_channels) for i, block in enumerate(table) if block.ends_level}
    last_blocks = [sum(repeats[: s + 1]) - 1 for s in range(7)]
    # Stages 1, 2, 3, 5 and 7 are the last of their resolution.
    assert ends == {level: (last_blocks[s], channels[s]) for level, s in zip(range(1, 6), (0, 1, 2, 4, 6), strict=True)}


@pytest.mark.parametrize(('name', 'rate'), [('d0', 0.0), ('d1', 0.2), ('lite0', 0.2)])
def test_stochastic_depth_grows_with_the_block_and_touches_residual_blocks_only(name, rate, depthwise_by_xla):
    rates = {}

    def note(method, args, kwargs, context):
        if isinstance(context.module, layers.StochasticDepth):
            rates[context.module.path[-2]] = context.module.rate
        return method(*args, **kwargs)

    model = build_model(default.get_config(name).model, num_classes=1)
    with nn.intercept_methods(note):
        shapes_of(model)
    blocks = efficientnet.block_table(efficientnet.VARIANTS[model.backbone])
    residual = [i for i, b in enumerate(blocks) if b.stride == 1 and b.in_channels == b.out_channels]
    assert rates == pytest.approx({f'blocks_{i}': rate * i / len(blocks) for i in residual})


@pytest.mark.parametrize(
    ('channels', 'rounded'),
    [(16 * 1.0, 16), (3.0, 8), (24 * 1.1, 24), (40 * 1.1, 48), (32 * 1.4, 48), (16 * 1.2, 24), (320 * 2.0, 640)],
)
def test_rounding_of_channels(channels, rounded):
    assert efficientnet.round_channels(channels) == rounded
