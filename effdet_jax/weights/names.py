"""Official variable names <-> our tree (spec 11.3). Names have no ':0'; arrays have TensorFlow's layout.

The rules are read as: this path of ours is that name of theirs. So the tree of the model says what must exist, and what
is missing or left over can be named.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from effdet_jax.errors import UserError

Path = tuple[str, ...]  # collection first: ('params', 'backbone', 'blocks_0', 'dw_conv', 'kernel')

BATCH_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}


def from_official(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Variables of our model from a dictionary {official name: array}.

    Args:
      arrays: every variable of the official model, TensorFlow layout.
      shapes: our variables as `jax.eval_shape(model.init, ...)` gives them (anything with `.shape` at the leaves).
      backbone: as in `config.model.backbone`, e.g. 'b0' or 'lite3'.

    Raises:
      UserError: naming what is missing, left over, or of another shape.
    """
    wanted: dict[Path, Any] = traverse_util.flatten_dict(dict(shapes))
    official = dict(official_names(wanted, backbone))
    used = {name for names in official.values() for name in names}
    missing, spare = sorted(used - set(arrays)), sorted(set(arrays) - used)
    if missing or spare:
        raise UserError(
            'the weights do not fit this model: '
            f'{len(missing)} missing {missing[:3]}, {len(spare)} left over {spare[:3]}'
        )
    flat = {}
    for path, names in official.items():
        value = to_our_layout(path, [np.asarray(arrays[name]) for name in names])
        if value.shape != wanted[path].shape:
            raise UserError(f'{names[0]} has shape {value.shape}, but the model needs {wanted[path].shape}')
        flat[path] = jnp.asarray(value, jnp.float32)
    return traverse_util.unflatten_dict(flat)


def to_our_layout(path: Path, arrays: list[np.ndarray]) -> np.ndarray:
    if path[-1] == 'edge_weights':
        return np.stack([array.reshape(()) for array in arrays])
    (array,) = arrays
    # TensorFlow keeps a depthwise kernel as (k, k, C, 1).
    return array.transpose(0, 1, 3, 2) if path[-2] in ('dw', 'dw_conv') else array


def official_names(variables: Mapping[Path, Any], backbone: str) -> Iterator[tuple[Path, list[str]]]:
    """For each of our paths its official name; edge weights have one name per edge, every other path has one."""
    scope = f'efficientnet-{backbone}'
    expanded = {path[2] for path in variables if path[3:4] == ('expand_conv',)}
    levels = 1 + max(int(m[1]) for p in variables if (m := re.fullmatch(r'bn_0_p(\d+)', p[2]))) - 3
    for path, leaf in variables.items():
        part = path[1]
        if part == 'backbone':
            yield path, [f'{scope}/{_backbone(path[2:], path[2] in expanded)}']
        elif part == 'fpn':
            yield path, _feature_network(path[2:], levels, leaf)
        elif part.startswith('resample_p'):
            yield path, [f'{part}/{_layer(path[2:])}']
        else:
            yield path, [f'{part}/{_head(part, path[2:])}']


def _layer(path: Path) -> str:
    """('conv', 'kernel') -> 'conv2d/kernel'; ('bn', 'mean') -> 'bn/moving_mean'."""
    kind, leaf = path
    return f'conv2d/{leaf}' if kind == 'conv' else f'bn/{BATCH_NORM[leaf]}'


def _backbone(path: Path, expanded: bool) -> str:
    """Theirs numbers layers in the order of their creation, so a block without expansion counts from its own."""
    block, layer, leaf = path
    shift = 0 if expanded or block == 'stem' else 1
    convs = {'conv': 0, 'expand_conv': 0, 'project_conv': 1 - shift}
    norms = {'bn': 0, 'expand_bn': 0, 'dw_bn': 1 - shift, 'project_bn': 2 - shift}
    squeezes = {'se_reduce': 0, 'se_expand': 1}

    def numbered(name: str, n: int) -> str:
        return f'{name}_{n}' if n else name

    if layer == 'dw_conv':
        return f'{block}/depthwise_conv2d/depthwise_kernel'
    if layer in squeezes:
        return f'{block}/se/{numbered("conv2d", squeezes[layer])}/{leaf}'
    if layer in convs:
        return f'{block}/{numbered("conv2d", convs[layer])}/{leaf}'
    return f'{block}/{numbered("tpu_batch_normalization", norms[layer])}/{BATCH_NORM[leaf]}'


def _separable(path: Path) -> str:
    kind, leaf = path
    return leaf if leaf == 'bias' else {'dw': 'depthwise_kernel', 'pw': 'pointwise_kernel'}[kind]


def _feature_network(path: Path, levels: int, leaf: Any) -> list[str]:
    cell, node, *rest = path
    k = int(node.removeprefix('node_'))
    scope = f'fpn_cells/{cell}/fnode{k}'
    if rest == ['edge_weights']:
        return [f'{scope}/WSM' + (f'_{i}' if i else '') for i in range(leaf.shape[0])]
    if rest[0].startswith('resample_'):
        # Theirs also says which input it reads: always the node's own level, since only inputs straight from the
        # backbone are projected. Nodes 0..L-2 go down from the last level but one, the others up from the second.
        own_level = levels - 2 - k if k <= levels - 2 else k - levels + 2
        return [f'{scope}/{rest[0]}_{own_level}_{levels + k}/{_layer(tuple(rest[1:]))}']
    operation = f'{scope}/op_after_combine{levels + k}'
    layer = f'bn/{BATCH_NORM[rest[1]]}' if rest[0] == 'bn' else f'conv/{_separable(tuple(rest))}'
    return [f'{operation}/{layer}']


def _head(part: str, path: Path) -> str:
    prefix = part.removesuffix('_net')  # class, box
    layer, *rest = path
    if match := re.fullmatch(r'bn_(\d+)_p(\d+)', layer):
        return f'{prefix}-{match[1]}-bn-{match[2]}/{BATCH_NORM[rest[0]]}'
    return f'{prefix}-{layer.removeprefix("conv_")}/{_separable((rest[0], rest[1]))}'


def shapes_of(model: Any, image_size: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """Shapes of a model's variables, without computing any."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)
