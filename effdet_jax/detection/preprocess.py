"""The device's half of preprocessing, the same in training, evaluation and prediction: uint8 pixels -> network input.

The host's half (decode, resize, pad) is data/transforms.py.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def normalize(
    images: UInt8[Array, 'B H W 3'],
    valid_size: Int[Array, 'B 2'],
    mean: Sequence[float],
    std: Sequence[float],
    padding: float = 0.0,
) -> Float[Array, 'B H W 3']:
    """(image - mean) / std per channel, RGB in 0..255; exactly `padding` outside `valid_size`.

    `valid_size` is the height and width of the picture inside the padded input. A padding of 0 is the mean colour.
    """
    normalized = (images.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(std)
    _, height, width, _ = images.shape
    inside_BH = jnp.arange(height) < valid_size[:, :1]
    inside_BW = jnp.arange(width) < valid_size[:, 1:]
    inside_BHW1 = (inside_BH[:, :, None] & inside_BW[:, None, :])[..., None]
    return jnp.where(inside_BHW1, normalized, padding)
