"""Random networks, written as other implementations write theirs (docs/reference.md, Checkpoints).

The names come from a walk over the network, stage by stage and node by node, and the sizes from the tables of
(docs/reference.md, Backbone) and (docs/reference.md, Nodes of BiFPN). Nothing here reads the package's own tables,
which these files are to test.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Member(NamedTuple):
    """A detector of the family, small unless said otherwise."""

    backbone: str = 'lite0'
    channels: int = 16
    cells: int = 2
    head_layers: int = 2
    max_level: int = 7
    weighted: bool = False  # fusion
    classes: int = 5


class Backbone(NamedTuple):
    stem: int
    widths: tuple[int, ...]
    repeats: tuple[int, ...]
    squeeze: bool


class Layer(NamedTuple):
    """One layer: its shape in our tree (kernel; channels; number of edges), and its name in every implementation."""

    kind: str  # conv, dw, pw, bn, edges
    shape: tuple[int, ...]
    bias: bool
    ours: str
    keras: str
    objects: str
    effdet: str
    port: str = ''


B0_WIDTHS = (16, 24, 40, 80, 112, 192, 320)
BACKBONES = {
    'b0': Backbone(32, B0_WIDTHS, (1, 2, 2, 3, 3, 4, 1), True),
    'b1': Backbone(32, B0_WIDTHS, (2, 3, 3, 4, 4, 5, 2), True),
    'lite0': Backbone(32, B0_WIDTHS, (1, 2, 2, 3, 3, 4, 1), False),
    'nano': Backbone(16, (8, 16, 24, 40, 56, 96, 160), (1, 1, 1, 2, 2, 2, 1), True),  # ours: no file of it exists
}
KERNELS = (3, 3, 5, 3, 5, 5, 3)
EDGES = {7: (2, 2, 2, 2, 3, 3, 3, 2), 8: (2, 2, 2, 2, 2, 3, 3, 3, 3, 2)}  # of each node, by last level
# Of the first cell: node -> slot, which backbone feature, node among inputs and nodes.
PROJECTIONS = {
    7: {1: (0, 2, 6), 2: (0, 1, 7), 3: (0, 0, 8), 4: (0, 1, 9), 5: (0, 2, 10)},
    8: {2: (0, 2, 8), 3: (0, 1, 9), 4: (0, 0, 10), 5: (0, 1, 11), 6: (0, 2, 12)},
}


def layers(member: Member) -> list[Layer]:
    return [*backbone(member.backbone), *_extra_level(member), *_cells(member), *_heads(member)]


def draw(layers: list[Layer], seed: int = 0) -> dict[tuple[str, ...], np.ndarray]:
    """Our variables, {path: array}: random, and with variances that are some."""
    rng, drawn = np.random.default_rng(seed), {}
    for layer in layers:
        path = tuple(layer.ours.split('/'))
        if layer.kind == 'bn':
            for collection, leaf in (('params', 'scale'), ('params', 'bias'), ('batch_stats', 'mean')):
                drawn[collection, *path, leaf] = 0.3 * rng.standard_normal(layer.shape)
            drawn['params', *path, 'scale'] += 1
            drawn['batch_stats', *path, 'var'] = np.exp(0.3 * rng.standard_normal(layer.shape))
        elif layer.kind == 'edges':
            drawn['params', *path, 'edge_weights'] = rng.uniform(-0.5, 2, layer.shape)  # the ReLU must matter
        else:
            drawn['params', *path, 'kernel'] = rng.standard_normal(layer.shape) / np.sqrt(np.prod(layer.shape[:-1]))
            if layer.bias:
                drawn['params', *path, 'bias'] = 0.1 * rng.standard_normal(layer.shape[-1])
    return {path: array.astype(np.float32) for path, array in drawn.items()}


def backbone(variant: str) -> Iterator[Layer]:
    stem, widths, repeats, squeeze = BACKBONES[variant]
    official = f'efficientnet-{variant}'
    stem_names = f'{official}/stem/conv2d', 'backbone/_stem/_conv_stem', 'backbone.conv_stem', '_conv_stem'
    yield Layer('conv', (3, 3, 3, stem), False, 'backbone/stem/conv', *stem_names)
    bn_names = f'{official}/stem/tpu_batch_normalization', 'backbone/_stem/_bn', 'backbone.bn1', '_bn0'
    yield Layer('bn', (stem,), False, 'backbone/stem/bn', *bn_names)
    b, width_in = 0, stem
    for s, (width, repeat) in enumerate(zip(widths, repeats, strict=True)):
        for j in range(repeat):
            places = f'blocks_{b}', f'{official}/blocks_{b}', f'_blocks/{b}', f'blocks.{s}.{j}', f'_blocks.{b}'
            yield from _block(places, KERNELS[s], 1 if s == 0 else 6, width_in, width, squeeze)
            b, width_in = b + 1, width


def _block(places, kernel, expansion, width_in, width_out, squeeze) -> Iterator[Layer]:
    ours, keras, objects, effdet, port = places
    wide = width_in * expansion
    # TensorFlow's graph numbers layers of a kind as they are made; timm numbers batch norms, and calls what ends a
    # block with an expansion pwl, and what ends one without it pw.
    keras_convs = iter(('conv2d', 'conv2d_1'))
    keras_norms = iter(f'tpu_batch_normalization{i}' for i in ('', '_1', '_2'))
    timm_norms = iter(('bn1', 'bn2', 'bn3'))

    def layer(kind, shape, ours_name, keras_name, object_name, timm_name, bias=False):
        return Layer(
            kind, shape, bias,
            f'backbone/{ours}/{ours_name}', f'{keras}/{keras_name}', f'backbone/{objects}/{object_name}',
            f'backbone.{effdet}.{timm_name}', f'{port}.{object_name.rpartition("/")[-1]}',
        )  # fmt: skip

    def norm(width, ours_name, object_name):
        return layer('bn', (width,), ours_name, next(keras_norms), object_name, next(timm_norms))

    if expansion > 1:
        yield layer('conv', (1, 1, width_in, wide), 'expand_conv', next(keras_convs), '_expand_conv', 'conv_pw')
        yield norm(wide, 'expand_bn', '_bn0')
    yield layer('dw', (kernel, kernel, 1, wide), 'dw_conv', 'depthwise_conv2d', '_depthwise_conv', 'conv_dw')
    yield norm(wide, 'dw_bn', '_bn1')
    if squeeze:
        narrow = max(1, width_in // 4)
        reduce, expand = (1, 1, wide, narrow), (1, 1, narrow, wide)
        yield layer('conv', reduce, 'se_reduce', 'se/conv2d', '_se/_se_reduce', 'se.conv_reduce', bias=True)
        yield layer('conv', expand, 'se_expand', 'se/conv2d_1', '_se/_se_expand', 'se.conv_expand', bias=True)
    timm_name = 'conv_pwl' if expansion > 1 else 'conv_pw'
    yield layer('conv', (1, 1, wide, width_out), 'project_conv', next(keras_convs), '_project_conv', timm_name)
    yield norm(width_out, 'project_bn', '_bn2')


def _extra_level(member: Member) -> Iterator[Layer]:
    """P6; P7 and P8 are pooled from it and have no weights."""
    shape = 1, 1, BACKBONES[member.backbone].widths[-1], member.channels
    yield from _projection(shape, 'resample_p6', 'resample_p6', 'resample_layers/0', 'fpn.resample.3.conv')


def _projection(shape, ours, keras, objects, effdet) -> Iterator[Layer]:
    yield Layer('conv', shape, True, f'{ours}/conv', f'{keras}/conv2d', f'{objects}/conv2d', f'{effdet}.conv')
    yield Layer('bn', shape[-1:], False, f'{ours}/bn', f'{keras}/bn', f'{objects}/bn', f'{effdet}.bn')


def _cells(member: Member) -> Iterator[Layer]:
    widths, channels = BACKBONES[member.backbone].widths, member.channels
    from_backbone = widths[2], widths[4], widths[6]  # P3, P4, P5
    num_levels = member.max_level - 2
    for r in range(member.cells):
        for k, edges in enumerate(EDGES[member.max_level]):
            ours, keras = f'fpn/cell_{r}/node_{k}', f'fpn_cells/cell_{r}/fnode{k}'
            objects, effdet = f'fpn_cells/cells/{r}/fnodes/{k}', f'fpn.cell.{r}.fnode.{k}'
            if member.weighted:
                yield Layer('edges', (edges,), False, ours, keras, objects, f'{effdet}.combine')
            if r == 0 and k in PROJECTIONS[member.max_level]:
                slot, offset, node = PROJECTIONS[member.max_level][k]
                yield from _projection(
                    (1, 1, from_backbone[offset], channels), f'{ours}/resample_{slot}',
                    f'{keras}/resample_{slot}_{offset}_{node}', f'{objects}/resample_layers/{slot}',
                    f'{effdet}.combine.resample.{offset}.conv',
                )  # fmt: skip
            after, operation = f'{keras}/op_after_combine{num_levels + k}', f'{objects}/op_after_combine'
            names = f'{after}/conv', f'{operation}/conv_op', f'{effdet}.after_combine.conv'
            yield from _separable(channels, channels, (f'{ours}/dw', f'{ours}/pw'), *names)
            names = f'{ours}/bn', f'{after}/bn', f'{operation}/bn', f'{effdet}.after_combine.conv.bn'
            yield Layer('bn', (channels,), False, *names)


def _separable(width_in, width_out, ours, keras, objects, effdet) -> Iterator[Layer]:
    dw, pw = ours
    yield Layer('dw', (3, 3, 1, width_in), False, dw, keras, objects, f'{effdet}.conv_dw')
    yield Layer('pw', (1, 1, width_in, width_out), True, pw, keras, objects, f'{effdet}.conv_pw')


def _heads(member: Member) -> Iterator[Layer]:
    for name, plural, outputs in (('class', 'classes', 9 * member.classes), ('box', 'boxes', 36)):
        net, channels = f'{name}_net', member.channels
        for i in range(member.head_layers):
            ours = f'{net}/conv_{i}/dw', f'{net}/conv_{i}/pw'
            names = f'{net}/{name}-{i}', f'{net}/conv_ops/{i}', f'{net}.conv_rep.{i}'
            yield from _separable(channels, channels, ours, *names)
            for level in range(3, member.max_level + 1):
                names = f'{net}/{name}-{i}-bn-{level}', f'{net}/bns/{i}/{level - 3}', f'{net}.bn_rep.{i}.{level - 3}.bn'
                yield Layer('bn', (channels,), False, f'{net}/bn_{i}_p{level}', *names)
        ours = f'{net}/predict/dw', f'{net}/predict/pw'
        names = f'{net}/{name}-predict', f'{net}/{plural}', f'{net}.predict'
        yield from _separable(channels, outputs, ours, *names)


TF_KERNELS = {'conv': 'kernel', 'dw': 'depthwise_kernel', 'pw': 'pointwise_kernel'}
TF_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}
TORCH_NORM = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


def to_tensorflow(layers: list[Layer], variables, names: str) -> dict[str, np.ndarray]:
    """{name: array} by the official names; `names` is keras or objects."""
    arrays = {}
    for layer, leaf, array in _leaves(layers, variables):
        name = getattr(layer, names)
        if layer.kind == 'edges':
            arrays |= {f'{name}/WSM' + (f'_{i}' if i else ''): scalar for i, scalar in enumerate(array)}
        elif layer.kind == 'bn':
            arrays[f'{name}/{TF_NORM[leaf]}'] = array
        elif leaf == 'kernel':
            # depthwise [k, k, C, 1]
            arrays[f'{name}/{TF_KERNELS[layer.kind]}'] = np.moveaxis(array, 2, 3) if layer.kind == 'dw' else array
        else:
            arrays[f'{name}/bias'] = array
    return arrays


def to_torch(layers: list[Layer], variables, names: str = 'effdet') -> dict[str, np.ndarray]:
    """{name: array} by the PyTorch names, with the counter that each batch norm keeps; `names` is effdet or port."""
    arrays: dict[str, np.ndarray] = {}
    for layer, leaf, array in _leaves(layers, variables):
        name = getattr(layer, names)
        if layer.kind == 'edges':
            arrays[f'{name}.edge_weights'] = array
        elif layer.kind == 'bn':
            arrays[f'{name}.{TORCH_NORM[leaf]}'] = array
            arrays[f'{name}.num_batches_tracked'] = np.asarray(7)
        else:  # kernels are [out, in, k, k]
            renamed = {'kernel': 'weight', 'bias': 'bias'}[leaf]
            arrays[f'{name}.{renamed}'] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    return arrays


def _leaves(layers: list[Layer], variables) -> Iterator[tuple[Layer, str, np.ndarray]]:
    of_layer = {layer.ours: layer for layer in layers}
    for path, array in variables.items():
        yield of_layer['/'.join(path[1:-1])], path[-1], array
