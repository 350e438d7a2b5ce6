import itertools
import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax import data
from effdet_jax.data import jitter, shapes, transforms
from effdet_jax.data.reader import Reader

SIZE = (48, 64)


def jpeg(index: int, size: int = 160, suffix: str = '.jpg') -> bytes:
    image = shapes.draw(index, size=size).image
    return cv2.imencode(suffix, image[: size * 3 // 4, :, ::-1])[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    """Six pictures of 120x160, of which one is a PNG."""
    rows = []
    for i in range(6):
        suffix = '.png' if i == 5 else '.jpg'
        (tmp_path / f'{i}{suffix}').write_bytes(jpeg(i, suffix=suffix))
        rows.append({'id': i, 'file_name': f'{i}{suffix}', 'height': 120, 'width': 160})
    boxes = [
        {'id': i, 'image_id': i, 'category_id': 1, 'bbox': [10, 20, 100, 80], 'area': 8000, 'iscrowd': 0}
        for i in range(6)
    ]
    document = {'images': rows, 'annotations': boxes, 'categories': [{'id': 1, 'name': 'thing'}]}
    (tmp_path / 'a.json').write_text(json.dumps(document))
    return Counting(data.open_source(f'coco:{tmp_path}/a.json,{tmp_path}'))


class Counting:
    """A source that counts what is read of it."""

    def __init__(self, source):
        self.class_names, self.category_ids = source.class_names, source.category_ids
        self._source, self.reads = source, 0

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.reads += 1
        return self._source[index]

    def annotations(self, index):
        return self._source.annotations(index)


def batches(source, count, cache_bytes=0, threads=0):
    made = data.train_batches(
        source, image_size=SIZE, batch_size=4, max_boxes=2, scale_range=(0.1, 2.0), seed=1, threads=threads,
        prefetch=2, cache_bytes=cache_bytes,
    )  # fmt: skip
    return list(itertools.islice(iter(made), count))


@pytest.mark.parametrize('threads', [0, 3])
@pytest.mark.parametrize('cache_bytes', [100_000, 10**9], ids=['of a few images', 'of all'])
def test_the_cache_changes_no_bit(folder, cache_bytes, threads):
    for cached, expected in zip(batches(folder, 12, cache_bytes, threads), batches(folder, 12), strict=True):
        assert cached.keys() == expected.keys()
        for name in cached:
            np.testing.assert_array_equal(cached[name], expected[name], err_msg=name)


def test_what_is_in_the_cache_is_not_read_again(folder):
    batches(folder, 25)
    assert folder.reads == 100
    folder.reads = 0
    batches(folder, 25, 10**9)
    assert folder.reads <= 5 * 4 + 1  # each JPEG in at most four sizes, the PNG in one


def test_the_cache_keeps_to_its_limit(folder):
    reader = Reader(folder, cache_bytes=3 * 120 * 160 * 3)
    place = place_of((1.0, 1.0))
    for _ in range(2):
        for index in range(6):
            reader.read(index, place)
    assert folder.reads == 6 + 3


def place_of(scale_range, seed=0):
    draws = jitter.draw(scale_range, np.random.default_rng(seed))
    return lambda size: jitter.place(size, SIZE, draws)


sides = st.integers(1, 2000)


@given(sides, sides, st.floats(0.1, 2.0), st.integers(0, 99))
def test_decoding_small_makes_no_pixel_up_and_spares_what_evaluation_sees(height, width, factor, seed):
    where = place_of((factor, factor), seed)((height, width))
    assert where.reduction in (1, 2, 4, 8)
    if where.reduction > 1:
        assert height / where.reduction >= where.scaled[0] and width / where.reduction >= where.scaled[1]
        assert factor < 1
    elif factor < 1:
        assert height // 2 < where.scaled[0] or width // 2 < where.scaled[1]


@pytest.mark.parametrize('reduction', [2, 4, 8])
def test_a_jpeg_decoded_small_is_the_mean_of_its_pixels(reduction):
    encoded = jpeg(3, size=320)
    small, full = (transforms.decode(encoded, 'x', reduction=r) for r in (reduction, 1))
    assert small.shape == (240 / reduction, 320 / reduction, 3)
    mean = cv2.resize(full, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    difference = np.abs(small.astype(int) - mean)
    assert difference.mean() < 1 and np.percentile(difference, 99) < 12  # grey levels; at edges it is sharper
    channels = difference.mean((0, 1))
    assert np.abs(small[..., ::-1].astype(int) - mean).mean() > 5 * channels.max()  # and it is RGB


def test_other_formats_are_decoded_whole():
    assert transforms.decode(jpeg(3, suffix='.png'), 'x', reduction=4).shape == (120, 160, 3)


def test_an_odd_side_is_rounded_up():
    encoded = cv2.imencode('.jpg', np.zeros((41, 27, 3), np.uint8))[1].tobytes()
    assert transforms.decode(encoded, 'x', reduction=4).shape == (11, 7, 3)


@pytest.mark.parametrize('scaled', [(30, 40), (48, 40), (60, 80), (48, 64)])
def test_filling_a_batch_is_resizing_and_cutting(scaled):
    image = np.random.default_rng(0).integers(0, 256, (33, 44, 3)).astype(np.uint8)
    batch = np.full((3, *SIZE, 3), 7, np.uint8)
    corner = max(0, scaled[0] - SIZE[0]) // 2, max(0, scaled[1] - SIZE[1])
    height, width = transforms.fill(batch[1], image, scaled, corner)
    expected = cv2.resize(image, scaled[::-1])[corner[0] :, corner[1] :][: SIZE[0], : SIZE[1]]
    assert (height, width) == expected.shape[:2]
    np.testing.assert_array_equal(batch[1, :height, :width], expected)
    assert not batch[1, height:].any() and not batch[1, :, width:].any()
    assert (batch[[0, 2]] == 7).all()


def test_every_stage_has_a_rate(folder):
    rates = data.stage_rates(folder, image_size=SIZE, scale_range=(0.5, 1.5), threads=2, seconds=0.01)
    assert list(rates)[-2:] == ['batches, 1 thread', 'batches, 2 threads'] and min(rates.values()) > 0
