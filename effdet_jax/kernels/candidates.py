"""The best candidates of an image, and detections among few of them. Definition: `detection.postprocess`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.kernels.selection import largest

FEW = 2000  # candidates, which nearly always settle the detections


def best_pairs(
    class_logits: Float[Array, 'N K'], count: int
) -> tuple[Float[Array, 'C'], Int[Array, 'C'], Int[Array, 'C']]:
    """The best pairs belong to at most `count` anchors, those with the largest maxima: only these are searched.

    All `count` pairs reach the least of these maxima. Logits below it are set to minus infinity, because a search is
    quicker the fewer there are to choose from.
    """
    num_anchors, num_classes = class_logits.shape
    maxima_N = class_logits.max(axis=-1)
    anchor_A = largest(maxima_N, min(count, num_anchors))  # in their old order, so that equals stay in theirs
    logits_P = class_logits[anchor_A].reshape(-1)
    if count <= num_anchors:
        logits_P = jnp.where(logits_P < maxima_N[anchor_A].min(), -jnp.inf, logits_P)
    logits_C, indices_C = jax.lax.top_k(logits_P, count)
    return logits_C, anchor_A[indices_C // num_classes], indices_C % num_classes


def few_first(
    detect: Callable[[Array, int], tuple[Any, Array]],
    class_logits: Float[Array, 'N K'],
    count: int,
    score_threshold: float | Float[Array, ''],
) -> Any:
    """`detect(class_logits, count)[0]`, mostly at the price of `detect(class_logits, FEW)`.

    `detect` returns detections and the scores of its candidates, both best first. NMS only lowers scores: where the
    last detection scores no less than the last of `FEW` candidates, the candidates behind them cannot change anything.
    """

    def among(count: int, class_logits: Array) -> tuple[Any, Array]:
        """The detections, and whether more candidates would leave them as they are."""
        detections, scores_C = detect(class_logits, count)
        return detections, (detections.scores[-1] >= scores_C[-1]) | (scores_C[-1] <= score_threshold)

    first = among(min(FEW, count), class_logits)
    if count <= FEW:
        return first[0]

    def among_all(state: tuple[Any, Array]) -> tuple[Any, Array]:
        # XLA would compute whatever does not depend on the loop's state ahead of the loop.
        return among(count, jnp.where(state[1], -jnp.inf, class_logits))[0], jnp.array(True)

    # A loop of one round or none: vmap would run both branches of a condition.
    return jax.lax.while_loop(lambda state: ~state[1], among_all, first)[0]
