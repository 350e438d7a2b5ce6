"""Proof that two networks compute the same: our outputs, layer by layer, beside reference outputs."""

import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effdet_jax.errors import UserError

TOLERANCE = 2e-5  # of a map's largest value, in float32
MIN_LEVEL = 3

_OF_THE_INPUT = ('image', 'image_shape')
_ABOUT_THE_FILE = ('variables', 'num_classes')


class Row(NamedTuple):
    """One map: the largest difference, absolute and relative to the largest value of the reference."""

    name: str
    shape: tuple[int, ...]
    largest: float
    difference: float
    relative: float


def read_reference(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(normalised input float32 [B, H, W, 3], {name: output}) of an .npz.

    Its input is `image`, or the fixed one of the shape `image_shape`: standard normal numbers, seeded with the CRC-32
    of 'image'. Every other array is an output, NHWC: `feature_p3`, ..., `class_p3`, `box_p3`, ... or the path of a
    layer in our tree, such as `backbone/blocks_3/dw_conv`; a layer that all levels share has one output for each,
    `class_net/conv_0@p3`.

    Raises:
      UserError: where the file is missing, damaged or without input or outputs.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: no readable .npz of reference outputs ({error}): give --certify one') from error
    if 'image' in arrays:
        image = arrays['image'].astype(np.float32)
    elif 'image_shape' in arrays:
        image = np.random.default_rng(zlib.crc32(b'image')).standard_normal(arrays['image_shape']).astype(np.float32)
    else:
        raise UserError(f'{path}: neither image nor image_shape in it: say what input the outputs belong to')
    outputs = {name: array for name, array in arrays.items() if name not in _OF_THE_INPUT + _ABOUT_THE_FILE}
    if image.ndim != 4 or image.shape[-1] != 3 or not outputs:
        raise UserError(f'{path}: needed are an image [B, H, W, 3], found {image.shape}, and at least one output')
    return image, outputs


def layer_outputs(model: Any, variables: Any, images: np.ndarray, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """What the layers named in `wanted` return for normalised images, names as in `read_reference`.

    Raises:
      UserError: for a name that no layer has.
    """
    layers = {name.partition('@')[0] for name in wanted}

    def is_wanted(module: Any, method: str) -> bool:
        return method == '__call__' and ('/'.join(module.path) in layers or module.name == 'backbone')

    def apply(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, capture_intermediates=is_wanted)

    with jax.default_matmul_precision('highest'):  # accelerators round to fewer bits by default
        outputs, state = jax.jit(apply)(variables, jnp.asarray(images))
    (features,) = state['intermediates']['backbone']['__call__']
    ours = {f'feature_p{level}': np.asarray(feature) for level, feature in features.items()}
    ours |= _by_level('class', outputs.class_logits, features, model)
    ours |= _by_level('box', outputs.box_regressions, features, model)
    for layer in layers - ours.keys():
        node: Any = state['intermediates']
        for part in layer.split('/'):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        calls = node.get('__call__', ())
        shared = [f'{layer}@p{MIN_LEVEL + i}' for i in range(len(calls))]
        ours |= dict(zip([layer] if len(calls) == 1 else shared, map(np.asarray, calls), strict=True))
    if unknown := sorted(set(wanted) - ours.keys()):
        raise UserError(f'the reference has outputs of {", ".join(unknown[:3])}, and the model has no such layer')
    return {name: ours[name] for name in wanted}


def _by_level(name: str, rows: jax.Array, features: Mapping[int, Any], model: Any) -> dict[str, np.ndarray]:
    """[B, N, outputs], ordered level, y, x, anchor -> {'class_p3': [B, H, W, anchors * outputs], ...}."""
    height, width = features[MIN_LEVEL].shape[1:3]
    maps, first = {}, 0
    for level in range(MIN_LEVEL, model.max_level + 1):
        count = height * width * model.num_anchors
        part = np.asarray(rows[:, first : first + count])
        maps[f'{name}_p{level}'] = part.reshape(len(part), height, width, -1)
        first, height, width = first + count, (height + 1) // 2, (width + 1) // 2
    return maps


def compare(ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> list[Row]:
    """A row for each reference output, in the order of the file.

    Raises:
      UserError: where shapes differ.
    """
    rows = []
    for name, theirs in reference.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(theirs, np.float64)
        if a.shape != b.shape:
            raise UserError(f'{name} is {list(b.shape)} in the reference and {list(a.shape)} here')
        largest, difference = float(np.abs(b).max()), float(np.abs(a - b).max())
        rows.append(Row(name, b.shape, largest, difference, difference / max(largest, 1e-30)))
    return rows
