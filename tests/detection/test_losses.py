import inspect

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effdet_jax.configs import default
from effdet_jax.detection.assignment import assign
from effdet_jax.detection.losses import IOU_PENALTIES, focal_loss, huber_loss, iou_loss


@pytest.fixture(scope='module')
def golden():
    return goldens.load('targets_and_losses')


@pytest.mark.parametrize('smoothing', [0, 0.1])
def test_focal_loss_equals_the_official_one(golden, smoothing):
    normalizer = golden['num_positives'].sum() + 1
    logits, classes = jnp.asarray(golden['class_logits']), jnp.asarray(golden['class_targets'])
    loss = focal_loss(logits, classes, alpha=0.25, gamma=1.5, label_smoothing=float(smoothing)).sum() / normalizer
    assert float(loss) == pytest.approx(float(golden[f'focal_loss_ls{smoothing}']), rel=1e-5)


def test_box_loss_equals_the_official_one(golden):
    normalizer = golden['num_positives'].sum() + 1
    loss = huber_loss(jnp.asarray(golden['box_regressions']), jnp.asarray(golden['box_targets']), delta=0.1)
    assert float(loss.sum() / (4 * normalizer)) == pytest.approx(float(golden['box_loss']), rel=1e-5)


@pytest.fixture(scope='module')
def logits_and_classes():
    rng = np.random.default_rng(0)
    return rng.normal(0, 4, (50, 3)).astype(np.float32), rng.integers(-1, 3, 50).astype(np.int32)


@pytest.mark.parametrize(('alpha', 'gamma', 'smoothing'), [(0.25, 1.5, 0.0), (0.25, 1.5, 0.1), (0.4, 0.0, 0.2)])
def test_focal_loss_equals_its_formula_in_double_precision(logits_and_classes, alpha, gamma, smoothing):
    logits, classes = logits_and_classes
    x, y = logits.astype(np.float64), (classes[:, None] == np.arange(3)).astype(np.float64)
    p, smooth = 1 / (1 + np.exp(-x)), y * (1 - smoothing) + 0.5 * smoothing
    p_t, alpha_t = y * p + (1 - y) * (1 - p), y * alpha + (1 - y) * (1 - alpha)
    expected = alpha_t * (1 - p_t) ** gamma * -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p))
    ours = focal_loss(jnp.asarray(logits), jnp.asarray(classes), alpha, gamma, smoothing)
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


def test_focal_loss_with_gamma_2_equals_optax(logits_and_classes):
    logits, classes = map(jnp.asarray, logits_and_classes)
    expected = optax.losses.sigmoid_focal_loss(logits, jax.nn.one_hot(classes, 3), alpha=0.25, gamma=2.0)
    np.testing.assert_allclose(focal_loss(logits, classes, 0.25, 2.0), expected, rtol=1e-4, atol=1e-9)


def test_huber_by_hand():
    targets = jnp.asarray([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    errors = jnp.asarray([[0.05, -0.05, 0.3, -0.3], [0.1, 5.0, -0.1, np.nan]])
    small, large, edge = 0.5 * 0.05**2, 0.1 * 0.3 - 0.5 * 0.1**2, 0.5 * 0.1**2
    # A coordinate whose target is exactly zero counts nothing, whatever is predicted.
    np.testing.assert_allclose(
        huber_loss(targets + errors, targets, 0.1), [[small, small, large, large], [edge, 0, edge, 0]], rtol=1e-4
    )


def test_huber_with_delta_1_is_smooth_l1():
    error = np.random.default_rng(0).normal(0, 2, (40, 4)).astype(np.float32)
    expected = np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5)
    ones = jnp.ones((40, 4))
    np.testing.assert_allclose(huber_loss(ones + error, ones, 1.0), expected, rtol=1e-4, atol=1e-6)


def decode(regressions, anchors):
    """float64 (y1, x1, y2, x2), each [n]."""
    (ty, tx, th, tw), (y1, x1, y2, x2) = regressions.T.astype(np.float64), anchors.T.astype(np.float64)
    h, w = (y2 - y1) * np.exp(th), (x2 - x1) * np.exp(tw)
    y, x = (y1 + y2) / 2 + ty * (y2 - y1), (x1 + x2) / 2 + tx * (x2 - x1)
    return y - h / 2, x - w / 2, y + h / 2, x + w / 2


def penalty(kind, regressions, targets, anchors, weight=None):
    """The published formulas in float64, box by box; and CIoU's weight, which the gradient treats as a constant."""
    a, b = decode(regressions, anchors), decode(targets, anchors)
    inner = [np.maximum(a[0], b[0]), np.maximum(a[1], b[1]), np.minimum(a[2], b[2]), np.minimum(a[3], b[3])]
    outer = [np.minimum(a[0], b[0]), np.minimum(a[1], b[1]), np.maximum(a[2], b[2]), np.maximum(a[3], b[3])]
    shared = np.maximum(inner[2] - inner[0], 0) * np.maximum(inner[3] - inner[1], 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    iou = shared / union
    hull = (outer[2] - outer[0]) * (outer[3] - outer[1])
    distance = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    diou = 1 - iou + distance / ((outer[2] - outer[0]) ** 2 + (outer[3] - outer[1]) ** 2)
    angles = [np.arctan((box[3] - box[1]) / (box[2] - box[0])) for box in (a, b)]
    v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    weight = v / (1 - iou + v) if weight is None else weight
    return {'iou': 1 - iou, 'giou': 1 - iou + (hull - union) / hull, 'diou': diou, 'ciou': diou + weight * v}[
        kind
    ], weight


@pytest.fixture(scope='module')
def pairs():
    """Predictions, targets and anchors: boxes that overlap much, a little, and (the last five) not at all."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (30, 2))
    anchors = np.concatenate([corners, corners + rng.uniform(5, 60, (30, 2))], axis=1)
    targets = rng.normal(0, 0.3, (30, 4))
    predictions = targets + rng.normal(0, 0.2, (30, 4))
    predictions[-5:, :2] += 4
    return tuple(a.astype(np.float32) for a in (predictions, targets, anchors))


@pytest.mark.parametrize('kind', IOU_PENALTIES)
def test_iou_losses_equal_their_formulas_and_gradients(kind, pairs):
    predictions, targets, anchors = pairs

    def total(predictions):
        losses = iou_loss(predictions, jnp.asarray(targets), jnp.asarray(anchors), kind)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(jnp.asarray(predictions))
    expected, weight = penalty(kind, predictions, targets, anchors)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    step = 1e-5
    for j in range(4):
        nudge = np.eye(4)[j] * step
        ahead, behind = (penalty(kind, predictions + s * nudge, targets, anchors, weight)[0] for s in (1, -1))
        np.testing.assert_allclose(gradient[:, j], (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', IOU_PENALTIES)
def test_iou_losses_of_equal_boxes_are_zero_and_background_counts_nothing(kind, pairs):
    _, targets, anchors = map(jnp.asarray, pairs)
    targets = targets.at[::2].set(0.0)  # background
    predictions = targets.at[::2].set(50.0)  # there, anything; e^50 overflows an area

    def total(predictions):
        losses = iou_loss(predictions, targets, anchors, kind)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(predictions)
    np.testing.assert_allclose(losses, np.zeros(30), atol=1e-5)
    np.testing.assert_array_equal(losses[::2], np.zeros(15))
    np.testing.assert_array_equal(gradient[::2], np.zeros((15, 4)))
    assert np.isfinite(gradient).all()


def test_penalties_of_boxes_far_apart():
    # Two unit squares whose centres lie 10 apart: nothing shared; the hull is 1 x 11, its diagonal squared 122.
    anchor = jnp.asarray([[0.0, 0, 1, 1]])
    prediction, target = jnp.asarray([[0.0, 10, 0, 0]]), jnp.asarray([[1e-30, 0, 0, 0]])
    losses = {kind: float(iou_loss(prediction, target, anchor, kind)[0]) for kind in IOU_PENALTIES}
    expected = {'iou': 1, 'giou': 1 + 9 / 11, 'diou': 1 + 100 / 122, 'ciou': 1 + 100 / 122}
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ('function', 'keys'),
    [
        (focal_loss, {'alpha': 'alpha', 'gamma': 'gamma', 'label_smoothing': 'label_smoothing'}),
        (huber_loss, {'delta': 'delta'}),
        (assign, {'threshold': 'match_threshold'}),
    ],
)
def test_defaults_are_those_of_the_config(function, keys):
    parameters, config = inspect.signature(function).parameters, default.get_config('d0').loss
    assert {name: parameters[name].default for name in keys} == {name: config[key] for name, key in keys.items()}
