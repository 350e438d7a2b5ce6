import goldens
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.detection import boxes as box_ops
from effdet_jax.detection.anchors import PAIR_RATIOS, SQRT_RATIOS, best_ious, level_sizes, make_anchors

D0 = (512, 512)


def test_equal_the_official_anchors():
    golden = goldens.load('targets_and_losses')
    size = tuple(int(n) for n in golden['image_size'])
    anchors = make_anchors(level_sizes(size, 3, 7), size, float(golden['anchor_scale']))
    np.testing.assert_array_equal(anchors, golden['anchors_yxyx'])


@pytest.mark.parametrize(
    ('ratios', 'wide'),
    [(SQRT_RATIOS, (-7.3137, -18.6274, 15.3137, 26.6274)), (PAIR_RATIOS, (-7.2, -18.4, 15.2, 26.4))],
)
def test_first_anchors_of_d0(ratios, wide):
    square, second, third = make_anchors(level_sizes(D0, 3, 7), D0, aspect_ratios=ratios)[:3]
    np.testing.assert_allclose(square, (-12, -12, 20, 20), rtol=1e-6)
    np.testing.assert_allclose(second, wide, atol=5e-5)
    np.testing.assert_allclose(third[[1, 0, 3, 2]], wide, atol=5e-5)  # the same with its sides exchanged


def test_order_is_level_row_column_octave_ratio():
    anchors = make_anchors(((2, 3), (1, 1)), (64, 96), scale=1.0)
    assert anchors.shape == ((6 + 1) * 9, 4) and anchors.dtype == np.float32
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    first = [(16 + 32 * y, 16 + 32 * x) for y in range(2) for x in range(3)]
    np.testing.assert_allclose(centers, np.repeat([*first, (32, 48)], 9, axis=0), rtol=1e-5)
    height, width = (anchors[:9, 2:] - anchors[:9, :2]).T
    np.testing.assert_allclose(np.sqrt(height * width), 32 * np.repeat(2 ** (np.arange(3) / 3), 3), rtol=1e-6)
    np.testing.assert_allclose(width / height, np.tile([1, 2, 0.5], 3), rtol=1e-5)


def test_stride_is_the_ratio_of_image_to_feature_size():
    # Lite0: P7 of 320 pixels has 3 rows, so its stride is 106.67 and not 128 (docs/reference.md, Anchors).
    assert level_sizes((320, 320), 3, 7) == ((40, 40), (20, 20), (10, 10), (5, 5), (3, 3))
    anchors = make_anchors(level_sizes((320, 320), 3, 7), (320, 320), scale=3.0)
    first_of_p7 = anchors[-81]
    np.testing.assert_allclose(first_of_p7, np.array([-1, -1, 2, 2]) * 320 / 3, rtol=1e-5)


def test_strides_may_differ_per_axis():
    # 65 x 97: P3 has 9 rows and 13 columns.
    (anchor, *_) = make_anchors(level_sizes((65, 97), 3, 3), (65, 97), scale=4.0)
    y, x = 65 / 9, 97 / 13
    np.testing.assert_allclose(anchor, (-1.5 * y, -1.5 * x, 2.5 * y, 2.5 * x), rtol=1e-6)


@given(st.integers(1, 3000), st.integers(3, 9))
def test_each_level_is_half_of_the_one_below_rounded_up(size, max_level):
    ((height, width),) = level_sizes((size, 2 * size), max_level, max_level)
    assert (height, width) == (-(-size // 2**max_level), -(-2 * size // 2**max_level))


@pytest.mark.parametrize(('size', 'scale', 'ratios'), [((128, 160), 4.0, SQRT_RATIOS), ((100, 65), 1.5, PAIR_RATIOS)])
def test_the_best_iou_is_that_of_all_anchors_tried(size, scale, ratios):
    rng = np.random.default_rng(0)
    center_M2, side_M2 = rng.uniform(0, size, (300, 2)), np.exp(rng.uniform(0, 5.5, (300, 2)))
    boxes = np.concatenate([center_M2 - side_M2 / 2, center_M2 + side_M2 / 2], axis=1).astype(np.float32)
    levels = level_sizes(size, 3, 7)
    anchors = make_anchors(levels, size, scale, aspect_ratios=ratios)
    tried = np.asarray(box_ops.iou(jnp.asarray(anchors)[None], jnp.asarray(boxes)[:, None])).max(1)
    np.testing.assert_allclose(best_ious(boxes, levels, size, scale, aspect_ratios=ratios), tried, atol=1e-5)
