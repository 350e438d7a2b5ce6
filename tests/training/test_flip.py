import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.training.augmentations import geometry
from effdet_jax.training.augmentations.sample import Sample

HEIGHT, WIDTH = 12, 16


@jax.jit
def flip(key, image, boxes, valid_size):
    flipped = geometry.random_flip(key, Sample(image, boxes, jnp.zeros(len(boxes), jnp.int32), valid_size))
    return flipped.image, flipped.boxes


@pytest.fixture(scope='module')
def keys():
    """(a key that flips, a key that does not)."""
    key = jax.random.key(0)
    image = jnp.zeros((HEIGHT, WIDTH, 3), jnp.uint8).at[0, 0].set(1)
    draws = [jax.random.fold_in(key, i) for i in range(20)]
    flips = [bool(flip(k, image, jnp.zeros((1, 4)), jnp.array([HEIGHT, WIDTH]))[0][0, -1].any()) for k in draws]
    return draws[flips.index(True)], draws[flips.index(False)]


@st.composite
def pictures(draw):
    """(image with one white rectangle and noise as padding, its box yxyx, valid_size); the box ends before the edge."""
    height, width = draw(st.integers(2, HEIGHT)), draw(st.integers(3, WIDTH))
    last = min(width, WIDTH - 1)  # boxes are cut there before, and after every flip
    y1, x1 = draw(st.integers(0, height - 1)), draw(st.integers(1, last - 1))
    y2, x2 = draw(st.integers(y1 + 1, height)), draw(st.integers(x1 + 1, last))
    image = np.random.default_rng(0).integers(1, 200, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    image[:height, :width] = 0
    image[y1:y2, x1:x2] = 255
    return image, np.array([[y1, x1, y2, x2]], np.float32), np.array([height, width])


def around_white(image):
    """Box yxyx around the white pixels."""
    y, x = np.nonzero(np.all(image == 255, axis=-1))
    return np.array([[y.min(), x.min(), y.max() + 1, x.max() + 1]], np.float32)


@given(picture=pictures())
def test_boxes_move_with_their_pixels_and_the_padding_stays(keys, picture):
    image, boxes, valid_size = picture
    flipped, moved = flip(keys[0], image, boxes, valid_size)
    np.testing.assert_array_equal(moved, around_white(np.asarray(flipped)))
    height, width = valid_size
    np.testing.assert_array_equal(flipped[:height, :width], image[:height, :width][:, ::-1])
    np.testing.assert_array_equal(flipped[:, width:], image[:, width:])


@given(picture=pictures())
def test_twice_is_not_at_all(keys, picture):
    image, boxes, valid_size = picture
    again = flip(keys[0], *flip(keys[0], image, boxes, valid_size), valid_size)
    np.testing.assert_array_equal(again[0], image)
    np.testing.assert_array_equal(again[1], boxes)


@given(picture=pictures())
def test_otherwise_nothing_changes(keys, picture):
    image, boxes, valid_size = picture
    same = flip(keys[1], image, boxes, valid_size)
    np.testing.assert_array_equal(same[0], image)
    np.testing.assert_array_equal(same[1], boxes)


def test_a_box_at_the_left_edge_ends_at_the_last_pixel_as_in_the_reference(keys):
    _, boxes = flip(
        keys[0], np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.array([[1, 0, 5, 4]], np.float32), np.array([HEIGHT, WIDTH])
    )
    np.testing.assert_array_equal(boxes, [[1, WIDTH - 4, 5, WIDTH - 1]])


def test_every_second_image_is_flipped():
    image = jnp.zeros((HEIGHT, WIDTH, 3), jnp.uint8).at[0, 0].set(1)
    keys = jax.random.split(jax.random.key(0), 1000)
    flipped = jax.vmap(lambda key: flip(key, image, jnp.zeros((1, 4)), jnp.array([HEIGHT, WIDTH]))[0][0, -1, 0])
    assert 450 < int(flipped(keys).sum()) < 550
