import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdet_jax.detection import boxes as box_ops

COUNT = 6  # boxes per example: one shape, so that nothing is compiled again
corners_6_2 = hnp.arrays(np.float32, (COUNT, 2), elements=st.floats(-50, 600, width=32))
sides_6_2 = hnp.arrays(np.float32, (COUNT, 2), elements=st.floats(0.5, 700, width=32))


@st.composite
def boxes_64(draw):
    corners, sides = draw(corners_6_2), draw(sides_6_2)
    return np.concatenate([corners, corners + sides], axis=1)


def iou_by_counting(a, b):
    """IoU of boxes with integer corners: cells of the grid that both, and that either, cover."""
    grid = np.zeros((2, 32, 32), bool)
    for covered, (y1, x1, y2, x2) in zip(grid, (a.astype(int), b.astype(int)), strict=True):
        covered[y1:y2, x1:x2] = True
    either = (grid[0] | grid[1]).sum()
    return (grid[0] & grid[1]).sum() / either if either else 0.0


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, (2, COUNT, 4), elements=st.integers(0, 31)))
def test_iou_is_shared_cells_over_covered_cells(corners):
    a, b = (np.concatenate([np.minimum(c[:, :2], c[:, 2:]), np.maximum(c[:, :2], c[:, 2:])], 1) for c in corners)
    expected = [iou_by_counting(*pair) for pair in zip(a, b, strict=True)]
    ours = box_ops.iou(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(boxes_64(), boxes_64())
def test_iou_is_symmetric_within_0_and_1_and_1_of_itself(a, b):
    a, b = jnp.asarray(a), jnp.asarray(b)
    iou_66 = box_ops.iou(a[:, None], b[None])
    assert iou_66.shape == (COUNT, COUNT)
    assert (iou_66 >= 0).all() and (iou_66 <= 1 + 1e-6).all()
    np.testing.assert_array_equal(iou_66, box_ops.iou(b[:, None], a[None]).T)
    np.testing.assert_allclose(box_ops.iou(a, a), np.ones(COUNT), rtol=1e-6)


def test_iou_of_boxes_without_area_is_0_and_has_a_finite_gradient():
    point, box, inverted = jnp.asarray([[5.0, 5, 5, 5], [0, 0, 10, 10], [8, 8, 2, 2]])
    for a, b in ((point, box), (point, point), (inverted, box), (inverted, inverted)):
        value, gradient = jax.value_and_grad(box_ops.iou)(a, b)
        assert value == 0 and np.isfinite(gradient).all()
    np.testing.assert_array_equal(box_ops.areas(jnp.stack([point, box, inverted])), [0, 100, 0])


@settings(max_examples=60, deadline=None)
@given(boxes_64(), boxes_64())
def test_decode_inverts_encode(boxes, anchors):
    boxes, anchors = jnp.asarray(boxes), jnp.asarray(anchors)
    decoded = box_ops.decode(box_ops.encode(boxes, anchors), anchors)
    # Corners are differences of numbers up to 1,300, of which float32 keeps seven digits.
    np.testing.assert_allclose(decoded, boxes, rtol=1e-5, atol=5e-3)


def test_encoding_by_hand():
    anchor, box = jnp.asarray([10.0, 20, 30, 60]), jnp.asarray([20.0, 20, 60, 40])
    # centres (20, 40) and (40, 30), sides (20, 40) and (40, 20)
    np.testing.assert_allclose(box_ops.encode(box, anchor), [1.0, -0.25, np.log(2), np.log(0.5)], rtol=1e-6)
    np.testing.assert_allclose(box_ops.decode(jnp.zeros(4), anchor), anchor)


def test_encoding_a_box_without_area_is_finite():
    encoded = box_ops.encode(jnp.asarray([5.0, 5, 5, 5]), jnp.asarray([0.0, 0, 10, 10]))
    np.testing.assert_allclose(encoded, [0, 0, np.log(1e-9), np.log(1e-9)], rtol=1e-5)


def test_clip():
    boxes = jnp.asarray([[-5.0, -5, 50, 90], [10, 10, 20, 20], [70, 90, 99, 99]])
    np.testing.assert_array_equal(box_ops.clip(boxes, 60.0, 80.0), [[0, 0, 50, 80], [10, 10, 20, 20], [60, 80, 60, 80]])
