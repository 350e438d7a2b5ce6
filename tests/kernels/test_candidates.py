"""Few candidates find what all of them do, and XLA searches no more than it has to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nms_oracle import random_boxes

from effdet_jax.detection.postprocess import best_pairs, postprocess
from effdet_jax.kernels import candidates
from effdet_jax.runtime import xla

ANCHORS, CLASSES = 30, 4
VALID_SIZE = np.array([25, 18])


@pytest.mark.slow
@pytest.mark.parametrize('few', [10, 60])
@pytest.mark.parametrize('per_class', [True, False])
@pytest.mark.parametrize('kind', ['hard', 'gaussian'])
def test_few_candidates_find_what_all_of_them_do(kind, per_class, few, monkeypatch):
    """Images for which the few settle it and others, in one batch and each alone."""
    rng = np.random.default_rng(0)
    anchors = random_boxes(rng, 100)
    logits = rng.normal(-1, 2, (12, 100, CLASSES)).astype(np.float32)
    regressions = rng.normal(0, 0.2, (12, 100, 4)).astype(np.float32)
    options = {'kind': kind, 'per_class': per_class, 'iou_threshold': 0.3, 'score_threshold': 0.3, 'max_outputs': 10}

    def detect(logits, regressions):
        return postprocess(logits, regressions, jnp.asarray(anchors), jnp.asarray(VALID_SIZE), **options)

    every = jax.jit(jax.vmap(detect))(logits, regressions)
    monkeypatch.setattr(candidates, 'FEW', few)
    together = jax.jit(jax.vmap(lambda *images: detect(*images)))(logits, regressions)
    detect_one = jax.jit(lambda *image: detect(*image))
    alone = [detect_one(*image) for image in zip(logits, regressions, strict=True)]
    for found in (together, jax.tree.map(lambda *columns: np.stack(columns), *alone)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, every)

    values = logits.reshape(len(logits), -1) if per_class else logits.max(axis=-1)
    last = 1 / (1 + np.exp(-np.sort(values)[:, -few]))
    settled = (every.scores[:, -1] >= last) | (last <= 0.3)
    assert settled.any() if few == 60 else not settled.all()


def test_where_few_candidates_settle_it_the_others_are_not_looked_for():
    """XLA moves what does not depend on a loop's state ahead of it, where it always runs."""

    def detect(logits, regressions):
        return postprocess(logits, regressions, jnp.ones((2000, 4)), jnp.array([9, 9]), kind='hard')

    lowered = xla.jit(jax.vmap(detect)).lower(np.zeros((1, 2000, 3)), np.zeros((1, 2000, 4)))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="TopK"') == 2
    assert text[text.index('\nENTRY') :].count('custom_call_target="TopK"') == 1


@pytest.mark.parametrize('count', [1, 7, 60, ANCHORS * CLASSES])
def test_the_best_pairs_are_those_of_a_search_through_all(count):
    """Logits of a few values, so that most tie: equals stay in order."""
    logits = np.random.default_rng(count).integers(0, 4, (ANCHORS, CLASSES)).astype(np.float32)
    found = jax.jit(best_pairs, static_argnums=1)(logits, count)
    np.testing.assert_array_equal(found, best_pairs.__wrapped__(jnp.asarray(logits), count))


def test_a_search_for_few_pairs_does_not_sort_all():
    """XLA's selection is many times quicker than its sort, and small changes around it lead to the latter."""
    logits = np.zeros((1, 49104, 90), np.float32)
    text = xla.jit(jax.vmap(lambda x: best_pairs(x, 5000))).lower(logits).compile().as_text()
    assert text.count('custom_call_target="TopK"') == 1
    assert not re.findall(r' sort\(', text)
