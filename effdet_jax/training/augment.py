"""Augmentation on the device: functions of one image, its boxes and a key. `vmap` them over a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def random_flip(
    key: Array, image: UInt8[Array, 'H W 3'], boxes: Float[Array, 'M 4'], valid_size: Int[Array, '2']
) -> tuple[UInt8[Array, 'H W 3'], Float[Array, 'M 4']]:
    """Mirrors the picture left to right with probability one half; the padding at its right stays where it is."""
    width = valid_size[1]
    x = jnp.arange(image.shape[1])
    mirrored = image[:, jnp.where(x < width, width - 1 - x, x)]
    y1, x1, y2, x2 = jnp.moveaxis(boxes, -1, 0)
    # The reference flips first and then cuts boxes at the last pixel (spec 9).
    x1, x2 = (jnp.minimum(width - x, image.shape[1] - 1) for x in (x2, x1))
    mirrored_boxes = jnp.stack([y1, x1, y2, x2], axis=-1)
    flip = jax.random.bernoulli(key)
    return jnp.where(flip, mirrored, image), jnp.where(flip, mirrored_boxes, boxes)
