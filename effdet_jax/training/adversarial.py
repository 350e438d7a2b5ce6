"""Det-AdvProp: attacked images beside the true ones, with batch norms of their own.

Chen, Xie, Tan, Zhang, Hsieh, Gong 2021, "Robust and Accurate Object Detection via Adversarial Learning"; the second set
of batch norms, here `auxiliary`, is that of Xie et al. 2020, "Adversarial Examples Improve Image Recognition".

Each auxiliary norm lies below its main one: `backbone/stem/bn/scale` and `backbone/stem/bn/auxiliary/scale`. So a regex
that freezes the one freezes the other, and to the optimiser, the moving average and the checkpoints it is a parameter
like any other. `records/deployed.py` leaves it out of all that the training hands on.
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
    """The variables with a copy of every batch norm below it."""
    flat: dict[tuple, Any] = traverse_util.flatten_dict(variables)
    norms = {path[1:-1] for path in flat if path[0] == 'batch_stats'}
    copies = {_below(path): jnp.copy(leaf) for path, leaf in flat.items() if path[1:-1] in norms}
    return traverse_util.unflatten_dict(flat | copies)


def main(tree: dict[str, Any]) -> dict[str, Any]:
    """What the network reads for true images, of parameters or of batch statistics."""
    return without_auxiliary(tree)


def auxiliary(tree: dict[str, Any]) -> dict[str, Any]:
    """What the network reads for attacked images: the auxiliary norms in the place of the main ones."""
    flat: dict[tuple, Any] = traverse_util.flatten_dict(tree)
    in_place = {(*path[:-2], path[-1]): leaf for path, leaf in flat.items() if path[-2:-1] == (AUXILIARY,)}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(main(tree)) | in_place)


def joined(main: dict[str, Any], auxiliary: dict[str, Any]) -> dict[str, Any]:
    """The batch statistics of which these two are `main` and `auxiliary`."""
    below = {_below(path): leaf for path, leaf in traverse_util.flatten_dict(auxiliary).items()}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(main) | below)


def attack(
    losses: Callable[[Images], Losses],
    normalize: Callable[[Array], Images],
    pixels: UInt8[Array, 'B H W 3'],
    epsilon: float,
) -> tuple[Images, Bool[Array, 'B']]:
    """(attacked images, whether the attack on the class loss was chosen), image by image.

    x_adv = P(x + epsilon * sign(gradient)), once with the gradient of the class loss and once with that of the box
    loss; of both the one at which their sum is larger. P cuts to 0..255, and `normalize` covers the padding. Gradients
    are those of the losses of the whole batch: images meet in the batch norms.

    Takes three forward passes, the first shared by both gradients, and two backward passes to the pixels, which compute
    no gradient of a parameter. A step with it takes five forward passes and two such and two whole backward passes,
    where a plain one takes one and one: nearly four times the arithmetic.
    """

    def sums(images: Images) -> tuple[Array, Array]:
        class_B, box_B = losses(images)
        return class_B.sum(), box_B.sum()

    def moved(weights_2: Array) -> tuple[Images, Array]:
        """(attacked images, their losses) by the gradient of the losses with these weights."""
        (gradient,) = pull((weights_2[0], weights_2[1]))
        # Of the normalised image, which has the same sign: a standard deviation is positive.
        images = normalize(jnp.clip(pixels.astype(jnp.float32) + epsilon * jnp.sign(gradient), 0, 255))
        return images, jnp.add(*losses(images))

    _, pull = jax.vjp(sums, normalize(pixels))
    # One after the other: as a loop they are one program to compile, not two.
    (by_class, by_box), (class_loss_B, box_loss_B) = jax.lax.map(moved, jnp.eye(2))
    class_won_B = class_loss_B >= box_loss_B
    return jnp.where(class_won_B[:, None, None, None], by_class, by_box), class_won_B


def _below(path: tuple[str, ...]) -> tuple[str, ...]:
    return *path[:-1], AUXILIARY, path[-1]
