import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_oracle import random_boxes, slow_nms

from effdet_jax.detection.nms import nms

OPTIONS = ('kind', 'iou_threshold', 'sigma', 'score_threshold', 'max_outputs')
select = jax.jit(nms, static_argnames=OPTIONS)


@pytest.mark.parametrize(
    ('kind', 'name', 'options'),
    [('gaussian', 'soft', {'sigma': 0.5, 'score_threshold': 0.001}), ('hard', 'hard', {'score_threshold': 0.05})],
)
def test_equals_the_official_selection(kind, name, options):
    golden = goldens.load('nms')
    boxes, scores = jnp.asarray(golden['boxes_yxyx']), jnp.asarray(golden['scores'])
    kept = select(boxes, scores, jnp.zeros(len(scores), jnp.int32), kind=kind, **options)
    count = len(golden[f'{name}_indices'])
    np.testing.assert_array_equal(kept.indices[:count], golden[f'{name}_indices'])
    np.testing.assert_allclose(kept.scores[:count], golden[f'{name}_scores'], rtol=1e-5)
    np.testing.assert_array_equal(kept.indices[count:], np.full(100 - count, -1))
    np.testing.assert_array_equal(kept.scores[count:], np.zeros(100 - count))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(['hard', 'gaussian']), st.integers(1, 4))
def test_equals_a_loop_over_lists(seed, kind, num_classes):
    rng = np.random.default_rng(seed)
    boxes, classes = random_boxes(rng, 40), rng.integers(0, num_classes, 40)
    # Hard scores may tie; decayed ones are told apart by rounding where they tie, so they must not.
    scores = rng.integers(0, 10, 40) / 10 if kind == 'hard' else rng.permutation(40) / 40 + rng.uniform(0, 0.01, 40)
    options = {'kind': kind, 'score_threshold': 0.05, 'max_outputs': 25}
    kept = select(jnp.asarray(boxes), jnp.asarray(scores, jnp.float32), jnp.asarray(classes, jnp.int32), **options)
    indices, decayed = slow_nms(boxes, scores, classes, **options)
    np.testing.assert_array_equal(kept.indices, indices)
    np.testing.assert_allclose(kept.scores, decayed, rtol=1e-4)


BOXES = jnp.asarray([[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 10], [50, 50, 60, 60]])  # 0 and 1: IoU one half
ONE_CLASS = jnp.zeros(4, jnp.int32)


def test_thresholds_are_strict():
    scores = jnp.asarray([0.75, 0.5, 0.25, 0.125])
    # An IoU of exactly the threshold does not suppress; a score of exactly the threshold is not kept.
    kept = select(BOXES, scores, ONE_CLASS, kind='hard', iou_threshold=0.5, score_threshold=0.125, max_outputs=5)
    np.testing.assert_array_equal(kept.indices, [0, 1, -1, -1, -1])
    kept = select(BOXES, scores, ONE_CLASS, kind='hard', iou_threshold=0.4999, score_threshold=0.1, max_outputs=5)
    np.testing.assert_array_equal(kept.indices, [0, 3, -1, -1, -1])


def test_first_of_equal_scores_wins():
    kept = select(BOXES, jnp.full(4, 0.5), ONE_CLASS, kind='hard', max_outputs=5)
    np.testing.assert_array_equal(kept.indices, [0, 1, 3, -1, -1])


def test_gaussian_decay_by_hand():
    kept = select(BOXES, jnp.asarray([0.9, 0.8, 0.7, 0.1]), ONE_CLASS, kind='gaussian', sigma=0.5, max_outputs=5)
    second = 0.8 * np.exp(-(0.5**2) / 0.5)
    # The copy of the best box has met an IoU of one, then, with the second box, of one half; the far box nothing.
    copy = 0.7 * np.exp(-1 / 0.5) * np.exp(-(0.5**2) / 0.5)
    np.testing.assert_array_equal(kept.indices, [0, 1, 3, 2, -1])
    np.testing.assert_allclose(kept.scores, [0.9, second, 0.1, copy, 0], rtol=1e-6)


def test_other_classes_are_no_rivals():
    kept = select(BOXES, jnp.asarray([0.9, 0.8, 0.7, 0.6]), jnp.asarray([0, 1, 2, 0]), kind='gaussian', max_outputs=5)
    np.testing.assert_allclose(kept.scores, [0.9, 0.8, 0.7, 0.6, 0], rtol=1e-6)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'linear' is unknown: choose hard or gaussian"):
        nms(BOXES, jnp.ones(4), ONE_CLASS, kind='linear')
