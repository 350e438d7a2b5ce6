"""Verifies imported weights: compares our outputs with reference outputs, layer by layer."""

import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effdet_jax.errors import UserError

TOLERANCE = 2e-5  # relative to the largest value of an output, in float32
MIN_LEVEL = 3

_NO_OUTPUTS = ('image', 'image_shape', 'variables', 'num_classes')


class Row(NamedTuple):
    """The largest difference of one output, absolute and relative to the largest value of the reference."""

    name: str
    shape: tuple[int, ...]
    largest: float  # value of the reference
    difference: float
    relative: float


def read_reference(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(normalised input float32 [B, H, W, 3], {name: output}) from an .npz file.

    The input is the array `image`, or is generated from `image_shape`: standard normal, seeded with the CRC-32 of
    'image'. The other arrays are outputs, NHWC: `feature_p3`, ..., `class_p3`, `box_p3`, ... or the path of a layer in
    our tree, such as `backbone/blocks_3/dw_conv`. A layer shared by all levels has one output per level, as in
    `class_net/conv_0@p3`.

    Raises:
      UserError: if the file is missing or damaged, or has no input or no outputs.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f'{path} is not a readable .npz file ({error}): give --certify reference outputs') from error
    if 'image' in arrays:
        image = arrays['image'].astype(np.float32)
    elif 'image_shape' in arrays:
        image = np.random.default_rng(zlib.crc32(b'image')).standard_normal(arrays['image_shape']).astype(np.float32)
    else:
        raise UserError(f'{path} has no input: add the array image or image_shape')
    outputs = {name: array for name, array in arrays.items() if name not in _NO_OUTPUTS}
    if image.ndim != 4 or image.shape[-1] != 3 or not outputs:
        raise UserError(
            f'{path} has an image of shape {image.shape} and {len(outputs)} outputs: give [B, H, W, 3] and at least one'
        )
    return image, outputs


def layer_outputs(model: Any, variables: Any, images: np.ndarray, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The outputs of the layers in `wanted` for normalised images, by the names of `read_reference`.

    Raises:
      UserError: for a name that is no layer of the model.
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
        raise UserError(f'the reference has outputs of {", ".join(unknown[:3])}, which are no layers of this model')
    return {name: ours[name] for name in wanted}


def _by_level(name: str, rows: jax.Array, features: Mapping[int, Any], model: Any) -> dict[str, np.ndarray]:
    """[B, N, outputs], ordered by level, y, x, anchor -> {'class_p3': [B, H, W, anchors * outputs], ...}."""
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
      UserError: if shapes differ.
    """
    rows = []
    for name, theirs in reference.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(theirs, np.float64)
        if a.shape != b.shape:
            raise UserError(f'{name} has shape {list(b.shape)} in the reference but {list(a.shape)} in this model')
        largest, difference = float(np.abs(b).max()), float(np.abs(a - b).max())
        rows.append(Row(name, b.shape, largest, difference, difference / max(largest, 1e-30)))
    return rows
