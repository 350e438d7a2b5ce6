"""Names and layouts of other implementations (docs/reference.md, Checkpoints).

Each table maps a layer of ours to a layer of theirs. The tree of our model says which variables must exist, so missing
variables, unexpected ones and mismatched shapes can be reported by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from effdet_jax.errors import UserError

Path = tuple[str, ...]  # starts with the collection: ('params', 'backbone', 'blocks_0', 'dw_conv', 'kernel')


class Scheme(NamedTuple):
    """How one implementation names its layers and lays out their arrays."""

    layers: Mapping[str, str]
    leaves: Callable[[str, Any], list[str]]  # ('bn/scale', shape) -> suffixes of their layer name
    to_ours: Callable[[str, np.ndarray], np.ndarray]  # (kind of layer, array) -> our layout


# {b} block, {s}.{j} stage and block within it, {l} level, {n} level - 3, {p} level - 6, {r} cell, {k} node, {id} node
# counted after the inputs, {i} input slot or repeat, {o} input that a projection reads, {net} class or box, {variant}
# b0 or lite3. `plain` blocks have no expansion; their layers often have other numbers.
KERAS = {
    'backbone/stem/conv': 'efficientnet-{variant}/stem/conv2d',
    'backbone/stem/bn': 'efficientnet-{variant}/stem/tpu_batch_normalization',
    'backbone/blocks_{b}/expand_conv': 'efficientnet-{variant}/blocks_{b}/conv2d',
    'backbone/blocks_{b}/expand_bn': 'efficientnet-{variant}/blocks_{b}/tpu_batch_normalization',
    'backbone/blocks_{b}/dw_conv': 'efficientnet-{variant}/blocks_{b}/depthwise_conv2d',
    'backbone/blocks_{b}/dw_bn': 'efficientnet-{variant}/blocks_{b}/tpu_batch_normalization_1',
    'backbone/blocks_{b}/se_reduce': 'efficientnet-{variant}/blocks_{b}/se/conv2d',
    'backbone/blocks_{b}/se_expand': 'efficientnet-{variant}/blocks_{b}/se/conv2d_1',
    'backbone/blocks_{b}/project_conv': 'efficientnet-{variant}/blocks_{b}/conv2d_1',
    'backbone/blocks_{b}/project_bn': 'efficientnet-{variant}/blocks_{b}/tpu_batch_normalization_2',
    'backbone/plain_{b}/dw_bn': 'efficientnet-{variant}/blocks_{b}/tpu_batch_normalization',
    'backbone/plain_{b}/project_conv': 'efficientnet-{variant}/blocks_{b}/conv2d',
    'backbone/plain_{b}/project_bn': 'efficientnet-{variant}/blocks_{b}/tpu_batch_normalization_1',
    'resample_p{l}/conv': 'resample_p{l}/conv2d',
    'resample_p{l}/bn': 'resample_p{l}/bn',
    'fpn/cell_{r}/node_{k}': 'fpn_cells/cell_{r}/fnode{k}',
    'fpn/cell_{r}/node_{k}/resample_{i}/conv': 'fpn_cells/cell_{r}/fnode{k}/resample_{i}_{o}_{id}/conv2d',
    'fpn/cell_{r}/node_{k}/resample_{i}/bn': 'fpn_cells/cell_{r}/fnode{k}/resample_{i}_{o}_{id}/bn',
    'fpn/cell_{r}/node_{k}/dw': 'fpn_cells/cell_{r}/fnode{k}/op_after_combine{id}/conv',
    'fpn/cell_{r}/node_{k}/pw': 'fpn_cells/cell_{r}/fnode{k}/op_after_combine{id}/conv',
    'fpn/cell_{r}/node_{k}/bn': 'fpn_cells/cell_{r}/fnode{k}/op_after_combine{id}/bn',
    '{net}_net/conv_{i}/dw': '{net}_net/{net}-{i}',
    '{net}_net/conv_{i}/pw': '{net}_net/{net}-{i}',
    '{net}_net/bn_{i}_p{l}': '{net}_net/{net}-{i}-bn-{l}',
    '{net}_net/predict/dw': '{net}_net/{net}-predict',
    '{net}_net/predict/pw': '{net}_net/{net}-predict',
}
OBJECTS = {
    'backbone/stem/conv': 'backbone/_stem/_conv_stem',
    'backbone/stem/bn': 'backbone/_stem/_bn',
    'backbone/blocks_{b}/expand_conv': 'backbone/_blocks/{b}/_expand_conv',
    'backbone/blocks_{b}/expand_bn': 'backbone/_blocks/{b}/_bn0',
    'backbone/blocks_{b}/dw_conv': 'backbone/_blocks/{b}/_depthwise_conv',
    'backbone/blocks_{b}/dw_bn': 'backbone/_blocks/{b}/_bn1',
    'backbone/blocks_{b}/se_reduce': 'backbone/_blocks/{b}/_se/_se_reduce',
    'backbone/blocks_{b}/se_expand': 'backbone/_blocks/{b}/_se/_se_expand',
    'backbone/blocks_{b}/project_conv': 'backbone/_blocks/{b}/_project_conv',
    'backbone/blocks_{b}/project_bn': 'backbone/_blocks/{b}/_bn2',
    'resample_p{l}/conv': 'resample_layers/{p}/conv2d',
    'resample_p{l}/bn': 'resample_layers/{p}/bn',
    'fpn/cell_{r}/node_{k}': 'fpn_cells/cells/{r}/fnodes/{k}',
    'fpn/cell_{r}/node_{k}/resample_{i}/conv': 'fpn_cells/cells/{r}/fnodes/{k}/resample_layers/{i}/conv2d',
    'fpn/cell_{r}/node_{k}/resample_{i}/bn': 'fpn_cells/cells/{r}/fnodes/{k}/resample_layers/{i}/bn',
    'fpn/cell_{r}/node_{k}/dw': 'fpn_cells/cells/{r}/fnodes/{k}/op_after_combine/conv_op',
    'fpn/cell_{r}/node_{k}/pw': 'fpn_cells/cells/{r}/fnodes/{k}/op_after_combine/conv_op',
    'fpn/cell_{r}/node_{k}/bn': 'fpn_cells/cells/{r}/fnodes/{k}/op_after_combine/bn',
    '{net}_net/conv_{i}/dw': '{net}_net/conv_ops/{i}',
    '{net}_net/conv_{i}/pw': '{net}_net/conv_ops/{i}',
    '{net}_net/bn_{i}_p{l}': '{net}_net/bns/{i}/{n}',
    '{net}_net/predict/dw': '{net}_net/{net}es',
    '{net}_net/predict/pw': '{net}_net/{net}es',
}
EFFDET = {
    'backbone/stem/conv': 'backbone.conv_stem',
    'backbone/stem/bn': 'backbone.bn1',
    'backbone/blocks_{b}/expand_conv': 'backbone.blocks.{s}.{j}.conv_pw',
    'backbone/blocks_{b}/expand_bn': 'backbone.blocks.{s}.{j}.bn1',
    'backbone/blocks_{b}/dw_conv': 'backbone.blocks.{s}.{j}.conv_dw',
    'backbone/blocks_{b}/dw_bn': 'backbone.blocks.{s}.{j}.bn2',
    'backbone/blocks_{b}/se_reduce': 'backbone.blocks.{s}.{j}.se.conv_reduce',
    'backbone/blocks_{b}/se_expand': 'backbone.blocks.{s}.{j}.se.conv_expand',
    'backbone/blocks_{b}/project_conv': 'backbone.blocks.{s}.{j}.conv_pwl',
    'backbone/blocks_{b}/project_bn': 'backbone.blocks.{s}.{j}.bn3',
    'backbone/plain_{b}/dw_bn': 'backbone.blocks.{s}.{j}.bn1',
    'backbone/plain_{b}/project_conv': 'backbone.blocks.{s}.{j}.conv_pw',
    'backbone/plain_{b}/project_bn': 'backbone.blocks.{s}.{j}.bn2',
    'resample_p{l}/conv': 'fpn.resample.{n}.conv.conv',
    'resample_p{l}/bn': 'fpn.resample.{n}.conv.bn',
    'fpn/cell_{r}/node_{k}': 'fpn.cell.{r}.fnode.{k}.combine',
    'fpn/cell_{r}/node_{k}/resample_{i}/conv': 'fpn.cell.{r}.fnode.{k}.combine.resample.{o}.conv.conv',
    'fpn/cell_{r}/node_{k}/resample_{i}/bn': 'fpn.cell.{r}.fnode.{k}.combine.resample.{o}.conv.bn',
    'fpn/cell_{r}/node_{k}/dw': 'fpn.cell.{r}.fnode.{k}.after_combine.conv.conv_dw',
    'fpn/cell_{r}/node_{k}/pw': 'fpn.cell.{r}.fnode.{k}.after_combine.conv.conv_pw',
    'fpn/cell_{r}/node_{k}/bn': 'fpn.cell.{r}.fnode.{k}.after_combine.conv.bn',
    '{net}_net/conv_{i}/dw': '{net}_net.conv_rep.{i}.conv_dw',
    '{net}_net/conv_{i}/pw': '{net}_net.conv_rep.{i}.conv_pw',
    '{net}_net/bn_{i}_p{l}': '{net}_net.bn_rep.{i}.{n}.bn',
    '{net}_net/predict/dw': '{net}_net.predict.conv_dw',
    '{net}_net/predict/pw': '{net}_net.predict.conv_pw',
}
PORT = {
    'backbone/stem/conv': '_conv_stem',
    'backbone/stem/bn': '_bn0',
    'backbone/blocks_{b}/expand_conv': '_blocks.{b}._expand_conv',
    'backbone/blocks_{b}/expand_bn': '_blocks.{b}._bn0',
    'backbone/blocks_{b}/dw_conv': '_blocks.{b}._depthwise_conv',
    'backbone/blocks_{b}/dw_bn': '_blocks.{b}._bn1',
    'backbone/blocks_{b}/se_reduce': '_blocks.{b}._se_reduce',
    'backbone/blocks_{b}/se_expand': '_blocks.{b}._se_expand',
    'backbone/blocks_{b}/project_conv': '_blocks.{b}._project_conv',
    'backbone/blocks_{b}/project_bn': '_blocks.{b}._bn2',
}

TENSORFLOW_LEAVES = {
    'bn/scale': 'gamma', 'bn/bias': 'beta', 'bn/mean': 'moving_mean', 'bn/var': 'moving_variance',
    'conv/kernel': 'kernel', 'conv/bias': 'bias',
    'dw/kernel': 'depthwise_kernel', 'pw/kernel': 'pointwise_kernel', 'pw/bias': 'bias',
}  # fmt: skip
TORCH_BATCH_NORM = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


def _tensorflow_leaves(leaf: str, shape: tuple[int, ...]) -> list[str]:
    if leaf.endswith('edge_weights'):  # one scalar per edge
        return ['/WSM' + (f'_{i}' if i else '') for i in range(shape[0])]
    return ['/' + TENSORFLOW_LEAVES[leaf]]


def _torch_leaves(leaf: str, _: Any) -> list[str]:
    kind, name = leaf.split('/')
    return ['.' + (TORCH_BATCH_NORM[name] if kind == 'bn' else {'kernel': 'weight'}.get(name, name))]


def _from_tensorflow(kind: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 1, 3, 2) if kind == 'dw' and array.ndim == 4 else array  # [k, k, C, 1] there


def _from_torch(_: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array  # [out, in, k, k] there


SCHEMES = {
    'keras': Scheme(KERAS, _tensorflow_leaves, _from_tensorflow),
    'objects': Scheme(OBJECTS, _tensorflow_leaves, _from_tensorflow),
    'effdet': Scheme(EFFDET, _torch_leaves, _from_torch),
    'port': Scheme(PORT, _torch_leaves, _from_torch),
}


class MatchedWeights(NamedTuple):
    """Their arrays in our layout at our paths, and what did not match."""

    arrays: dict[Path, np.ndarray]
    names: dict[Path, list[str]]  # their names of each of our variables
    missing: dict[Path, str]  # their name
    mismatched: dict[Path, str]  # their name, and both shapes or 'NaN or infinity'
    unexpected: list[str]  # their names that the model does not have


def match_weights(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[Path, Any], variant: str, scheme: Scheme
) -> MatchedWeights:
    """Finds each of our variables among `arrays`.

    Args:
      arrays: {their name: array in their layout}.
      shapes: {our path: anything with `.shape`} for all variables to find.
      variant: the backbone, as in `config.model.backbone`: 'b0', 'lite3'.
    """
    matched = MatchedWeights({}, dict(their_names(shapes, variant, scheme)), {}, {}, [])
    for path, names in matched.names.items():
        if absent := [name for name in names if name not in arrays]:
            matched.missing[path] = absent[0]
            continue
        theirs = [scheme.to_ours(_kind(path), np.asarray(arrays[name])) for name in names]
        value = theirs[0] if theirs[0].ndim else np.concatenate([scalar.ravel() for scalar in theirs])
        if value.shape != shapes[path].shape:
            matched.mismatched[path] = f'{names[0]} has shape {value.shape}, expected {shapes[path].shape}'
        elif not np.isfinite(value).all():
            matched.mismatched[path] = f'{names[0]} contains NaN or infinity'
        else:
            matched.arrays[path] = value.astype(np.float32)
    matched.unexpected.extend(sorted(arrays.keys() - {name for names in matched.names.values() for name in names}))
    return matched


def from_official(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Variables of our model from the official ones.

    Args:
      arrays: {official name: array}, all variables in TensorFlow's layout, with the names of the Keras model, no ':0'.
      shapes: our variables from `jax.eval_shape(model.init, ...)`, or any tree with `.shape` at its leaves.
      backbone: as in `config.model.backbone`, e.g. 'b0' or 'lite3'.

    Raises:
      UserError: if variables are missing, unexpected or of another shape; it names them.
    """
    matched = match_weights(arrays, traverse_util.flatten_dict(dict(shapes)), backbone, SCHEMES['keras'])
    missing, mismatched, unexpected = [*matched.missing.values()], [*matched.mismatched.values()], matched.unexpected
    if missing or mismatched or unexpected:
        raise UserError(
            f'the weights do not fit this model: {len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected '
            f'{unexpected[:3]}, {len(mismatched)} mismatched {mismatched[:3]}'
        )
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(matched.arrays))


def their_names(shapes: Mapping[Path, Any], variant: str, scheme: Scheme) -> Iterator[tuple[Path, list[str]]]:
    """(our path, their names) of every variable: one name each, but one per edge for TensorFlow's edge weights."""
    derive = _derived_fields(shapes)
    patterns = [(re.compile(_to_regex(ours)), theirs) for ours, theirs in scheme.layers.items()]
    for path, leaf in shapes.items():
        layer, fields = derive(path)
        spellings = (layer, layer.replace('/plain_', '/blocks_'))  # not every table names plain blocks differently
        template, values = next(
            (theirs, found.groupdict())
            for spelling in spellings
            for pattern, theirs in patterns
            if (found := pattern.fullmatch(spelling))
        )
        name = template.format(variant=variant, **(fields | values))
        yield path, [name + suffix for suffix in scheme.leaves(f'{_kind(path)}/{path[-1]}', leaf.shape)]


def _to_regex(pattern: str) -> str:
    """'blocks_{b}/dw_bn' -> a regex with a group for each field."""
    return pattern.replace('{net}', '(?P<net>class|box)').replace('{', '(?P<').replace('}', r'>\d+)')


def _kind(path: Path) -> str:
    """The kind of layer: bn, dw, pw, conv or, for edge weights, node."""
    layer = path[-2]
    if re.fullmatch(r'bn|.*_bn|bn_\d+_p\d+', layer):
        return 'bn'
    if layer.startswith('node_'):
        return 'node'
    return {'dw': 'dw', 'dw_conv': 'dw', 'pw': 'pw'}.get(layer, 'conv')


def _derived_fields(shapes: Mapping[Path, Any]) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """A function: path -> (layer, with `plain_` for blocks without expansion; fields that its name does not give)."""
    expanded = {path[2] for path in shapes if path[3:4] == ('expand_conv',)}
    head_levels = [int(found[1]) for p in shapes if (found := re.fullmatch(r'bn_0_p(\d+)', p[2]))]
    num_levels = max(head_levels, default=7) - 2
    stage_of = _stages(shapes)

    def derive(path: Path) -> tuple[str, dict[str, Any]]:
        layer = '/'.join(path[1:-1])
        fields: dict[str, Any] = {}
        if path[1] == 'backbone' and path[2].startswith('blocks_'):
            fields['s'], fields['j'] = stage_of[int(path[2].removeprefix('blocks_'))]
            if path[2] not in expanded:
                layer = layer.replace('/blocks_', '/plain_')
        if path[1] == 'fpn':
            k = int(path[3].removeprefix('node_'))
            fields['id'] = num_levels + k
            # Only the backbone's map of the node's own level is projected. Its id is its level: nodes 0..L-2 go down
            # from the second highest level, the others go up from the second lowest.
            fields['o'] = num_levels - 2 - k if k <= num_levels - 2 else k - num_levels + 2
        if level := re.search(r'_p(\d+)', layer):
            fields['n'], fields['p'] = int(level[1]) - 3, int(level[1]) - 6
        return layer, fields

    return derive


def _stages(shapes: Mapping[Path, Any]) -> dict[int, tuple[int, int]]:
    """{block: (stage, place in the stage)}, from 0. A stage is a run of blocks with the same width."""
    width_of = {
        int(path[2].removeprefix('blocks_')): leaf.shape[-1]
        for path, leaf in shapes.items()
        if path[1] == 'backbone' and path[3:] == ('project_conv', 'kernel')
    }
    stage_of: dict[int, tuple[int, int]] = {}
    for block in sorted(width_of):
        stage, place = stage_of.get(block - 1, (-1, 0))
        same = width_of.get(block - 1) == width_of[block]
        stage_of[block] = (stage, place + 1) if same else (stage + 1, 0)
    return stage_of


def shapes_of(model: Any, image_size: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """The shapes of a model's variables; computes none of them."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)
