import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nms_oracle import random_boxes, slow_nms

from effdet_jax.detection.postprocess import postprocess
from effdet_jax.detection.preprocess import normalize

ANCHORS, CLASSES = 30, 4
VALID_SIZE = np.array([25, 18])
OPTIONS = {'iou_threshold': 0.5, 'sigma': 0.5, 'score_threshold': 0.05, 'max_outputs': 20}


@functools.partial(jax.jit, static_argnames=('per_class', 'max_candidates', 'kind', *OPTIONS))
def run(logits, regressions, anchors, valid_size, **options):
    return postprocess(*map(jnp.asarray, (logits, regressions, anchors, valid_size)), **options)


def reference(logits, regressions, anchors, valid_size, per_class, max_candidates, **options):
    """The rules of (docs/reference.md, Postprocessing), candidate by candidate.

    What lies in the padding is out before suppression, so no gap is left.
    """
    pairs = [(a, c) for a in range(len(logits)) for c in range(logits.shape[1])]
    if not per_class:
        pairs = [(a, int(logits[a].argmax())) for a in range(len(logits))]
    pairs = sorted(pairs, key=lambda pair: -logits[pair])[:max_candidates]
    boxes = []
    for anchor, _ in pairs:
        y1, x1, y2, x2 = anchors[anchor].astype(np.float64)
        ty, tx, th, tw = regressions[anchor].astype(np.float64)
        h, w = (y2 - y1) * np.exp(th), (x2 - x1) * np.exp(tw)
        y, x = (y1 + y2) / 2 + ty * (y2 - y1), (x1 + x2) / 2 + tx * (x2 - x1)
        boxes.append((y - h / 2, x - w / 2, y + h / 2, x + w / 2))
    cut = np.clip(boxes, 0, np.tile(valid_size, 2))
    visible = (cut[:, 2:] > cut[:, :2]).all(axis=1)
    scores = [v / (1 + np.exp(-np.float64(logits[pair]))) for v, pair in zip(visible, pairs, strict=True)]
    indices, scores = slow_nms(boxes, scores, [c if per_class else 0 for _, c in pairs], **options)
    return [
        (cut[index], score, pairs[index][1]) if index >= 0 else (np.zeros(4), 0.0, -1)
        for index, score in zip(indices, scores, strict=True)
    ]


def test_a_box_too_large_for_float32_takes_nothing_along():
    found = by_hand([[4.0], [3.0], [2.0]], [[-3e38, -3e38, 3e38, 3e38], [0, 0, 9, 9], [10, 0, 19, 9]], kind='gaussian')
    np.testing.assert_array_equal(found.labels, [0, 0, -1, -1])


@pytest.fixture(scope='module')
def predictions():
    rng = np.random.default_rng(0)
    anchors = random_boxes(rng, ANCHORS)
    logits = rng.normal(-1, 2, (ANCHORS, CLASSES)).astype(np.float32)
    return logits, rng.normal(0, 0.2, (ANCHORS, 4)).astype(np.float32), anchors


@pytest.mark.parametrize('max_candidates', [15, 5000])
@pytest.mark.parametrize('per_class', [True, False])
@pytest.mark.parametrize('kind', ['hard', 'gaussian'])
def test_equals_the_rules_candidate_by_candidate(kind, per_class, max_candidates, predictions):
    options = OPTIONS | {'kind': kind, 'per_class': per_class, 'max_candidates': max_candidates}
    ours = run(*predictions, VALID_SIZE, **options)
    boxes, scores, labels = zip(*reference(*predictions, VALID_SIZE, **options), strict=True)
    assert np.count_nonzero(scores) > 3
    np.testing.assert_array_equal(ours.labels, labels)
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-4)
    np.testing.assert_allclose(ours.boxes, boxes, rtol=1e-4, atol=1e-4)


def by_hand(logits, boxes, **options):
    """Detections of boxes given outright: each is its own anchor."""
    options = OPTIONS | {'kind': 'hard', 'per_class': True, 'max_candidates': 100, 'max_outputs': 4} | options
    boxes = np.asarray(boxes, np.float32)
    return run(np.asarray(logits, np.float32), np.zeros_like(boxes), boxes, VALID_SIZE, **options)


def test_an_anchor_speaks_for_several_classes_or_for_its_best_one():
    logits, box = [[2.0, 1.0]], [[1, 2, 11, 12]]
    both, best = (by_hand(logits, box, per_class=per_class) for per_class in (True, False))
    np.testing.assert_array_equal(both.labels, [0, 1, -1, -1])
    np.testing.assert_allclose(both.scores, [0.880797, 0.731059, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(both.boxes, [[1, 2, 11, 12]] * 2 + [[0] * 4] * 2, rtol=1e-6)
    np.testing.assert_array_equal(best.labels, [0, -1, -1, -1])


def test_boxes_of_two_classes_are_rivals_only_without_per_class():
    logits, boxes = [[2.0, -9.0], [-9.0, 1.0]], [[0, 0, 10, 10], [0, 0, 10, 9]]
    np.testing.assert_array_equal(by_hand(logits, boxes, per_class=True).labels, [0, 1, -1, -1])
    np.testing.assert_array_equal(by_hand(logits, boxes, per_class=False).labels, [0, -1, -1, -1])


def test_boxes_are_cut_at_the_picture_and_those_in_the_padding_dropped():
    height, width = VALID_SIZE
    boxes = [[-4, -4, 5, 5], [20, 10, 30, 30], [0, width, 9, width + 9], [height + 1, 0, height + 9, 9]]
    found = by_hand([[4.0], [3.0], [2.0], [1.0]], boxes)
    np.testing.assert_allclose(found.boxes, [[0, 0, 5, 5], [20, 10, height, width], [0] * 4, [0] * 4], rtol=1e-6)
    np.testing.assert_array_equal(found.labels, [0, 0, -1, -1])
    assert (found.scores[2:] == 0).all()


def test_nothing_above_the_threshold_is_nothing_found():
    found = by_hand([[-9.0], [-9.0]], [[0, 0, 5, 5], [5, 5, 9, 9]])
    for values, empty in zip(found, (np.zeros((4, 4)), np.zeros(4), np.full(4, -1)), strict=True):
        np.testing.assert_array_equal(values, empty)


def test_mapped_over_a_batch(predictions):
    logits, regressions, anchors = map(jnp.asarray, predictions)
    one = functools.partial(postprocess, kind='gaussian', **OPTIONS)
    batch = jax.jit(jax.vmap(one, (0, 0, None, 0)))(
        jnp.stack([logits, -logits]), jnp.stack([regressions] * 2), anchors, jnp.asarray([VALID_SIZE, [9, 9]])
    )
    alone = jax.jit(one)(-logits, regressions, anchors, jnp.asarray([9, 9]))
    for a, b in zip(batch, alone, strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-5)


def test_normalize_is_the_mean_colour_outside_the_picture():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    expected = np.zeros((2, 5, 6, 3))
    valid_size = np.array([[5, 4], [2, 6]])
    for i, (height, width) in enumerate(valid_size):
        expected[i, :height, :width] = (images[i, :height, :width] - np.array(mean)) / std
    ours = normalize(jnp.asarray(images), jnp.asarray(valid_size), mean, std)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours[0, :, 4:] == 0).all() and (ours[1, 2:] == 0).all()


def test_a_logit_that_is_no_number_takes_nothing_along():
    found = by_hand([[np.nan], [3.0], [2.0]], [[0, 0, 5, 5], [0, 0, 9, 9], [10, 0, 19, 9]], kind='gaussian')
    np.testing.assert_array_equal(found.labels, [0, 0, -1, -1])
