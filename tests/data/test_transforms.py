import contextlib
import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from effdet_jax.data import jitter, transforms
from effdet_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / 'goldens' / 'preprocess.npz'
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pixel_boxes(golden) -> np.ndarray:
    height, width = golden['image'].shape[:2]
    return golden['boxes_normalized_yxyx'] * np.array([height, width, height, width], np.float32)


def jitter_resize_crop(image, boxes, image_size, scale_range, rng):
    """All of training's steps: (image, valid_size, boxes left, which they are)."""
    where = jitter.place(image.shape[:2], image_size, jitter.draw(scale_range, rng))
    out = np.full((*image_size, 3), 99, np.uint8)  # as a batch before it is filled: anything
    valid_size = transforms.fill(out, image, where.scaled, where.corner)
    return out, valid_size, *jitter.move_boxes(boxes, where, image_size)


def test_evaluation_image_is_the_official_one_up_to_rounding():
    golden = np.load(GOLDEN)
    image, (height, width), image_scale = transforms.resize_and_pad(golden['image'], (128, 128))
    normalized = (image / 255 - MEAN) / STD
    normalized[height:] = 0
    normalized[:, width:] = 0
    assert (height, width) == (88, 127)  # 127, not 128: float32 truncates
    assert image_scale == golden['image_scale']
    grey_levels = np.abs(normalized - golden['output']) * STD * 255
    assert grey_levels.max() < 0.76  # half a level of rounding, and OpenCV's 11-bit weights


def test_training_without_jitter_is_evaluation_with_the_official_boxes():
    golden = np.load(GOLDEN)
    image, valid_size, boxes, kept = jitter_resize_crop(
        golden['image'], pixel_boxes(golden), (128, 128), (1.0, 1.0), np.random.default_rng(0)
    )
    expected_image, expected_size, _ = transforms.resize_and_pad(golden['image'], (128, 128))
    np.testing.assert_array_equal(boxes, golden['boxes_yxyx'])
    np.testing.assert_array_equal(image, expected_image)
    assert valid_size == expected_size and kept.all()


sides = st.integers(1, 60)


@given(height=sides, width=sides, out_height=sides, out_width=sides)
def test_scaled_image_fits_and_touches_one_side(height, width, out_height, out_width):
    (new_height, new_width), _ = transforms.scaled_size(height, width, (out_height, out_width))
    assert 1 <= new_height <= out_height and 1 <= new_width <= out_width
    assert new_height >= out_height - 1 or new_width >= out_width - 1


@given(
    height=sides,
    width=sides,
    out=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    low=st.floats(0.1, 1),
    seed=st.integers(0, 99),
)
def test_jittered_boxes_stay_inside_and_on_their_pixels(height, width, out, low, seed):
    # an image that is white only inside the box: its centre must stay white and its far surroundings black
    y1, x1 = height // 4, width // 4
    box = np.array([[y1, x1, height, width]], np.float32)
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:, x1:] = 255
    rng = np.random.default_rng(seed)
    jittered, valid_size, boxes, kept = jitter_resize_crop(image, box, out, (low, 2.0), rng)
    assert jittered.shape == (*out, 3) and valid_size[0] <= out[0] and valid_size[1] <= out[1]
    assert len(boxes) == kept.sum()
    assert (jittered[valid_size[0] :] == 0).all() and (jittered[:, valid_size[1] :] == 0).all()
    for top, left, bottom, right in boxes:
        assert 0 <= top < bottom <= out[0] - 1 and 0 <= left < right <= out[1] - 1
        if bottom - top > 8 and right - left > 8 and min(height, width) > 4:
            assert jittered[int((top + bottom) / 2), int((left + right) / 2)].min() > 250


def test_boxes_cropped_away_are_named_as_such():
    image = np.zeros((40, 40, 3), np.uint8)
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [30, 0, 40, 10]], np.float32)
    rng = np.random.default_rng(1)
    _, _, left, kept = jitter_resize_crop(image, boxes, (40, 40), (2.0, 2.0), rng)
    assert kept.shape == (3,) and 0 < kept.sum() < 3 and len(left) == kept.sum()


def png(array: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, 'PNG', **options)
    return buffer.getvalue()


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = RGB[..., 0]
OPAQUE = np.dstack([RGB, np.full((5, 7), 255, np.uint8)])
PALETTE = Image.fromarray(RGB).quantize(8)


def palette_png() -> bytes:
    buffer = io.BytesIO()
    PALETTE.save(buffer, 'PNG')
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('encoded', 'expected'),
    [
        (png(RGB), RGB),
        (png(GREY), np.dstack([GREY] * 3)),
        (png(OPAQUE), RGB),
        (png(OPAQUE * np.array([1, 1, 1, 0], np.uint8)), np.full_like(RGB, 255)),
        (cv2.imencode('.png', GREY.astype(np.uint16) * 256)[1].tobytes(), np.dstack([GREY] * 3)),
        (palette_png(), np.asarray(PALETTE.convert('RGB'))),
    ],
    ids=['rgb', 'grey', 'opaque', 'transparent is white', '16 bit', 'palette'],
)
def test_any_kind_of_image_becomes_rgb(encoded, expected, tmp_path):
    np.testing.assert_array_equal(transforms.decode(encoded, 'x'), expected)
    assert transforms.image_size(encoded, 'x') == (5, 7)
    (tmp_path / 'x.png').write_bytes(encoded)
    np.testing.assert_array_equal(transforms.read_image(tmp_path / 'x.png'), expected)


# EXIF orientation: what a camera that writes it did to the picture
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def photograph(upright: np.ndarray, orientation: int, format_: str, **options) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(buffer, format_, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize(
    ('format_', 'options', 'tolerance'),
    [
        ('JPEG', {'quality': 100, 'subsampling': 0}, 4),
        ('PNG', {}, 0),
        ('WEBP', {'lossless': True}, 0),
        ('TIFF', {}, 0),
        ('AVIF', {'quality': 100, 'subsampling': '4:4:4'}, 8),
    ],
)
def test_every_image_is_turned_upright(orientation, format_, options, tolerance, tmp_path):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[8:, 16:] = (200, 40, 40), (40, 40, 200)
    encoded = photograph(upright, orientation, format_, **options)
    decoded = transforms.decode(encoded, 'x')
    assert decoded.shape == (16, 24, 3) and transforms.image_size(encoded, 'x') == (16, 24)
    assert np.abs(decoded.astype(int) - upright).max() <= tolerance
    assert transforms.exif_orientation(encoded, 'x') == orientation
    (tmp_path / 'x').write_bytes(encoded)
    np.testing.assert_array_equal(transforms.read_image(tmp_path / 'x'), decoded)  # prediction sees what training saw


def test_a_turned_jpeg_can_be_decoded_smaller():
    encoded = photograph(np.full((64, 48, 3), 9, np.uint8), 6, 'JPEG')
    assert transforms.decode(encoded, 'x', reduction=4).shape == (16, 12, 3)


def test_transparent_image_is_turned_too():
    assert transforms.decode(photograph(OPAQUE, 6, 'PNG'), 'x').shape == RGB.shape


@pytest.mark.parametrize('orientation', [0, 9])
def test_orientation_that_exif_does_not_know_turns_nothing(orientation):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(buffer, 'PNG', exif=exif)
    np.testing.assert_array_equal(transforms.decode(buffer.getvalue(), 'x'), RGB)


def encoded_as(format_: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(buffer, format_)
    return buffer.getvalue()


@pytest.mark.parametrize(
    'encoded',
    [encoded_as('JPEG')[:-1], encoded_as('JPEG')[:-700], encoded_as('PNG')[:-700], encoded_as('BMP')[:-1]],
    ids=['last byte of a JPEG', 'half a JPEG', 'half a PNG', 'BMP'],
)
def test_image_that_ends_too_early_is_told_so(encoded):
    with pytest.raises(UserError, match=r'^x: the file is truncated: open it in an image editor and save it again'):
        transforms.decode(encoded, 'x')


def with_chunk(name: bytes, content: bytes) -> bytes:
    chunk = struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    encoded = png(RGB)
    return encoded[:33] + chunk + encoded[33:]


@pytest.mark.parametrize(
    'encoded',
    [
        with_chunk(b'iCCP', b'x\0\0' + zlib.compress(b'no profile')),
        with_chunk(b'sBIT', b'\xff\xff\xff'),
        encoded_as('PNG')[:-12],
        encoded_as('PNG')[:200] + b'\0' + encoded_as('PNG')[201:],
        encoded_as('TIFF')[:-900],
    ],
    ids=['profile', 'bits', 'without its end', 'checksum', 'TIFF'],
)
def test_libraries_print_nothing(encoded, capfd):
    with contextlib.suppress(UserError):
        transforms.decode(encoded, 'x')
    assert capfd.readouterr() == ('', '')


def test_damaged_jpeg_is_decoded_in_silence_where_asked_for(capfd):
    encoded = encoded_as('JPEG')
    damaged = encoded[:-2] + b'\1\2\3' + encoded[-2:]
    quiet = transforms.decode(damaged, 'x', quiet=True)
    assert capfd.readouterr() == ('', '')
    np.testing.assert_array_equal(transforms.decode(encoded, 'x'), quiet)


@pytest.mark.parametrize(
    ('encoded', 'deep', 'brightest'),
    [
        (cv2.imencode('.tif', np.linspace(0, 4095, 35).reshape(5, 7).astype(np.uint16))[1].tobytes(), True, 15),
        (cv2.imencode('.png', np.full((5, 7), 1023, np.uint16))[1].tobytes(), True, 3),
        (cv2.imencode('.png', np.full((5, 7, 3), 16383, np.uint16))[1].tobytes(), True, 63),
        (cv2.imencode('.tif', np.full((5, 7), 0.5, np.float32))[1].tobytes(), True, 0),
        (png(np.full((5, 7, 3), 20, np.uint8)), False, 20),
    ],
    ids=['12 bits', '10 bits', '14 bits, colour', 'fractions', '8 bits'],
)
def test_more_than_8_bits_are_known(encoded, deep, brightest):
    assert transforms.is_deep(encoded, 'x') == deep and transforms.decode(encoded, 'x').max() == brightest


@pytest.mark.parametrize('encoded', [b'', b'no image', png(RGB)[:20]], ids=['empty', 'text', 'cut off'])
def test_undecodable_image_is_named(encoded):
    with pytest.raises(UserError, match=r'^pictures/7\.jpg: '):
        transforms.decode(encoded, 'pictures/7.jpg')


def test_enormous_image_is_refused_before_it_is_decoded():
    header = bytearray(png(RGB))
    header[16:24] = (20_000).to_bytes(4, 'big') * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, 'big')
    with pytest.raises(UserError, match='178 megapixels'):
        transforms.decode(bytes(header), 'bomb.png')


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r'nothing\.jpg: cannot be read'):
        transforms.read_image(tmp_path / 'nothing.jpg')
