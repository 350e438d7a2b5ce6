"""Each augmentation: pixels and boxes say the same, colours are PIL's or a closed form's."""

import colorsys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from effdet_jax.training.augmentations import color, geometry, mixing, rand_augment
from effdet_jax.training.augmentations.rand_augment import OPERATIONS, Setting
from effdet_jax.training.augmentations.sample import Sample, cut, largest

HEIGHT, WIDTH = 48, 64
FILL = (10, 20, 30)
COLORS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)], np.uint8)


def rectangles(images, colors, seed=0, least=12):
    """[B, ...] dark pictures of several sizes, each with one bright rectangle, its box, and a place for another."""
    rng = np.random.default_rng(seed)
    valid_size = np.stack([rng.integers(28, n + 1, images) for n in (HEIGHT, WIDTH)], axis=1)
    corner = (rng.uniform(0, 1, (images, 2)) * (valid_size - least)).astype(int)
    end = corner + least + (rng.uniform(0, 1, (images, 2)) * (valid_size - corner - least)).astype(int)
    end = np.minimum(end, corner + 24)
    image = np.zeros((images, HEIGHT, WIDTH, 3), np.uint8)
    for i in range(images):
        image[i, corner[i, 0] : end[i, 0], corner[i, 1] : end[i, 1]] = colors[i % len(colors)]
    boxes = np.zeros((images, 2, 4), np.float32)
    boxes[:, 0] = np.concatenate([corner, end], axis=1)
    labels = np.stack([np.arange(images) % len(colors), np.full(images, -1)], axis=1)
    return Sample(*map(jnp.asarray, (image, boxes, labels.astype(np.int32), valid_size.astype(np.int32))))


def extent(mask):
    """Box yxyx around the true pixels."""
    y, x = np.nonzero(mask)
    return np.array([y.min(), x.min(), y.max() + 1, x.max() + 1])


# Moved pixels.


@pytest.mark.parametrize('operation', ['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'])
def test_boxes_move_with_their_pixels(operation):
    count = 60
    samples = rectangles(count, [(255, 255, 255)])
    keys = jax.random.split(jax.random.key(1), count)
    magnitudes = np.linspace(0, 10, count, dtype=np.float32)
    with mock.patch.dict(OPERATIONS, {operation: OPERATIONS[operation]}, clear=True):
        moved = jax.jit(jax.vmap(lambda key, sample, m: rand_augment.rand_augment(key, sample, 1, m, FILL)))(
            keys, samples, magnitudes
        )
    moved, whole = jax.device_get(moved), 0
    for image, boxes, labels, (height, width), before in zip(*moved, np.asarray(samples.boxes[:, 0]), strict=True):
        white = image[..., 0] >= 128
        if labels[0] < 0:  # less than a quarter is left; of a turned box a quarter, of what is in it even less
            assert white.sum() <= 0.26 * np.prod(before[2:] - before[:2]) + 2
            continue
        seen, box = extent(white), boxes[0]
        assert (box[:2] - 1 <= seen[:2]).all() and (seen[2:] <= box[2:] + 1).all()
        if (box[:2] > 0).all() and (box[2:] < (height, width)).all():  # not cut: it fits tightly
            np.testing.assert_allclose(seen, box, atol=1.01)
            whole += 1
        assert not image[height:].any() and not image[:, width:].any()
    assert whole > count / 4
    unmoved = np.asarray(samples.image[0]) == moved.image[0]
    assert unmoved.all()  # at magnitude 0, to the bit


@pytest.mark.slow
def test_uncovered_places_are_filled_and_several_layers_move_the_pixels_once():
    sample = Sample(jnp.full((8, 8, 3), 200, jnp.uint8), jnp.zeros((1, 4)), jnp.array([-1]), jnp.array([8, 6]))
    moved = np.asarray(geometry.warp(sample, jnp.eye(2), jnp.array([2.0, -1.0]), FILL).image)
    expected = np.full((8, 8, 3), 200)
    expected[:2, :6], expected[:, 5] = FILL, FILL
    np.testing.assert_array_equal(moved, expected)
    translate = OPERATIONS['translate_x']
    there_and_back = {'there': lambda s: translate(s._replace(sign=1.0)),
                      'back': lambda s: translate(s._replace(sign=-1.0))}  # fmt: skip
    samples = rectangles(1, [(255, 255, 255)])
    one = Sample(*(x[0] for x in samples))
    with mock.patch.dict(OPERATIONS, there_and_back, clear=True):
        results = [rand_augment.rand_augment(jax.random.key(i), one, 2, 3.0, FILL) for i in range(8)]
    back = [np.array_equal(result.image, one.image) for result in results]
    assert any(back) and not all(back)  # moved twice, the pixels that had left would be lost


def test_a_mosaic_shows_each_box_where_its_pixels_are():
    samples = rectangles(4, COLORS, seed=3)
    make = jax.jit(jax.vmap(mixing.mosaic, (0, None, None)))
    mosaics = jax.device_get(make(jax.random.split(jax.random.key(0), 60), samples, jnp.int32(2)))
    found = 0
    for image, boxes, labels, valid_size in zip(*mosaics, strict=True):
        np.testing.assert_array_equal(valid_size, (HEIGHT, WIDTH))
        for box, label in zip(boxes, labels, strict=True):
            if label < 0:
                continue
            seen = ((image >= 128) == (COLORS[label] >= 128)).all(axis=-1)
            np.testing.assert_allclose(extent(seen), box, atol=1.01)
            found += 1
    assert found > 90  # of at most two in each
    assert (np.diff((mosaics.boxes[..., 2:] - mosaics.boxes[..., :2]).prod(axis=-1)) <= 0).all()  # the largest first


@pytest.mark.slow
def test_every_picture_is_in_every_mosaic_and_other_groups_are_not():
    pool = rectangles(8, COLORS)
    levels = jnp.arange(8, dtype=jnp.uint8)[:, None, None, None] * jnp.ones((HEIGHT, WIDTH, 3), jnp.uint8)
    pool = pool._replace(image=levels)
    for place, members in ((1, {0, 1, 2, 3}), (6, {4, 5, 6, 7})):
        image = mixing.mosaic(jax.random.key(place), pool, jnp.int32(place)).image
        assert set(np.unique(image).tolist()) == members


def test_mixup_blends_pictures_and_keeps_the_boxes_of_both():
    sizes, levels = np.array([[4, 6], [4, 6], [6, 3], [6, 3]]), np.array([100, 100, 200, 200], np.uint8)
    image = np.tile(levels[:, None, None, None], (1, 8, 8, 3))
    boxes = np.array([[[0, 0, i + 1, i + 1], [0, 0, 0, 0]] for i in range(4)], np.float32)
    pool = Sample(*map(jnp.asarray, (image, boxes, np.array([[i, -1] for i in range(4)], np.int32), sizes)))
    partners = set()
    for seed in range(12):
        mixed = jax.device_get(mixing.mixup(jax.random.key(seed), pool, jnp.int32(0), alpha=2.0, fill=FILL))
        other = int(mixed.labels.max())
        partners.add(other)
        assert mixed.labels.tolist() == [other, 0] and mixed.boxes[0, 2] == other + 1  # the larger first
        np.testing.assert_array_equal(mixed.valid_size, np.maximum(sizes[0], sizes[other]))
        if other > 1:
            share = (200 - mixed.image[0, 0, 0].astype(float)) / 100
            assert 0 <= share <= 1
            fill, only_first, only_other = np.array(FILL), mixed.image[0, 5], mixed.image[5, 0]
            np.testing.assert_allclose(only_first, share * 100 + (1 - share) * fill, atol=2)
            np.testing.assert_allclose(only_other, share * fill + (1 - share) * 200, atol=2)
            np.testing.assert_array_equal(mixed.image[5, 5], FILL)
    assert partners == {1, 2, 3}


def test_erasing_covers_one_rectangle_and_drops_what_can_no_longer_be_seen():
    count, area, aspect = 200, (0.1, 0.4), (0.5, 2.0)
    samples = rectangles(count, COLORS, least=6)
    samples = samples._replace(image=jnp.zeros_like(samples.image))
    erase = jax.jit(jax.vmap(lambda key, sample: geometry.erase(key, sample, area, aspect)))
    erased = jax.device_get(erase(jax.random.split(jax.random.key(0), count), samples))
    dropped = 0
    for image, label, size, box in zip(erased.image, erased.labels, erased.valid_size, samples.boxes, strict=True):
        y1, x1, y2, x2 = extent(image.any(axis=-1))
        height, width = y2 - y1, x2 - x1
        assert y2 <= size[0] and x2 <= size[1]
        if height < size[0] and width < size[1]:
            rim = 0.5 * (height + width) + 0.25  # sides are rounded to pixels
            assert area[0] * size.prod() - rim <= height * width <= area[1] * size.prod() + rim
            assert (height - 0.5) / (width + 0.5) <= aspect[1] and (height + 0.5) / (width - 0.5) >= aspect[0]
        (a, b, c, d), pixels = np.asarray(box[0]), 0.0
        pixels = max(min(c, y2) - max(a, y1), 0) * max(min(d, x2) - max(b, x1), 0)
        left = 1 - pixels / ((c - a) * (d - b))
        assert (label[0] >= 0) == (left >= 0.25)
        dropped += label[0] < 0
    assert dropped > 10


def test_boxes_are_cut_dropped_and_the_largest_kept():
    boxes = jnp.array([[0, 0, 4, 4], [-2, 0, 2, 4], [0, 7, 4, 11.0], [-3.5, 0, 0.5, 8], [9, 9, 10, 10], [0, 0, 9, 9]])
    cut_N4, labels = cut(boxes, jnp.array([0, 1, 2, 3, 4, -1]), jnp.array([[0, 0, 8.0, 8.0]]))
    assert labels.tolist() == [0, 1, 2, -1, -1, -1]  # a quarter is just enough; an eighth, and nothing, are not
    np.testing.assert_array_equal(cut_N4[:3], [[0, 0, 4, 4], [0, 0, 2, 4], [0, 7, 4, 8]])
    kept_M4, kept = largest(cut_N4, labels, most=2)
    assert kept.tolist() == [0, 1]
    np.testing.assert_array_equal(kept_M4, cut_N4[:2])
    kept_M4, kept = largest(cut_N4, labels, most=5)
    assert kept.tolist() == [0, 1, 2, -1, -1] and not kept_M4[3:].any()


# Colours.


@pytest.fixture(scope='module')
def photograph():
    """Smooth and noisy parts, of not all levels, with other colours in the padding."""
    y, x = np.mgrid[0:20, 0:28]
    image = np.stack([40 + 5 * y, 30 + 6 * x, 220 - 3 * y - 3 * x], axis=-1)
    image = image + np.random.default_rng(0).integers(-15, 16, image.shape)
    whole = np.full((24, 32, 3), (255, 0, 128), np.uint8)
    whole[:20, :28] = np.clip(image, 0, 255)
    return whole


def sample_of(image):
    return Sample(jnp.asarray(image), jnp.zeros((1, 4)), jnp.array([-1], jnp.int32), jnp.array([20, 28], jnp.int32))


ORACLES = {
    'auto_contrast': lambda image, s, f: ImageOps.autocontrast(image),
    'equalize': lambda image, s, f: ImageOps.equalize(image),
    'posterize': lambda image, s, f: ImageOps.posterize(image, 8 - round(4 * s)),
    'solarize': lambda image, s, f: ImageOps.solarize(image, 256 * (1 - s)),
    'identity': lambda image, s, f: image,
    'brightness': lambda image, s, f: ImageEnhance.Brightness(image).enhance(f),
    'contrast': lambda image, s, f: ImageEnhance.Contrast(image).enhance(f),
    'saturation': lambda image, s, f: ImageEnhance.Color(image).enhance(f),
    'sharpness': lambda image, s, f: ImageEnhance.Sharpness(image).enhance(f),
}  # fmt: skip


@pytest.mark.parametrize('name', ORACLES)
@pytest.mark.parametrize(('strength', 'sign'), [(0.0, 1.0), (0.4, -1.0), (1.0, 1.0)])
def test_operations_on_colours_are_pils(photograph, name, strength, sign):
    sample = sample_of(photograph)
    counts, one = color.histogram(sample), jnp.float32(1)
    setting = Setting(strength * one, sign * one, counts, jnp.array([20.0, 28.0]))
    ours = rand_augment._recolor(sample.image, OPERATIONS[name](setting), sample.valid_size)[:20, :28]
    theirs = np.array(ORACLES[name](Image.fromarray(photograph[:20, :28]), strength, 1 + sign * 0.9 * strength))
    # PIL cuts off where we round, takes a whole number as the mean, and rounds a grey before it blends with it.
    tolerance = 0 if name in ('auto_contrast', 'equalize', 'posterize', 'solarize', 'identity') else 1.5
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), atol=tolerance)


@pytest.mark.parametrize('which', ['brightness', 'contrast', 'saturation'])
def test_each_part_of_the_jitter_is_pils(photograph, which):
    strengths, key = dict.fromkeys(('brightness', 'contrast', 'saturation', 'hue'), 0.0), jax.random.key(3)
    factor = 1 + 0.5 * float(jax.random.uniform(key, (4,), minval=-1)[list(strengths).index(which)])
    assert abs(factor - 1) > 0.1
    ours = color.color_jitter(key, sample_of(photograph), **strengths | {which: 0.5}).image[:20, :28]
    theirs = np.array(ORACLES[which](Image.fromarray(photograph[:20, :28]), 0, factor))
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), atol=2)


def test_hue_is_a_turn_of_chroma(photograph):
    colors = photograph[:20, :28].reshape(-1, 3) / 255
    half = colors @ np.asarray(color.turn_hue(jnp.float32(0.5))).T
    np.testing.assert_allclose(half, 2 * (colors @ color.GREY)[:, None] - colors, atol=2e-3)  # the other side of grey
    turns = 0.13
    turned = colors @ np.asarray(color.turn_hue(jnp.float32(turns))).T
    for before, after in zip(colors[::20], turned[::20], strict=True):
        _, i, q = colorsys.rgb_to_yiq(*before)
        _, i2, q2 = colorsys.rgb_to_yiq(*after)
        assert (i2 + 1j * q2) / (i + 1j * q) == pytest.approx(np.exp(2j * np.pi * turns), abs=0.05)
    np.testing.assert_allclose(turned @ color.GREY, colors @ color.GREY, atol=1e-4)
    np.testing.assert_allclose(np.ones(3) @ np.asarray(color.turn_hue(jnp.float32(0.3))).T, 1, atol=1e-3)


def test_all_parts_of_the_jitter_are_one_after_the_other(photograph):
    key, strength = jax.random.key(8), 0.2
    draws = 1 + strength * np.asarray(jax.random.uniform(key, (4,), minval=-1))
    x = photograph[:20, :28].astype(float) * draws[0]
    mean = (x @ color.GREY).mean()
    x = mean + draws[1] * (x - mean)
    grey = (x @ color.GREY)[..., None]
    x = grey + draws[2] * (x - grey)
    x = x @ np.asarray(color.turn_hue(jnp.float32(draws[3] - 1))).T
    ours = color.color_jitter(key, sample_of(photograph), strength, strength, strength, strength).image[:20, :28]
    np.testing.assert_allclose(np.float64(ours), np.clip(x, 0, 255), atol=0.6)
