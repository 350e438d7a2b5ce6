"""Raw predictions -> detections (docs/reference.md, Postprocessing), for evaluation, prediction and export alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.detection import boxes as box_ops
from effdet_jax.detection import nms as suppression
from effdet_jax.detection.selection import largest


class Detections(NamedTuple):
    """Detections of one image, best first; unused places have score 0 and label -1."""

    boxes: Float[Array, '*b K 4']  # yxyx, pixels of the network input
    scores: Float[Array, '*b K']
    labels: Int[Array, '*b K']  # 0-based


FEW = 2000  # candidates, which nearly always settle what is found


def postprocess(
    class_logits: Float[Array, 'N K'],
    box_regressions: Float[Array, 'N 4'],
    anchors: Float[Array, 'N 4'],
    valid_size: Float[Array, '2'] | Int[Array, '2'],
    *,
    per_class: bool = True,
    max_candidates: int = 5000,
    score_threshold: suppression.Number = 0.001,
    **nms_options,
) -> Detections:
    """Detections of one image; `vmap` it over a batch. `nms_options` are those of `nms.nms`.

    `per_class` keeps the best `max_candidates` pairs of anchor and class, so an anchor may speak for several classes,
    and boxes suppress their own class only. Otherwise each anchor speaks for its best class and all boxes are rivals.
    Boxes are cut at `valid_size`, the height and width of the picture inside the padded input; those that lie in the
    padding are dropped.

    Scores only fall. So where even the last box found has no less than the last of the best `FEW` candidates began
    with, those behind them cannot change anything; only where it has less are all candidates looked at.
    """
    num_anchors, num_classes = class_logits.shape
    anchors = jnp.asarray(anchors)
    height, width = valid_size.astype(jnp.float32)

    def among(count: int, class_logits: Array) -> tuple[Detections, Array]:
        """What is found among the `count` best candidates, and whether that is what is found among all."""
        if per_class:
            logits_C, anchor_C, label_C = best_pairs(class_logits, count)
            rivals_C = label_C
        else:
            logits_C, anchor_C = jax.lax.top_k(class_logits.max(axis=-1), count)
            label_C = class_logits[anchor_C].argmax(axis=-1)
            rivals_C = jnp.zeros_like(label_C)
        boxes_C4 = box_ops.decode(box_regressions[anchor_C], anchors[anchor_C])
        # Out before suppression: what lies in the padding, is too large for float32 to have an IoU, or is no number.
        cut_C4 = box_ops.clip(boxes_C4, height, width)
        sound_C = (box_ops.areas(cut_C4) > 0) & jnp.isfinite(box_ops.areas(boxes_C4)) & ~jnp.isnan(logits_C)
        scores_C = jax.nn.sigmoid(logits_C)

        kept = suppression.nms(
            jnp.where(sound_C[:, None], boxes_C4, 0), jnp.where(sound_C, scores_C, -jnp.inf), rivals_C,
            score_threshold=score_threshold, **nms_options,
        )  # fmt: skip
        used_K = kept.indices >= 0
        found = Detections(
            cut_C4[kept.indices] * used_K[:, None],
            kept.scores,
            jnp.where(used_K, label_C[kept.indices], -1).astype(jnp.int32),
        )
        return found, (kept.scores[-1] >= scores_C[-1]) | (scores_C[-1] <= score_threshold)

    most = min(max_candidates, num_anchors * num_classes if per_class else num_anchors)
    first = among(min(FEW, most), class_logits)
    if most <= FEW:
        return first[0]

    def among_all(state: tuple[Detections, Array]) -> tuple[Detections, Array]:
        # What does not depend on the loop's state XLA would compute ahead of it.
        return among(most, jnp.where(state[1], -jnp.inf, class_logits))[0], jnp.array(True)

    # A loop of one round or none: of a condition, vmap would run both branches.
    return jax.lax.while_loop(lambda state: ~state[1], among_all, first)[0]


def best_pairs(
    class_logits: Float[Array, 'N K'], count: int
) -> tuple[Float[Array, 'C'], Int[Array, 'C'], Int[Array, 'C']]:
    """(logits, anchors, classes) of the `count` best pairs of anchor and class, best first, the first of equals first.

    Of so many pairs at most so many anchors are part, and these are the ones with the largest maxima. To look for them
    first leaves few pairs to look through, and finds the same. Moreover so many pairs are at least as good as the least
    of these maxima: the others are out, and a search is quicker the fewer there are to choose from.
    """
    num_anchors, num_classes = class_logits.shape
    maxima_N = class_logits.max(axis=-1)
    anchor_A = largest(maxima_N, min(count, num_anchors))  # in their old order, so that equals stay in theirs
    logits_P = class_logits[anchor_A].reshape(-1)
    if count <= num_anchors:
        logits_P = jnp.where(logits_P < maxima_N[anchor_A].min(), -jnp.inf, logits_P)
    logits_C, indices_C = jax.lax.top_k(logits_P, count)
    return logits_C, anchor_A[indices_C // num_classes], indices_C % num_classes
