"""The table as a whole: what is off, what a step draws, padding, devices. test_augmentations.py has each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from effdet_jax.configs import default
from effdet_jax.detection import preprocess
from effdet_jax.errors import UserError
from effdet_jax.runtime import devices
from effdet_jax.training import augment
from effdet_jax.training.augment import AUGMENTATIONS, make_augment
from effdet_jax.training.augmentations.geometry import random_flip
from effdet_jax.training.augmentations.sample import Sample

SIZE = 24
FIELDS = Sample._fields


def config(probability=0.0, names=tuple(AUGMENTATIONS), **changes):
    c = default.get_config('d0')
    for name in names:
        c.augment[name].probability = probability
    c.augment.rand_augment.layers = 2
    c.update_from_flattened_dict(changes)
    return c


def batch(images=8, seed=0):
    return jax.tree.map(jnp.asarray, tiny.batch(SIZE, images=images, seed=seed))


@pytest.fixture(scope='module')
def all_on():
    """Every augmentation of half of the images."""
    return jax.jit(make_augment(config(0.5), None))


def assert_same(a, b):
    for field in FIELDS:
        np.testing.assert_array_equal(a[field], b[field], err_msg=field)


def test_everything_is_off_unless_asked_for():
    assert all(default.get_config('d0').augment[name].probability == 0 for name in AUGMENTATIONS)
    without = make_augment(config(**{'augment.flip': False}), None)(jax.random.key(0), batch())
    assert_same(without, batch())


def test_alone_the_flip_is_what_it_was():
    key, b = jax.random.key(5), batch()
    flipped = make_augment(default.get_config('d0'), None)(key, b)
    for i in range(8):
        expected = random_flip(jax.random.fold_in(key, i), Sample(*(jnp.asarray(b[field][i]) for field in FIELDS)))
        assert_same({field: flipped[field][i] for field in FIELDS}, expected._asdict())


def test_the_key_of_the_step_decides(all_on):
    first, again, next_step = (all_on(jax.random.key(seed), batch()) for seed in (1, 1, 2))
    assert_same(first, again)
    assert (np.asarray(first['image']) != np.asarray(next_step['image'])).any(axis=(1, 2, 3)).mean() > 0.5


def test_what_one_draws_does_not_depend_on_which_others_are_on():
    alone, both = (
        make_augment(config(1.0, names, **{'augment.flip': False}), None)(jax.random.key(0), batch())
        for names in (['color_jitter'], ['color_jitter', 'erasing'])
    )
    same = (np.asarray(alone['image']) == np.asarray(both['image'])).mean()
    assert 0.75 < same < 1  # but for what was erased


def test_types_order_of_boxes_and_padding(all_on):
    c = config()
    for seed in range(5):
        b = batch(seed=seed)
        out = all_on(jax.random.key(seed), b)
        for field in FIELDS:
            assert (out[field].dtype, out[field].shape) == (b[field].dtype, b[field].shape)
        boxes, labels, valid = (np.asarray(out[field]) for field in ('boxes', 'labels', 'valid_size'))
        assert (np.diff((labels >= 0).astype(int), axis=1) <= 0).all()  # padding is at the end
        assert (boxes[labels < 0][:, :2] == boxes[labels < 0][:, 2:]).all()  # without area
        assert (boxes[..., :2] <= boxes[..., 2:]).all() and (boxes >= 0).all()
        assert (boxes <= np.tile(valid, 2)[:, None]).all()
        pixels = np.asarray(preprocess.normalize(out['image'], out['valid_size'], c.image.mean, c.image.std, -0.5))
        for image, seen, (height, width) in zip(np.asarray(out['image']), pixels, valid, strict=True):
            assert not image[height:].any() and not image[:, width:].any()
            assert (seen[height:] == -0.5).all() and (seen[:, width:] == -0.5).all()


def test_of_each_image_by_itself_with_the_probability_asked_for():
    """In the place of an augmentation stands one that paints white, because the real ones sometimes change nothing."""

    def white(key, sample):
        return sample._replace(image=jnp.full_like(sample.image, 255))

    b = {'image': np.zeros((2000, 2, 2, 3), np.uint8), 'boxes': np.zeros((2000, 1, 4), np.float32),
         'labels': np.zeros((2000, 1), np.int32), 'valid_size': np.full((2000, 2), 2, np.int32)}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(augment.AUGMENTATIONS, 'color_jitter', augment.Augmentation(white))
        out = jax.jit(make_augment(config(0.3, ['color_jitter']), None))(jax.random.key(0), b)
    painted = np.asarray(out['image']).reshape(2000, -1)
    assert (painted.all(axis=1) | ~painted.any(axis=1)).all()
    assert abs(painted.all(axis=1).mean() - 0.3) < 3 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize('images', [4, 8])  # one and two on each of four devices: groups span four and two of them
def test_four_devices_augment_as_one_does(images, all_on):
    b = {field: batch(images)[field] for field in FIELDS}
    mapped = devices.map_devices(lambda key, b: make_augment(config(0.5), devices.AXIS)(key, b))
    on_four = devices.unshard(mapped(devices.replicate(jax.random.key(7)), devices.shard(jax.device_get(b))))
    assert_same(on_four, jax.device_get(all_on(jax.random.key(7), b)))


def test_batches_that_cannot_be_grouped_are_refused():
    mosaic = make_augment(config(1.0, ['mosaic']), None)
    with pytest.raises(UserError, match='need groups of 4 images, but each of 1 devices has 6: choose'):
        mosaic(jax.random.key(0), batch(6))
    make_augment(config(1.0, ['erasing']), None)(jax.random.key(0), batch(6))
