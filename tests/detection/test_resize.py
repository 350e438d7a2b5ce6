"""The device's resize against the host's, on images of any sizes at once."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdet_jax.data import transforms
from effdet_jax.detection import preprocess
from effdet_jax.inference import packing

SIZE = (64, 96)


@jax.jit
def resize(pixels, sizes):
    return preprocess.resize_and_pad(pixels, sizes, SIZE)


@pytest.mark.parametrize('smooth', [False, True], ids=['noise', 'ramps'])
def test_equals_the_host_within_a_grey_level(smooth):
    sizes = [(64, 96), (40, 60), (333, 217), (1, 1), (1, 500), (700, 2), (128, 192), (30, 96)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    if smooth:
        images = [(np.add.outer(np.arange(h), np.arange(w))[..., None] % 256).repeat(3, 2).astype(np.uint8)
                  for h, w in sizes]  # fmt: skip
    resized, valid_size, scale = resize(*packing.pack(images, len(images)))
    differing = 0
    for i, image in enumerate(images):
        expected, expected_size, expected_scale = transforms.resize_and_pad(image, SIZE)
        height, width = expected_size
        assert tuple(valid_size[i].tolist()) == expected_size
        assert float(scale[i]) == expected_scale
        levels = np.abs(np.asarray(resized[i, :height, :width]).astype(int) - expected[:height, :width])
        assert levels.max() <= (0 if expected_size == image.shape[:2] else 1)
        differing += np.count_nonzero(levels)
    assert differing < 1e-3 * resized.size or platform.machine() != 'x86_64'  # OpenCV has other code for others


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([(512, 512), (480, 640), (128, 128), (1536, 1536)]))
def test_sizes_are_truncated_as_on_the_host(seed, size):
    sizes = np.random.default_rng(seed).integers(1, 6000, (500, 2)).astype(np.int32)
    valid_B2, scale_B = jax.jit(jax.vmap(lambda s: preprocess.scaled_size(s, size)))(jnp.asarray(sizes))
    expected = [transforms.scaled_size(height, width, size) for height, width in sizes.tolist()]
    np.testing.assert_array_equal(valid_B2, [valid for valid, _ in expected])
    np.testing.assert_array_equal(scale_B, [scale for _, scale in expected])


def test_a_mirrored_image_is_resized_to_the_mirrored_picture():
    image = np.random.default_rng(0).integers(0, 256, (100, 150, 3)).astype(np.uint8)
    straight, valid_size, _ = resize(*packing.pack([image], 1))
    mirrored, _, _ = resize(*packing.pack([image], 1, flip=True))
    width = int(valid_size[0, 1])
    levels = np.asarray(mirrored[0, :, :width]).astype(int) - np.asarray(straight[0, :, :width])[:, ::-1]
    assert np.abs(levels).max() <= 1  # halves are rounded up on both sides
