"""What a network costs, from shapes alone: parameters and multiply-accumulates of its parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

Path = tuple[str, ...]


class Cost(NamedTuple):
    """`parameters` are the trained ones; `macs` the multiply-accumulates of the convolutions for one image."""

    parameters: int
    macs: int


def cost_of_parts(model: nn.Module, image_size: tuple[int, int]) -> dict[str, Cost]:
    """{part: cost} for images of (height, width); one part for each module at the top: backbone, fpn, class_net, ...

    A kernel [h, w, in / groups, out] is applied once at every position of its layer's output: that many times its
    size are the multiply-accumulates. Published "FLOPs" of detectors are these, not twice these
    (docs/reference.md, Models).
    """
    return sum_costs(trace(model, image_size))


def trace(model: nn.Module, image_size: tuple[int, int]) -> Mapping[str, Any]:
    """Shapes of everything that a forward pass over one image touches: params, batch_stats, intermediates."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)

    def init(images: jax.Array) -> Any:
        return model.init(jax.random.key(0), images, mutable=True, capture_intermediates=True)

    return jax.eval_shape(init, images)


def sum_costs(traced: Mapping[str, Any]) -> dict[str, Cost]:
    """As `cost_of_parts`, for what `trace` returned."""
    calls: dict[Path, Any] = dict(traverse_util.flatten_dict(traced['intermediates']))
    parameters: dict[Path, Any] = dict(traverse_util.flatten_dict(traced['params']))
    costs: dict[str, Cost] = {}
    for path, parameter in parameters.items():
        positions = 0
        if path[-1] == 'kernel':
            maps = calls[*path[:-1], '__call__']  # one for each call: heads are shared by the levels
            positions = sum(x.size // x.shape[-1] for x in maps)
        before = costs.get(path[0], Cost(0, 0))
        costs[path[0]] = Cost(before.parameters + parameter.size, before.macs + positions * parameter.size)
    return costs
