"""Recognises which implementation a weights file comes from, and converts its names to those of `names.SCHEMES`."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from effdet_jax.errors import UserError
from effdet_jax.weights.names import SCHEMES, Scheme


class Recognised(NamedTuple):
    """The weights in a file, recognised by their names."""

    family: str  # official, effdet, timm, port
    scheme: Scheme
    is_detector: bool  # otherwise only a backbone
    arrays: dict[str, np.ndarray]  # by the names of the scheme
    unused: dict[str, str]  # name in the file -> why it is not used


# (regex, family, scheme): the first regex that matches a name in the file decides.
_MARKS = (
    (r'efficientnet-\w+/stem/conv2d/kernel', 'official', 'keras'),
    (r'backbone/_stem/_conv_stem/kernel', 'official', 'objects'),
    (r'backbone\.conv_stem\.weight', 'effdet', 'effdet'),
    (r'conv_stem\.weight', 'timm', 'effdet'),
    (r'_conv_stem\.weight', 'port', 'port'),
)
_DETECTOR = re.compile(r'(class_net|box_net|fpn|fpn_cells)[/.]')

# Prefixes and suffixes around the names, replaced in this order.
_WRAPPERS = (
    (r'/\.ATTRIBUTES/VARIABLE_VALUE$', ''),  # TensorFlow objects
    (r':0$', ''),  # Keras
    (r'^(model/|module\.|model\.)+', ''),  # added by training code
    (r'^([^/]+)/\1/', r'\1/'),  # Keras repeats the layer before its variables
    # Some PyTorch detectors order batch norm by level, then by repeat.
    (r'^(class|box)_net\.bn_rep\.(\d+)\.(\d+)\.(?!bn\.)', r'\1_net.bn_rep.\3.\2.bn.'),
)
_UNUSED = (
    (r'.*/(Momentum|Adam|Adam_1|RMSProp|RMSProp_1)$|(.*/)?optimizer/.*|.*/\.OPTIMIZER_SLOT/.*', 'optimizer state'),
    (r'global_step|(.*/)?(iter|iterations|save_counter)|_CHECKPOINTABLE_OBJECT_GRAPH|beta\d_power', 'bookkeeping'),
    (r'.*num_batches_tracked', 'bookkeeping'),
    (r'efficientnet-\w+/head/.*|(conv_head|bn2|classifier|_conv_head|_bn1|_fc)\..*', "ImageNet's classifier"),
)
_AVERAGE = '/ExponentialMovingAverage'


# (pattern in a folder or file name, family or '' for all, variant of the published weights)
_VARIANTS = (
    (r'adv-?prop|adv-efficientnet', '', 'advprop'),
    (r'efficient(det|net)_(b|d)\d[._]ap(?![a-z0-9])', '', 'advprop'),  # effdet, timm
    (r'coco640|efficientdet-d\d-640', 'official', '640'),
    (r'coco2(?!\d)|ckptsaug', 'official', 'plain'),  # official plain and AdvProp files have the same names
    (r'efficient(det|net)_(b|d|lite)\d', 'effdet', 'plain'),
    (r'efficient(det|net)_(b|d|lite)\d', 'timm', 'plain'),
)


def variant_of(family: str, path: PurePath) -> tuple[str, str]:
    """(variant of the weights, the part of the path that tells it), by the file name, then by the nearest folder.

    The variants are 'plain', 'advprop' (images scaled to -1..1), '640' (trained at 640x640 pixels, for any D-number)
    and '' if the path does not tell. The arrays of all variants have the same names and shapes.
    """
    for part in reversed(path.parts):
        for pattern, of_family, variant in _VARIANTS:
            if of_family in ('', family) and re.search(pattern, part.lower()):
                return variant, part
    return '', ''


def recognise(arrays: Mapping[str, np.ndarray]) -> Recognised:
    """The family and the weights of a file.

    Raises:
      UserError: if the names belong to no known family.
    """
    unused = {name: why for name in arrays if (why := _why_unused(_unwrap(name)))}
    named: dict[str, str] = {}  # name of the scheme -> name in the file
    for name in sorted(arrays.keys() - unused.keys(), key=lambda n: _AVERAGE in n):  # averages last: they win
        plain = _unwrap(name.replace(_AVERAGE, ''))
        if plain in named:
            unused[named[plain]] = 'its moving average is used' if _AVERAGE in name else f'duplicate of {name}'
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


class ModelSize(NamedTuple):
    """The numbers in which D0 to D7x and the Lite models differ; 0 for what a backbone does not have."""

    blocks: int
    squeeze_excite: bool  # False for Lite
    cells: int
    channels: int
    head_layers: int

    def __str__(self) -> str:
        backbone = f'{self.blocks} blocks with{"" if self.squeeze_excite else "out"} squeeze-excite'
        if not self.channels:
            return f'{backbone}, backbone only'
        return f'{backbone}, {self.cells} cells of {self.channels} channels, {self.head_layers} head layers'


def size_of(weights: Recognised) -> ModelSize:
    """The size of the model, counted from the names and shapes in its file."""

    def distinct(pattern: str) -> int:
        return len({match[1] for name in weights.arrays if (match := re.search(pattern, name))})

    _, channels = _predictor(weights)
    return ModelSize(
        blocks=distinct(r'blocks[_/.](\d+(?:\.\d+)?)[/.]'),
        squeeze_excite=any(re.search(r'[/._]se[/._]', name) for name in weights.arrays),
        cells=distinct(r'fpn(?:_cells)?[/.]cells?[_/.](\d+)[/.]'),
        channels=channels,
        head_layers=distinct(r'class_net[/.](?:class-|conv_ops/|conv_rep\.)(\d+)[/.]'),
    )


def num_classes(weights: Recognised, num_anchors: int) -> int:
    """The number of classes of the class predictor, given the number of anchors per position; 0 without a predictor."""
    return _predictor(weights)[0] // num_anchors


def _predictor(weights: Recognised) -> tuple[int, int]:
    """(outputs, inputs) of the class predictor's pointwise convolution; zeros without one."""
    layer = weights.scheme.layers.get('{net}_net/predict/pw', '').format(net='class')
    (leaf,) = weights.scheme.leaves('pw/kernel', ())
    kernel = weights.arrays.get(layer + leaf)
    if kernel is None or kernel.ndim != 4:
        return 0, 0
    _, _, inputs, outputs = weights.scheme.to_ours('pw', kernel).shape
    return outputs, inputs


def _unwrap(name: str) -> str:
    for pattern, replacement in _WRAPPERS:
        name = re.sub(pattern, replacement, name)
    return name


def _why_unused(name: str) -> str:
    return next((why for pattern, why in _UNUSED if re.fullmatch(pattern, name)), '')


def _family(names: Iterable[str], in_file: list[str]) -> tuple[str, str]:
    for mark, family, scheme in _MARKS:
        if any(re.fullmatch(mark, name) for name in names):
            return family, scheme
    some = ', '.join(sorted(in_file)[:3]) or 'no arrays at all'
    raise UserError(
        f'not an EfficientDet or EfficientNet of a known implementation: the file has {some}; give a checkpoint of '
        'google/automl or effdet, or a backbone of timm or of a PyTorch port (_blocks.0._depthwise_conv.weight)'
    )
