"""Augmentation on the device: uint8 batch in, uint8 batch out, boxes moved with the pixels.

What happens to an image depends only on the step's key and its place in the global batch, not on the number of devices
or on restarts. An augmentation with probability 0 is left out when the step is compiled.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effdet_jax.training.augmentations import color, geometry, mixing, rand_augment
from effdet_jax.training.augmentations.sample import Sample, inside

Batch = dict[str, jax.Array]


class Augmentation(NamedTuple):
    """function: (key, one sample, settings) -> sample; with `of_group`, (key, pool, place in it, settings) -> sample.

    keys: its settings in `config.augment.NAME` beside `probability`. fills: it also takes the fill color.
    """

    function: Callable[..., Sample]
    keys: tuple[str, ...] = ()
    fills: bool = False
    of_group: bool = False


# In the order in which they are applied; the flip comes last.
AUGMENTATIONS = {
    'mosaic': Augmentation(mixing.mosaic, of_group=True),
    'rand_augment': Augmentation(rand_augment.rand_augment, ('layers', 'magnitude'), fills=True),
    'mixup': Augmentation(mixing.mixup, ('alpha',), fills=True, of_group=True),
    'color_jitter': Augmentation(color.color_jitter, ('brightness', 'contrast', 'saturation', 'hue')),
    'erasing': Augmentation(geometry.erase, ('area', 'aspect')),
}


def make_augment(config: Any, axis: str | None) -> Callable[[jax.Array, Batch], Batch]:
    """Returns `augment(key, batch)` for one device of the mapped axis `axis`, or for a single device without one.

    Raises:
      UserError: when called with a batch that cannot be divided into groups (mosaic, MixUp).
    """
    i, flip = config.image, config.augment.flip
    fill = tuple(min(max(round(i.padding * std + mean), 0), 255) for mean, std in zip(i.mean, i.std, strict=True))
    chosen = {}
    for name, row in AUGMENTATIONS.items():
        settings = {key: getattr(getattr(config.augment, name), key) for key in ('probability', *row.keys)}
        if probability := settings.pop('probability'):
            function = partial(row.function, **settings, **({'fill': fill} if row.fills else {}))
            chosen[name] = probability, row.of_group, function

    def augment(key: jax.Array, batch: Batch) -> Batch:
        samples = Sample(*(batch[field] for field in Sample._fields))
        keys_B = keys_of_samples(key, len(samples.image), axis)
        for name, (probability, of_group, function) in chosen.items():
            # Keyed by name: turning another augmentation on does not change what this one draws.
            own_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, zlib.crc32(name.encode()))
            samples = _apply(own_keys_B, samples, probability, function, of_group, axis)
        if chosen:
            samples = samples._replace(image=jnp.where(jax.vmap(inside)(samples), samples.image, 0))
        if flip:
            samples = jax.vmap(geometry.random_flip)(keys_B, samples)
        return batch | samples._asdict()

    return augment


def keys_of_samples(key: jax.Array, batch: int, axis: str | None) -> jax.Array:
    """A key per sample, from its place in the global batch: the same for any number of devices."""
    first = jax.lax.axis_index(axis) * batch if axis else 0
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(batch))


def _apply(
    keys: jax.Array, samples: Sample, probability: float, function: Callable, of_group: bool, axis: str | None
) -> Sample:
    whether_B, how_B = jax.vmap(jax.random.split, out_axes=1)(keys)
    drawn_B = jax.vmap(partial(jax.random.bernoulli, p=probability))(whether_B)
    # Outside the branch: inside, devices would wait for others that took the other branch.
    pool, places_B = mixing.with_partners(samples, axis) if of_group else (samples, None)

    def apply() -> Sample:
        changed = (
            jax.vmap(function, (0, None, 0))(how_B, pool, places_B) if of_group else jax.vmap(function)(how_B, pool)
        )
        return jax.vmap(lambda drawn, *trees: jax.tree.map(partial(jnp.where, drawn), *trees))(
            drawn_B, changed, samples
        )

    return jax.lax.cond(drawn_B.any(), apply, lambda: samples)
