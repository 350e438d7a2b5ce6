"""What a detector takes as an image."""

import numpy as np
import pytest
from PIL import Image

from effdet_jax.data import read_image
from effdet_jax.errors import UserError
from effdet_jax.inference.images import to_array

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 4)).astype(np.uint8)
DEEP = (np.arange(54, dtype=np.uint16).reshape(6, 9) << 10) + 5


@pytest.mark.parametrize(
    'image',
    [
        Image.fromarray(PIXELS[..., :3]),
        Image.fromarray(PIXELS),
        Image.fromarray(PIXELS[..., 0]),
        Image.fromarray(PIXELS[..., :2], 'LA'),
        Image.fromarray(PIXELS[..., :3]).quantize(16),
        Image.fromarray(PIXELS[..., 0] > 99),
        Image.fromarray(DEEP),
    ],
    ids=lambda image: image.mode,
)
def test_a_pil_image_is_what_its_file_is(image, tmp_path):
    image.save(tmp_path / 'image.png')
    expected = read_image(tmp_path / 'image.png')
    np.testing.assert_array_equal(to_array(image), expected)
    np.testing.assert_array_equal(to_array(Image.open(tmp_path / 'image.png')), expected)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photograph_is_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / 'photograph.png'
    Image.fromarray(PIXELS[..., :3]).save(path, exif=exif)
    assert to_array(path).shape == ((6, 9, 3) if orientation < 5 else (9, 6, 3))
    np.testing.assert_array_equal(to_array(Image.open(path)), to_array(path))


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_a_pil_image_of_unknown_range_is_refused(mode):
    with pytest.raises(UserError, match=f'mode {mode} has no known range.: convert it to RGB'):
        to_array(Image.new(mode, (4, 4)))


def test_a_damaged_file_that_pillow_has_opened_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / 'whole.png')
    (tmp_path / 'half.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:500])
    with pytest.raises(UserError, match=r'cannot be used .*: convert it to RGB, or replace its file'):
        to_array(Image.open(tmp_path / 'half.png'))
