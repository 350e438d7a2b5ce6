"""Color changes; no pixel moves. Statistics leave out the padding."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from effdet_jax.training.augmentations.sample import Sample, inside

GREY = (0.299, 0.587, 0.114)  # luma of RGB, ITU-R BT.601
YIQ = np.array([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # NTSC 1953: luma, two of chroma


def color_jitter(
    key: Array, sample: Sample, brightness: float, contrast: float, saturation: float, hue: float
) -> Sample:
    """Random brightness, contrast, saturation and hue, in this order, as one linear map that is rounded once.

    brightness: x f. contrast: m + (x - m) f, where m is the mean grey. saturation: g + (x - g) f, where g is the
    pixel's grey. Each f is uniform in 1 ± its strength. hue: rotates the chroma in the YIQ plane by up to `hue` turns
    either way; luma stays.
    """
    draws_4 = jax.random.uniform(key, (4,), minval=-1, maxval=1)
    f_brightness, f_contrast, f_saturation = 1 + draws_4[:3] * jnp.array([brightness, contrast, saturation])
    # Products are summed by hand: the matrix units of accelerators are not precise enough for colors.
    mean_grey = (mean_color(sample) * jnp.asarray(GREY)).sum() * f_brightness
    after_contrast = _times(f_brightness * f_contrast * jnp.eye(3), jnp.eye(3))
    after_saturation = _times(blend_with_grey(f_saturation), after_contrast)
    matrix_33 = _times(turn_hue(draws_4[3] * hue), after_saturation)
    constant = (1 - f_contrast) * mean_grey  # a grey, so saturation and hue do not change it
    return sample._replace(image=recolor(sample.image, matrix_33, constant))


def recolor(
    image: UInt8[Array, 'H W 3'], matrix: Float[Array, '3 3'], constant: Float[Array, ''] | float = 0.0
) -> UInt8[Array, 'H W 3']:
    """matrix @ RGB + constant for every pixel."""
    # Written out, because a sum over an axis of three takes 70 times as long on CPU.
    red, green, blue = (image[..., c : c + 1].astype(jnp.float32) * matrix[:, c] for c in range(3))
    return to_uint8(red + green + blue + constant)


def turn_hue(turns: Float[Array, '']) -> Float[Array, '3 3']:
    """A map RGB -> RGB that rotates the chroma (YIQ) by so many turns; greys stay."""
    sine, cosine = jnp.sin(2 * jnp.pi * turns), jnp.cos(2 * jnp.pi * turns)
    one, zero = jnp.ones(()), jnp.zeros(())
    rotation = jnp.stack(
        [jnp.stack([one, zero, zero]), jnp.stack([zero, cosine, -sine]), jnp.stack([zero, sine, cosine])]
    )
    return _times(jnp.asarray(np.linalg.inv(YIQ)), _times(rotation, jnp.asarray(YIQ)))


def blend_with_grey(factor: Float[Array, '']) -> Float[Array, '3 3']:
    """A map RGB -> g + factor (RGB - g), where g is the pixel's grey: 0 gives grey, 1 changes nothing."""
    return factor * jnp.eye(3) + (1 - factor) * jnp.tile(jnp.asarray(GREY), (3, 1))


def sharpen(image: UInt8[Array, 'H W 3'], interior: Bool[Array, 'H W 1'], factor: Array) -> UInt8[Array, 'H W 3']:
    """s + factor (x - s), where s is x smoothed by [1 1 1; 1 5 1; 1 1 1] / 13 as in PIL; only in the `interior`."""
    x = image.astype(jnp.float32)
    height, width, _ = image.shape
    around = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    smooth = (4 * x + sum(around[i : i + height, j : j + width] for i in range(3) for j in range(3))) / 13
    return jnp.where(interior, to_uint8(smooth + factor * (x - smooth)), image)


def histogram(sample: Sample) -> Int[Array, '3 256']:
    """The number of pixels of each level in each channel, without the padding."""
    counted = jnp.broadcast_to(inside(sample), sample.image.shape).astype(jnp.int32)
    bins = sample.image.astype(jnp.int32) + 256 * jnp.arange(3)
    return jnp.zeros(3 * 256, jnp.int32).at[bins].add(counted, mode='promise_in_bounds').reshape(3, 256)


def look_up(image: UInt8[Array, 'H W 3'], table: UInt8[Array, '3 256']) -> UInt8[Array, 'H W 3']:
    channels = [table[c].at[image[..., c]].get(mode='promise_in_bounds') for c in range(3)]
    return jnp.stack(channels, axis=-1)


def mean_color(sample: Sample) -> Float[Array, '3']:
    total = jnp.where(inside(sample), sample.image, 0).sum(axis=(0, 1), dtype=jnp.float32)
    return total / jnp.maximum(sample.valid_size.prod(), 1)


def to_uint8(x: Float[Array, '*S']) -> UInt8[Array, '*S']:
    """Clipped to 0..255 and rounded."""
    return jnp.round(jnp.clip(x, 0, 255)).astype(jnp.uint8)


def _times(a: Array, b: Array) -> Array:
    return (a[:, :, None] * b[None]).sum(axis=1)
