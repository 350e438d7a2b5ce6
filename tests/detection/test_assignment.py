import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdet_jax.detection import boxes as box_ops
from effdet_jax.detection.assignment import assign, match

NUM_ANCHORS, NUM_BOXES = 12, 5
match_all = jax.jit(match)


def padded(boxes, labels, rows):
    """Boxes and 0-based labels filled up with rows of -1."""
    missing = ((0, rows - len(labels)), (0, 0))
    return np.pad(boxes, missing, constant_values=-1), np.pad(labels, missing[0], constant_values=-1)


@pytest.fixture(scope='module')
def golden():
    return goldens.load('targets_and_losses')


@pytest.fixture(scope='module')
def targets(golden):
    images = [padded(golden[f'boxes_yxyx_{i}'], golden[f'labels_{i}'] - 1, rows=13) for i in range(3)]
    boxes_BM4, labels_BM = (jnp.asarray(np.stack(rows)) for rows in zip(*images, strict=True))
    return jax.jit(jax.vmap(assign, (None, 0, 0)))(jnp.asarray(golden['anchors_yxyx']), boxes_BM4, labels_BM)


def test_equals_the_official_targets(golden, targets):
    np.testing.assert_array_equal(targets.classes, golden['class_targets'])
    np.testing.assert_allclose(targets.regressions, golden['box_targets'], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(targets.num_positives, golden['num_positives'])


def iou_matrix(anchors, boxes):
    a, b = anchors[:, None], boxes[None]
    shared = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return shared / union


def match_by_matrix(anchors, boxes, labels, threshold=0.5):
    """The rule of (docs/reference.md, Assignment), said with the whole IoU matrix."""
    real = np.flatnonzero(labels >= 0)
    matched = np.full(len(anchors), -1)
    if len(real) == 0:
        return matched
    iou = iou_matrix(anchors, boxes[real])
    matched = np.where(iou.max(1) >= threshold, real[iou.argmax(1)], -1)
    for column in reversed(range(len(real))):  # the first box has the last word
        matched[iou[:, column].argmax()] = real[column]
    return matched


def grid_boxes(count):
    """Boxes with corners on a coarse grid: many ties, duplicates, and IoUs of exactly one half."""
    corners = hnp.arrays(np.float32, (count, 4), elements=st.integers(0, 6).map(float))
    return corners.map(
        lambda c: np.concatenate([np.minimum(c[:, :2], c[:, 2:]), np.maximum(c[:, :2], c[:, 2:]) + 1], 1)
    )


@settings(max_examples=200, deadline=None)
@given(
    grid_boxes(NUM_ANCHORS),
    grid_boxes(NUM_BOXES),
    hnp.arrays(np.int32, NUM_BOXES, elements=st.integers(-1, 2)),  # padding may stand between the boxes
)
def test_equals_the_rule_on_the_whole_matrix(anchors, boxes, labels):
    ours = match_all(jnp.asarray(anchors), jnp.asarray(boxes), jnp.asarray(labels))
    np.testing.assert_array_equal(ours, match_by_matrix(anchors, boxes, labels))


ANCHORS = np.array([[0, 0, 10, 10], [0, 0, 10, 20], [50, 50, 60, 60], [80, 80, 90, 90]], np.float32)


@pytest.mark.parametrize(
    ('boxes', 'matched'),
    [
        pytest.param([[0, 0, 10, 10]], [0, 0, -1, -1], id='the best anchor, and one with an IoU of exactly one half'),
        pytest.param([[53, 53, 59, 58]], [-1, -1, 0, -1], id='the best anchor, although its IoU is only 0.3'),
        pytest.param([[50, 50, 60, 60]] * 2, [-1, -1, 0, -1], id='of two equal boxes the first'),
        pytest.param([[200, 200, 210, 210]], [0, -1, -1, -1], id='a box that no anchor meets claims the first anchor'),
        pytest.param([[0, 0, 10, 9], [0, 0, 10, 6]], [0, -1, -1, -1], id='of two claims on one anchor the first'),
        pytest.param([[0, 0, 10, 6], [0, 0, 10, 9]], [0, -1, -1, -1], id='even where the second overlaps it more'),
        pytest.param([[0, 0, 5, 5]], [0, -1, -1, -1], id='of anchors that overlap equally the first'),
    ],
)
def test_by_hand(boxes, matched):
    labels = jnp.zeros(len(boxes), jnp.int32)
    np.testing.assert_array_equal(match(jnp.asarray(ANCHORS), jnp.asarray(boxes, jnp.float32), labels), matched)


@pytest.mark.parametrize('rows', [0, 3])
def test_image_without_objects_has_only_background(rows):
    targets = assign(jnp.asarray(ANCHORS), jnp.full((rows, 4), -1.0), jnp.full(rows, -1))
    np.testing.assert_array_equal(targets.classes, [-1] * 4)
    np.testing.assert_array_equal(targets.regressions, np.zeros((4, 4)))
    assert targets.num_positives == 0 and targets.num_positives.dtype == jnp.float32


def test_targets_follow_the_match():
    boxes = jnp.asarray([[0.0, 0, 10, 10], [-1, -1, -1, -1], [48, 50, 60, 60]])
    targets = assign(jnp.asarray(ANCHORS), boxes, jnp.asarray([4, -1, 0]))
    np.testing.assert_array_equal(targets.classes, [4, 4, 0, -1])
    expected = [[0, 0, 0, 0], [0, -0.25, 0, np.log(0.5)], [-0.1, 0, np.log(1.2), 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(targets.regressions, expected, rtol=1e-5, atol=1e-7)
    assert targets.num_positives == 3


def sizes_in(jaxpr):
    """Sizes of all values in a program, those inside its loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, 'jaxpr')):
            if hasattr(parameter, 'jaxpr'):
                yield from sizes_in(parameter.jaxpr)


def test_memory_never_holds_a_number_per_pair_of_anchor_and_box():
    anchors_N4, boxes_M4, labels_M = jnp.zeros((10_000, 4)), jnp.zeros((100, 4)), jnp.zeros(100, jnp.int32)
    pairs = len(anchors_N4) * len(boxes_M4)
    assert max(sizes_in(jax.make_jaxpr(assign)(anchors_N4, boxes_M4, labels_M).jaxpr)) == anchors_N4.size < pairs

    def by_matrix(carry, _):  # that the search would find the matrix, even in a loop
        return carry, box_ops.iou(anchors_N4[:, None], boxes_M4[None]).sum()

    loop = jax.make_jaxpr(lambda: jax.lax.scan(by_matrix, 0, length=2))().jaxpr
    assert max(sizes_in(loop)) >= pairs
