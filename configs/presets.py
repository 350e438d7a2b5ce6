"""Settings of published checkpoints: {preset: {config key: value}}.

`import-weights` chooses one, `{family}` or `{family}-{variant}`, and saves it with the weights: input statistics,
aspect ratios of the anchors, kind of NMS (docs/reference.md, Differences between implementations). The released
official D0-D7x were trained with the ratio pairs (1.4, 0.7), AdvProp and Lite with square roots.
"""

from typing import Any

_PAIRS = {'model.anchors.aspect_ratios': ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))}
_SQUARE_ROOTS = {'model.anchors.aspect_ratios': (1.0, 2.0, 0.5)}
_MINUS_ONE_TO_ONE = {'image.mean': (127.5,) * 3, 'image.std': (127.5,) * 3}
_BLACK_PADDING = {'image.padding': -1.0}
_GAUSSIAN = {'eval.nms': 'gaussian', 'eval.sigma': 0.5, 'eval.score_threshold': 0.001}
_HARD = {'eval.nms': 'hard', 'eval.nms_iou_threshold': 0.5, 'eval.score_threshold': 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    'official': _PAIRS | _GAUSSIAN,
    'official-640': _PAIRS | _GAUSSIAN | {'image.size': (640, 640)},
    'official-lite': _SQUARE_ROOTS | _GAUSSIAN,
    'official-advprop': _SQUARE_ROOTS | _GAUSSIAN | _MINUS_ONE_TO_ONE | _BLACK_PADDING,
    'effdet': _PAIRS | _HARD,
    'effdet-lite': _PAIRS | _HARD | _MINUS_ONE_TO_ONE,
    'effdet-advprop': _PAIRS | _HARD | _MINUS_ONE_TO_ONE | _BLACK_PADDING,
    # Backbones: what the ImageNet training saw.
    'timm': {},
    'timm-lite': _MINUS_ONE_TO_ONE,
    'timm-advprop': _MINUS_ONE_TO_ONE,
    'port': {},
    'port-lite': {},
    'port-advprop': _MINUS_ONE_TO_ONE,
    'config': {},  # leave the config as it is
}
