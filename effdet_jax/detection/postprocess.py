"""Raw predictions -> detections (docs/reference.md, Postprocessing), for evaluation, prediction and export alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.detection import boxes as box_ops
from effdet_jax.detection import nms as suppression
from effdet_jax.kernels import candidates
from effdet_jax.kernels.candidates import few_first
from effdet_jax.kernels.dispatch import runs_as


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
    score_threshold: suppression.Number = 0.001,
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
    height, width = valid_size.astype(jnp.float32)

    def detect(class_logits: Array, count: int) -> tuple[Detections, Float[Array, 'C']]:
        """Detections among the `count` best candidates, and the scores of these."""
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
        detections = Detections(
            cut_C4[kept.indices] * used_K[:, None],
            kept.scores,
            jnp.where(used_K, label_C[kept.indices], -1).astype(jnp.int32),
        )
        return detections, scores_C

    count = min(max_candidates, num_anchors * num_classes if per_class else num_anchors)
    return few_first(detect, class_logits, count, score_threshold)


@runs_as(candidates.best_pairs)
def best_pairs(
    class_logits: Float[Array, 'N K'], count: int
) -> tuple[Float[Array, 'C'], Int[Array, 'C'], Int[Array, 'C']]:
    """(logits, anchors, classes) of the `count` best pairs of anchor and class, best first, equals in order."""
    logits_C, indices_C = jax.lax.top_k(class_logits.reshape(-1), count)
    return logits_C, *jnp.divmod(indices_C, class_logits.shape[1])
