"""Compound scaling: one name sets every size of the detector. The only copy of the table.

Tan, Pang, Le, "EfficientDet: Scalable and Efficient Object Detection", table 1, and the released configurations.
"""

from typing import NamedTuple


class Scale(NamedTuple):
    """One member of the family."""

    image_size: int  # pixels, square
    backbone: str  # a name of effdet_jax.model.efficientnet.VARIANTS
    fpn_channels: int  # of the feature network and the heads
    fpn_cells: int  # repeats of the feature network
    head_layers: int  # separable convolutions before the predictor
    anchor_scale: float = 4.0
    fusion: str = 'fast'
    max_level: int = 7
    stochastic_depth: float = 0.2
    epochs: float = 300.0  # of the official training


SCALES = {
    'd0': Scale(512, 'b0', 64, 3, 3, stochastic_depth=0.0),
    'd1': Scale(640, 'b1', 88, 4, 3),
    'd2': Scale(768, 'b2', 112, 5, 3),
    'd3': Scale(896, 'b3', 160, 6, 4),
    'd4': Scale(1024, 'b4', 224, 7, 4),
    'd5': Scale(1280, 'b5', 288, 7, 4),
    'd6': Scale(1280, 'b6', 384, 8, 5, fusion='sum'),
    'd7': Scale(1536, 'b6', 384, 8, 5, anchor_scale=5.0, fusion='sum', epochs=600.0),
    'd7x': Scale(1536, 'b7', 384, 8, 5, fusion='sum', max_level=8, epochs=600.0),
    'lite0': Scale(320, 'lite0', 64, 3, 3, anchor_scale=3.0, fusion='sum'),
    'lite1': Scale(384, 'lite1', 88, 4, 3, anchor_scale=3.0, fusion='sum'),
    'lite2': Scale(448, 'lite2', 112, 5, 3, anchor_scale=3.0, fusion='sum'),
    'lite3': Scale(512, 'lite3', 160, 6, 4, fusion='sum'),
    'lite3x': Scale(640, 'lite3', 200, 6, 4, anchor_scale=3.0, fusion='sum'),
    'lite4': Scale(640, 'lite4', 224, 7, 4, fusion='sum'),
    # Not of the paper: small enough to learn the embedded shapes on two cores in minutes.
    'nano': Scale(128, 'nano', 64, 2, 3, anchor_scale=2.0, stochastic_depth=0.0),
}
