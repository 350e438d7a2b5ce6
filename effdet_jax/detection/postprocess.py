"""Raw predictions -> detections, the one way that evaluation, prediction and export share (spec 10)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.detection import boxes as box_ops
from effdet_jax.detection import nms as suppression


class Detections(NamedTuple):
    """Detections of one image, best first; unused places have score 0 and label -1."""

    boxes: Float[Array, '*b K 4']  # yxyx, pixels of the network input
    scores: Float[Array, '*b K']
    labels: Int[Array, '*b K']  # 0-based


def postprocess(
    class_logits: Float[Array, 'N K'],
    box_regressions: Float[Array, 'N 4'],
    anchors: Float[Array, 'N 4'],
    valid_size: Float[Array, '2'] | Int[Array, '2'],
    *,
    per_class: bool = True,
    max_candidates: int = 5000,
    **nms_options,
) -> Detections:
    """Detections of one image; `vmap` it over a batch. `nms_options` are those of `nms.nms`.

    `per_class` keeps the best `max_candidates` pairs of anchor and class, so an anchor may speak for several classes,
    and boxes suppress their own class only. Otherwise each anchor speaks for its best class and all boxes are rivals.
    Boxes are cut at `valid_size`, the height and width of the picture inside the padded input; those that lie in the
    padding are dropped.
    """
    num_anchors, num_classes = class_logits.shape
    anchors = jnp.asarray(anchors)
    if per_class:
        logits_C, anchor_C, label_C = best_pairs(class_logits, min(max_candidates, num_anchors * num_classes))
        rivals_C = label_C
    else:
        logits_C, anchor_C = jax.lax.top_k(class_logits.max(axis=-1), min(max_candidates, num_anchors))
        label_C = class_logits[anchor_C].argmax(axis=-1)
        rivals_C = jnp.zeros_like(label_C)
    boxes_C4 = box_ops.decode(box_regressions[anchor_C], anchors[anchor_C])
    # Out before suppression: what lies in the padding, is too large for float32 to have an IoU, or is no number.
    height, width = valid_size.astype(jnp.float32)
    cut_C4 = box_ops.clip(boxes_C4, height, width)
    sound_C = (box_ops.areas(cut_C4) > 0) & jnp.isfinite(box_ops.areas(boxes_C4)) & ~jnp.isnan(logits_C)
    scores_C = jnp.where(sound_C, jax.nn.sigmoid(logits_C), -jnp.inf)

    kept = suppression.nms(jnp.where(sound_C[:, None], boxes_C4, 0), scores_C, rivals_C, **nms_options)
    used_K = kept.indices >= 0
    return Detections(
        cut_C4[kept.indices] * used_K[:, None],
        kept.scores,
        jnp.where(used_K, label_C[kept.indices], -1).astype(jnp.int32),
    )


def best_pairs(
    class_logits: Float[Array, 'N K'], count: int
) -> tuple[Float[Array, 'C'], Int[Array, 'C'], Int[Array, 'C']]:
    """(logits, anchors, classes) of the `count` best pairs of anchor and class, best first, the first of equals first.

    Of so many pairs at most so many anchors are part, and these are the ones with the largest maxima. To look for them
    first leaves few pairs to look through, and finds the same. Moreover so many pairs are at least as good as the least
    of these maxima: the others are out, and a search is quicker the fewer there are to choose from.
    """
    num_anchors, num_classes = class_logits.shape
    maxima_A, anchor_A = jax.lax.top_k(class_logits.max(axis=-1), min(count, num_anchors))
    anchor_A = jnp.sort(anchor_A)  # in their old order, so that equals stay in theirs
    logits_P = class_logits[anchor_A].reshape(-1)
    if count <= num_anchors:
        # Not maxima_A[-1], the same: XLA would take the slice for a reason to sort them all.
        logits_P = jnp.where(logits_P < maxima_A.min(), -jnp.inf, logits_P)
    logits_C, indices_C = jax.lax.top_k(logits_P, count)
    return logits_C, anchor_A[indices_C // num_classes], indices_C % num_classes
