"""Det-AdvProp: training on attacked images beside the clean ones, with separate batch norms.

Chen, Xie, Tan, Zhang, Hsieh, Gong 2021, "Robust and Accurate Object Detection via Adversarial Learning"; the second set
of batch norms, here `auxiliary`, is that of Xie et al. 2020, "Adversarial Examples Improve Image Recognition".

Each auxiliary norm lies below its main one: `backbone/stem/bn/scale` and `backbone/stem/bn/auxiliary/scale`. A regex
that freezes one also freezes the other, and the optimizer, the moving average and the checkpoints treat it like any
other parameter. `records/deployed.py` removes it from the weights that leave the training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, UInt8

from effdet_jax.records.deployed import AUXILIARY, without_auxiliary

Variables = dict[str, Any]  # {'params': ..., 'batch_stats': ...}
Images = Float[Array, 'B H W 3']  # as the network takes them
Losses = tuple[Float[Array, 'B'], Float[Array, 'B']]  # of each image: class, box (weighted)


def with_auxiliary(variables: Variables) -> Variables:
    """Adds a copy of every batch norm below it."""
    flat: dict[tuple, Any] = traverse_util.flatten_dict(variables)
    norms = {path[1:-1] for path in flat if path[0] == 'batch_stats'}
    copies = {_below(path): jnp.copy(leaf) for path, leaf in flat.items() if path[1:-1] in norms}
    return traverse_util.unflatten_dict(flat | copies)


def main(tree: dict[str, Any]) -> dict[str, Any]:
    """Parameters or batch statistics as the network reads them for clean images."""
    return without_auxiliary(tree)


def auxiliary(tree: dict[str, Any]) -> dict[str, Any]:
    """Parameters or batch statistics for attacked images: auxiliary norms in place of the main ones."""
    flat: dict[tuple, Any] = traverse_util.flatten_dict(tree)
    in_place = {(*path[:-2], path[-1]): leaf for path, leaf in flat.items() if path[-2:-1] == (AUXILIARY,)}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(main(tree)) | in_place)


def joined(main: dict[str, Any], auxiliary: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `main` and `auxiliary`: one tree of batch statistics from two."""
    below = {_below(path): leaf for path, leaf in traverse_util.flatten_dict(auxiliary).items()}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(main) | below)


def attack(
    losses: Callable[[Images], Losses],
    normalize: Callable[[Array], Images],
    pixels: UInt8[Array, 'B H W 3'],
    epsilon: float,
) -> tuple[Images, Bool[Array, 'B']]:
    """Returns (attacked images, whether each image was attacked through the class loss).

    x_adv = clip(x + epsilon * sign(gradient), 0, 255), once with the gradient of the class loss and once with that of
    the box loss. Each image keeps the attack with the larger total loss. `normalize` masks the padding. The gradients
    are of the whole batch's losses, because batch norms couple the images.

    This takes three forward passes, the first shared by both gradients, and two backward passes to the pixels alone.
    A whole step then takes five forward passes, two backward passes to the pixels and two full ones: nearly four times
    the arithmetic of a plain step.
    """

    def sums(images: Images) -> tuple[Array, Array]:
        class_B, box_B = losses(images)
        return class_B.sum(), box_B.sum()

    def moved(weights_2: Array) -> tuple[Images, Array]:
        """(attacked images, their losses), by the gradient of the class and the box loss with these weights."""
        (gradient,) = pull((weights_2[0], weights_2[1]))
        # The gradient for the normalized image has the same sign: standard deviations are positive.
        images = normalize(jnp.clip(pixels.astype(jnp.float32) + epsilon * jnp.sign(gradient), 0, 255))
        return images, jnp.add(*losses(images))

    _, pull = jax.vjp(sums, normalize(pixels))
    # A loop, so that one program is compiled instead of two.
    (by_class, by_box), (class_loss_B, box_loss_B) = jax.lax.map(moved, jnp.eye(2))
    class_won_B = class_loss_B >= box_loss_B
    return jnp.where(class_won_B[:, None, None, None], by_class, by_box), class_won_B


def _below(path: tuple[str, ...]) -> tuple[str, ...]:
    return *path[:-1], AUXILIARY, path[-1]
