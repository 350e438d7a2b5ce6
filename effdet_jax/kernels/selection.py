"""The largest of many numbers without sorting them."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.kernels.dispatch import by_platform

WORD = 32  # bits


def plain_largest(values: Float[Array, 'N'], count: int) -> Int[Array, 'count']:
    """The definition."""
    return jnp.sort(jax.lax.top_k(values, count)[1])


def largest(values: Float[Array, 'N'], count: int) -> Int[Array, 'count']:
    """Indices of the `count` largest numbers in rising order; the first of equals; nan is larger than any number.

    On CPU `top_k` keeps a heap, which takes four times as long for 5000 of 50,000.
    """
    cpu, plain = (functools.partial(form, count=count) for form in (_by_bisection, plain_largest))
    return by_platform(values.astype(jnp.float32), cpu=cpu, plain=plain)


def _by_bisection(values: Float[Array, 'N'], count: int) -> Int[Array, 'count']:
    """The least of the `count` largest is searched for, then the bits of those above it and of its first equals."""
    keys_N = _sortable(values)
    least = _least_of_largest(keys_N, count)
    above_W, equal_W = _packed(keys_N > least), _packed(keys_N == least)
    equals_W = _ones(equal_W)
    wanted_W = jnp.clip(count - _ones(above_W).sum() - (jnp.cumsum(equals_W) - equals_W), 0, equals_W)
    chosen_W = above_W | _first_ones(equal_W, wanted_W)
    ones_W = _ones(chosen_W)
    ends_W, places = jnp.cumsum(ones_W), jnp.arange(count)
    word = jnp.searchsorted(ends_W, places, side='right')
    return WORD * word + _place_of_one(chosen_W[word], places - (ends_W - ones_W)[word])


def _sortable(values: Float[Array, 'N']) -> Int[Array, 'N']:
    """Integers in the order of float32: their bits, which fall where the numbers are negative."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _least_of_largest(keys: Int[Array, 'N'], count: int) -> Int[Array, '']:
    """The largest integer that at least `count` keys reach, or any that exactly so many do."""

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # of the two, rounded up, without overflow
        reached = (keys >= middle).sum(dtype=jnp.int32)
        return (
            jnp.where(reached >= count, middle, low),
            jnp.where(reached > count, high, jnp.where(reached == count, middle, middle - 1)),
        )

    return jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (keys.min(), keys.max()))[0]


def _packed(flags: Array) -> Array:
    """Booleans [N] -> words [ceil(N / 32)], the first in the lowest bit."""
    bits = jnp.pad(flags, (0, -len(flags) % WORD)).reshape(-1, WORD).astype(jnp.uint32)
    return (bits << jnp.arange(WORD, dtype=jnp.uint32)).sum(axis=1, dtype=jnp.uint32)


def _ones(words: Array) -> Array:
    return jax.lax.population_count(words).astype(jnp.int32)


def _first_ones(words: Array, count: Array) -> Array:
    """Each word with its lowest `count` ones alone, of which it has at least so many."""
    below = (jnp.uint32(1) << _place_of_one(words, count).astype(jnp.uint32)) - 1
    return jnp.where(count < _ones(words), words & below, words)


def _place_of_one(words: Array, index: Array) -> Array:
    """Where the one number `index` of each word is, counted from the lowest bit: by halves of what is left."""
    place = jnp.zeros_like(index)
    for width in (16, 8, 4, 2, 1):
        low = _ones(words >> place.astype(jnp.uint32) & jnp.uint32((1 << width) - 1))
        place = jnp.where(index >= low, place + width, place)
        index = jnp.where(index >= low, index - low, index)
    return place
