"""Parameters and multiply-accumulates of the published models, and of layers small enough to count by hand.

The published ones are those of (docs/reference.md, Models).
"""

import flax.linen as nn
import pytest
from quick import slow_but

from effdet_jax.model.cost import Cost, cost_of_parts, sum_costs

MACS = {  # billions, of the convolutions of one image, as counted in the official graphs
    'd0': 2.492, 'd1': 6.003, 'd2': 10.83, 'd3': 24.57, 'd4': 54.58, 'd5': 134.1, 'd6': 224.1, 'd7': 322.7,
    'd7x': 407.6, 'lite0': 0.974, 'lite1': 1.967, 'lite2': 3.371, 'lite3': 7.480, 'lite3x': 13.98, 'lite4': 20.17,
}  # fmt: skip
PARAMETERS = {
    'd0': 3_880_067, 'd1': 6_625_898, 'd2': 8_097_039, 'd3': 12_032_296, 'd4': 20_723_675, 'd5': 33_653_315,
    'd6': 51_871_782, 'd7': 51_871_782, 'd7x': 77_147_166, 'lite0': 3_243_470, 'lite1': 4_248_318,
    'lite2': 5_252_334, 'lite3': 8_350_862, 'lite3x': 9_280_862, 'lite4': 15_130_894,
}  # fmt: skip
PARTS = {  # backbone, fpn with the projection of P6, class_net, box_net
    'd0': (3_595_388, 196_281, 69_354, 19_044),
    'd7x': (62_143_440, 13_112_064, 1_094_826, 796_836),
    'lite0': (2_958_848, 196_224, 69_354, 19_044),
}


@pytest.mark.parametrize('name', slow_but(MACS, 'd0', 'lite0'))
def test_published_models(name, traced):
    costs = sum_costs(traced(name))
    assert sum(cost.parameters for cost in costs.values()) == PARAMETERS[name]
    assert sum(cost.macs for cost in costs.values()) == pytest.approx(MACS[name] * 1e9, rel=1e-3)
    if name in PARTS:
        heads = costs.pop('class_net').parameters, costs.pop('box_net').parameters
        backbone = costs.pop('backbone').parameters
        assert (backbone, sum(cost.parameters for cost in costs.values()), *heads) == PARTS[name]


class Small(nn.Module):
    """A strided, a depthwise and a shared convolution."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (3, 3), strides=2, name='strided')(images)
        x = nn.Conv(4, (5, 5), feature_group_count=4, use_bias=False, name='depthwise')(x)
        shared = nn.Conv(6, (1, 1), name='shared')
        return shared(x).sum() + shared(x[:, ::2, ::2]).sum() + self.param('weight', nn.initializers.zeros, (7,)).sum()


def test_small_convolutions_are_counted_as_by_hand():
    assert cost_of_parts(Small(), (16, 12)) == {
        'strided': Cost(3 * 3 * 3 * 4 + 4, 8 * 6 * 3 * 3 * 3 * 4),
        'depthwise': Cost(5 * 5 * 4, 8 * 6 * 5 * 5 * 4),
        'shared': Cost(4 * 6 + 6, (8 * 6 + 4 * 3) * 4 * 6),
        'weight': Cost(7, 0),
    }
