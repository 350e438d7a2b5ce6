"""Few programs for many images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.errors import UserError
from effdet_jax.inference import packing


def blank(height, width):
    return np.zeros((height, width, 3), np.uint8)


@given(count=st.integers(0, 40), batch_size=st.integers(1, 9))
def test_batches_hold_every_image_once_in_order_and_in_one_number_of_places(count, batch_size):
    images = [np.full((1, 1, 3), i, np.uint8) for i in range(count)]
    batches = list(packing.batches(images, batch_size))
    assert [image[0, 0, 0] for batch, _ in batches for image in batch] == list(range(count))
    assert len({places for _, places in batches}) <= 1
    for batch, places in batches:
        assert len(batch) <= places <= batch_size
        assert places < 2 * count


@pytest.mark.parametrize(('count', 'places'), [(1, 1), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_few_images_get_the_next_power_of_two(count, places):
    assert [p for _, p in packing.batches([blank(1, 1)] * count, 6)] == [places]


def test_a_batch_of_huge_images_is_divided(monkeypatch):
    monkeypatch.setattr(packing, 'MAX_BATCH_PIXELS', 100)
    sizes = [(5, 10), (5, 10), (1, 1), (20, 20), (9, 9)]
    assert [len(b) for b, _ in packing.batches([blank(*size) for size in sizes], 8)] == [2, 1, 1, 1]


def test_pixels_lie_end_to_end():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((3, 5), (1, 1), (7, 2))]
    pixels, sizes = packing.pack(images, 4)
    np.testing.assert_array_equal(sizes, [[3, 5], [1, 1], [7, 2], [1, 1]])
    np.testing.assert_array_equal(pixels[:30], np.concatenate([image.reshape(-1, 3) for image in images]))
    np.testing.assert_array_equal(
        packing.pack(images, 3, flip=True)[0][:15], images[0][:, ::-1].reshape(-1, 3)
    )  # fmt: skip


@pytest.mark.parametrize(
    ('pixels', 'places', 'megapixels'), [(1, 1, 1), (2**20, 1, 1), (2**20 + 1, 1, 4), (12_000_000, 1, 16), (1, 8, 8)]
)
def test_buffers_come_in_few_sizes(pixels, places, megapixels):
    assert packing.buffer_size(pixels, places) == megapixels * 2**20


@pytest.mark.parametrize(
    ('image', 'what'),
    [
        (np.zeros((4, 4, 3), np.float32), r'float32 \[4, 4, 3\]'),
        (np.zeros((4, 4), np.uint8), r'uint8 \[4, 4\]'),
        (np.zeros((1, 4, 4, 3), np.uint8), r'uint8 \[1, 4, 4, 3\]'),
        ('photo.jpg', 'str'),
        (blank(0, 5), '0 x 5 pixels is empty'),
    ],
    ids=['float', 'grey', 'batch', 'path', 'empty'],
)
def test_what_is_no_image_is_refused(image, what):
    with pytest.raises(UserError, match=what):
        list(packing.batches([image], 8))
