"""Whose weights are these? From the names in a file to one family, with names as `names.SCHEMES` spells them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from effdet_jax.errors import UserError
from effdet_jax.weights.names import SCHEMES, Scheme


class Recognised(NamedTuple):
    """`arrays` by the scheme's names; `unused`: {name in the file: why it is of no use here}."""

    family: str  # official, effdet, timm, port
    scheme: Scheme
    whole: bool  # a detector; else a backbone alone
    arrays: dict[str, np.ndarray]
    unused: dict[str, str]


# The first of these that is among a file's names tells the family: (name, family, scheme).
_MARKS = (
    (r'efficientnet-\w+/stem/conv2d/kernel', 'official', 'keras'),
    (r'backbone/_stem/_conv_stem/kernel', 'official', 'objects'),
    (r'backbone\.conv_stem\.weight', 'effdet', 'effdet'),
    (r'conv_stem\.weight', 'timm', 'effdet'),
    (r'_conv_stem\.weight', 'port', 'port'),
)
_DETECTOR = re.compile(r'(class_net|box_net|fpn|fpn_cells)[/.]')

# Around the names, from the outside in.
_WRAPPERS = (
    (r'/\.ATTRIBUTES/VARIABLE_VALUE$', ''),  # TensorFlow objects
    (r':0$', ''),  # Keras
    (r'^(model/|module\.|model\.)+', ''),  # what training code wraps around a model
    (r'^([^/]+)/\1/', r'\1/'),  # Keras files repeat the layer before its variables
    # Some PyTorch detectors order batch norm by level, then by repeat.
    (r'^(class|box)_net\.bn_rep\.(\d+)\.(\d+)\.(?!bn\.)', r'\1_net.bn_rep.\3.\2.bn.'),
)
_OF_NO_USE = (
    (r'.*/(Momentum|Adam|Adam_1|RMSProp|RMSProp_1)$|(.*/)?optimizer/.*|.*/\.OPTIMIZER_SLOT/.*', 'optimizer state'),
    (r'global_step|(.*/)?(iter|iterations|save_counter)|_CHECKPOINTABLE_OBJECT_GRAPH|beta\d_power', 'bookkeeping'),
    (r'.*num_batches_tracked', 'bookkeeping'),
    (r'efficientnet-\w+/head/.*|(conv_head|bn2|classifier|_conv_head|_bn1|_fc)\..*', "ImageNet's classifier"),
)
_AVERAGE = '/ExponentialMovingAverage'


# What a part of a path says of the published weights in it: (pattern, family or '' for all of them, variant).
_VARIANTS = (
    (r'adv-?prop|adv-efficientnet', '', 'advprop'),
    (r'efficient(det|net)_(b|d)\d[._]ap(?![a-z0-9])', '', 'advprop'),  # effdet, timm
    (r'coco640|efficientdet-d\d-640', 'official', '640'),
    (r'coco2(?!\d)|ckptsaug', 'official', 'plain'),  # the official files of both are called the same
    (r'efficient(det|net)_(b|d|lite)\d', 'effdet', 'plain'),
    (r'efficient(det|net)_(b|d|lite)\d', 'timm', 'plain'),
)


def variant_of(family: str, path: PurePath) -> tuple[str, str]:
    """(variant, the part of the path that says so) of weights by the file or, before that, the nearest folder.

    'plain'; 'advprop': images were scaled to -1..1; '640': trained on 640x640 pixels, whatever its size; '' where no
    part says anything. The arrays of all of them have the same names and shapes.
    """
    for part in reversed(path.parts):
        for pattern, of_family, variant in _VARIANTS:
            if of_family in ('', family) and re.search(pattern, part.lower()):
                return variant, part
    return '', ''


def recognise(arrays: Mapping[str, np.ndarray]) -> Recognised:
    """Raises UserError where the names belong to no known family, showing some of them."""
    unused = {name: why for name in arrays if (why := _why_of_no_use(_unwrap(name)))}
    named: dict[str, str] = {}  # canonical -> in the file
    for name in sorted(arrays.keys() - unused.keys(), key=lambda n: _AVERAGE in n):  # averages last: they win
        plain = _unwrap(name.replace(_AVERAGE, ''))
        if plain in named:
            unused[named[plain]] = 'its moving average is used' if _AVERAGE in name else f'stands twice, as {name}'
        named[plain] = name
    family, scheme = _family(named, list(arrays))
    if family == 'timm':
        named = {f'backbone.{plain}': name for plain, name in named.items()}
    return Recognised(
        family,
        SCHEMES[scheme],
        any(_DETECTOR.match(plain) for plain in named),
        {plain: np.asarray(arrays[name]) for plain, name in named.items()},
        unused,
    )


class Size(NamedTuple):
    """What tells the members of the family apart; the file's counts, 0 for what it does not have."""

    blocks: int
    squeezes: bool  # squeeze-excite, which Lite has not
    cells: int
    channels: int
    head_layers: int

    def __str__(self) -> str:
        backbone = f'{self.blocks} blocks with{"" if self.squeezes else "out"} squeeze-excite'
        if not self.channels:
            return f'{backbone}, a backbone alone'
        return f'{backbone}, {self.cells} cells of {self.channels} channels, {self.head_layers} head layers'


def size_of(found: Recognised) -> Size:
    """The size of the model a file is of."""

    def distinct(pattern: str) -> int:
        return len({match[1] for name in found.arrays if (match := re.search(pattern, name))})

    _, channels = _predictor(found)
    return Size(
        blocks=distinct(r'blocks[_/.](\d+(?:\.\d+)?)[/.]'),
        squeezes=any(re.search(r'[/._]se[/._]', name) for name in found.arrays),
        cells=distinct(r'fpn(?:_cells)?[/.]cells?[_/.](\d+)[/.]'),
        channels=channels,
        head_layers=distinct(r'class_net[/.](?:class-|conv_ops/|conv_rep\.)(\d+)[/.]'),
    )


def num_classes(found: Recognised, num_anchors: int) -> int:
    """How many classes the file's class predictor has, for so many anchors per position; 0 where it has none."""
    return _predictor(found)[0] // num_anchors


def _predictor(found: Recognised) -> tuple[int, int]:
    """(outputs, inputs) of the class predictor's pointwise convolution."""
    layer = found.scheme.layers.get('{net}_net/predict/pw', '').format(net='class')
    (leaf,) = found.scheme.leaves('pw/kernel', ())
    kernel = found.arrays.get(layer + leaf)
    if kernel is None or kernel.ndim != 4:
        return 0, 0
    _, _, inputs, outputs = found.scheme.to_ours('pw', kernel).shape
    return outputs, inputs


def _unwrap(name: str) -> str:
    for pattern, replacement in _WRAPPERS:
        name = re.sub(pattern, replacement, name)
    return name


def _why_of_no_use(name: str) -> str:
    return next((why for pattern, why in _OF_NO_USE if re.fullmatch(pattern, name)), '')


def _family(names: Iterable[str], in_file: list[str]) -> tuple[str, str]:
    for mark, family, scheme in _MARKS:
        if any(re.fullmatch(mark, name) for name in names):
            return family, scheme
    some = ', '.join(sorted(in_file)[:3]) or 'no arrays at all'
    raise UserError(
        f"no EfficientDet or EfficientNet of a known implementation: the file holds {some}; known are google/automl's "
        'checkpoints, effdet, timm backbones and PyTorch ports with names such as _blocks.0._depthwise_conv.weight'
    )
