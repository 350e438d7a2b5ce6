"""RandAugment (Cubuk et al. 2020): `layers` operations drawn uniformly from a table, all with the same magnitude.

An operation is described by a few numbers (`Change`): a table of levels, two factors and a linear map. So drawing one
per image is cheap, and pixels move once for any number of layers: the linear maps are multiplied. Operations and ranges
are the paper's; boxes move as in Zoph et al. 2019.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.training.augmentations import color
from effdet_jax.training.augmentations.geometry import Fill, warp
from effdet_jax.training.augmentations.sample import Sample

MAX_MAGNITUDE = 10
LEVELS = tuple(range(256))
# At magnitude 10. Translation: the paper's 150 pixels in an image of about 640.
MAX_DEGREES, MAX_SHEAR, MAX_TRANSLATION, MAX_ENHANCEMENT = 30.0, 0.3, 0.25, 0.9


class Change(NamedTuple):
    """levels: [3, 256], the new level of each old one. saturation, sharpness: factors as in color.py, 1 for none.

    linear [2, 2], shift [2]: a map of (y, x) around the image's centre, as in `geometry.warp`.
    """

    levels: Array
    saturation: Array
    sharpness: Array
    linear: Array
    shift: Array


class Setting(NamedTuple):
    """strength: magnitude / 10. sign: -1 or 1, drawn. histogram: [3, 256]. valid_size: [2], float."""

    strength: Array
    sign: Array
    histogram: Array
    valid_size: Array


def rand_augment(key: Array, sample: Sample, layers: int, magnitude: float | Float[Array, ''], fill: Fill) -> Sample:
    """Applies `layers` random operations of the table; the geometric ones together at the end."""
    size_2 = sample.valid_size.astype(jnp.float32)
    linear, shift, image = jnp.eye(2), jnp.zeros(2), sample.image
    for layer in jax.random.split(key, layers):
        of_operation, of_sign = jax.random.split(layer)
        counts_3L = color.histogram(sample._replace(image=image))
        sign = jnp.where(jax.random.bernoulli(of_sign), 1.0, -1.0)
        setting = Setting(jnp.float32(magnitude / MAX_MAGNITUDE), sign, counts_3L, size_2)
        operation = jax.random.randint(of_operation, (), 0, len(OPERATIONS))
        change = jax.lax.switch(operation, list(OPERATIONS.values()), setting)
        image = _recolor(image, change, sample.valid_size)
        linear, shift = change.linear @ linear, change.linear @ shift + change.shift
    return warp(sample._replace(image=image), linear, shift, fill)


def _recolor(image: Array, change: Change, valid_size: Int[Array, '2']) -> Array:
    image = color.look_up(image, color.to_uint8(change.levels))
    image = color.recolor(image, color.blend_with_grey(change.saturation))
    y_H1, x_W = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])
    interior_HW = (y_H1 > 0) & (y_H1 < valid_size[0] - 1) & (x_W > 0) & (x_W < valid_size[1] - 1)
    return color.sharpen(image, interior_HW[..., None], change.sharpness)


def identity(setting: Setting) -> Change:
    levels = jnp.tile(jnp.asarray(LEVELS, jnp.float32), (3, 1))
    return Change(levels, jnp.float32(1), jnp.float32(1), jnp.eye(2), jnp.zeros(2))


def auto_contrast(setting: Setting) -> Change:
    """Stretches each channel to 0..255; a channel with a single level stays."""
    present_3L, levels_L = setting.histogram > 0, jnp.asarray(LEVELS, jnp.float32)
    darkest_31 = jnp.where(present_3L, levels_L, 255).min(axis=1, keepdims=True)
    brightest_31 = jnp.where(present_3L, levels_L, 0).max(axis=1, keepdims=True)
    range_31 = brightest_31 - darkest_31
    # PIL truncates.
    stretched_3L = jnp.floor((levels_L - darkest_31) * 255 / jnp.maximum(range_31, 1) + 1e-4)
    return identity(setting)._replace(levels=jnp.where(range_31 > 0, stretched_3L, levels_L))


def equalize(setting: Setting) -> Change:
    """Histogram equalization as in PIL's ImageOps.equalize: (step // 2 + number of darker pixels) // step.

    step: (number of pixels - those of the brightest level) // 255; if it is 0, the channel stays.
    """
    counts_3L, levels_L = setting.histogram, jnp.asarray(LEVELS, jnp.float32)
    up_to_3L = jnp.cumsum(counts_3L, axis=1)
    brightest_31 = jnp.where(counts_3L > 0, jnp.arange(256), 0).max(axis=1, keepdims=True)
    step_31 = (up_to_3L[:, -1:] - jnp.take_along_axis(counts_3L, brightest_31, axis=1)) // 255
    even_3L = (step_31 // 2 + up_to_3L - counts_3L) // jnp.maximum(step_31, 1)
    return identity(setting)._replace(levels=jnp.where(step_31 > 0, even_3L.astype(jnp.float32), levels_L))


def posterize(setting: Setting) -> Change:
    """Keeps the highest 8 - 4 strength bits of each level."""
    cleared = jnp.round(4 * setting.strength).astype(jnp.int32)
    levels_L = (jnp.asarray(LEVELS) >> cleared) << cleared
    return identity(setting)._replace(levels=jnp.tile(levels_L.astype(jnp.float32), (3, 1)))


def solarize(setting: Setting) -> Change:
    """Inverts levels from 256 (1 - strength) on."""
    levels_L = jnp.asarray(LEVELS, jnp.float32)
    inverted_L = jnp.where(levels_L < 256 * (1 - setting.strength), levels_L, 255 - levels_L)
    return identity(setting)._replace(levels=jnp.tile(inverted_L, (3, 1)))


def brightness(setting: Setting) -> Change:
    change = identity(setting)
    return change._replace(levels=change.levels * _factor(setting))


def contrast(setting: Setting) -> Change:
    """Away from the image's mean grey, or towards it."""
    change, counts_3L = identity(setting), setting.histogram
    means_3 = (counts_3L * change.levels).sum(axis=1) / jnp.maximum(counts_3L.sum(axis=1), 1)
    mean_grey = (means_3 * jnp.asarray(color.GREY)).sum()
    return change._replace(levels=mean_grey + (change.levels - mean_grey) * _factor(setting))


def saturation(setting: Setting) -> Change:
    return identity(setting)._replace(saturation=_factor(setting))


def sharpness(setting: Setting) -> Change:
    return identity(setting)._replace(sharpness=_factor(setting))


def rotate(setting: Setting) -> Change:
    """By up to 30 degrees, clockwise if the sign is 1."""
    angle = jnp.deg2rad(_signed(setting, MAX_DEGREES))
    return _linear(setting, jnp.cos(angle), jnp.sin(angle), -jnp.sin(angle), jnp.cos(angle))


def shear_x(setting: Setting) -> Change:
    """x + k y, |k| up to 0.3."""
    return _linear(setting, 1, 0, _signed(setting, MAX_SHEAR), 1)


def shear_y(setting: Setting) -> Change:
    return _linear(setting, 1, _signed(setting, MAX_SHEAR), 0, 1)


def translate_x(setting: Setting) -> Change:
    """By up to a quarter of the image's width."""
    return identity(setting)._replace(shift=jnp.array([0.0, _signed(setting, MAX_TRANSLATION) * setting.valid_size[1]]))


def translate_y(setting: Setting) -> Change:
    return identity(setting)._replace(shift=jnp.array([_signed(setting, MAX_TRANSLATION) * setting.valid_size[0], 0.0]))


def _factor(setting: Setting) -> Float[Array, '']:
    return 1 + _signed(setting, MAX_ENHANCEMENT)


def _signed(setting: Setting, largest: float) -> Float[Array, '']:
    return setting.sign * setting.strength * largest


def _linear(setting: Setting, yy: Array | int, yx: Array | int, xy: Array | int, xx: Array | int) -> Change:
    return identity(setting)._replace(linear=jnp.array([[yy, yx], [xy, xx]], jnp.float32))


OPERATIONS: dict[str, Callable[[Setting], Change]] = {
    f.__name__: f
    for f in (
        identity, auto_contrast, equalize, rotate, solarize, saturation, posterize, contrast, brightness, sharpness,
        shear_x, shear_y, translate_x, translate_y,
    )
}  # fmt: skip
