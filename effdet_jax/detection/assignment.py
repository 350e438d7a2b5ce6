"""Which anchor answers for which box (docs/reference.md, Assignment). One image; `vmap` it over a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.detection import boxes as box_ops

BACKGROUND = -1  # class target of an anchor without a box


class Targets(NamedTuple):
    """Training targets of one image."""

    classes: Int[Array, 'N']  # 0-based; BACKGROUND
    regressions: Float[Array, 'N 4']  # zero where there is no box
    num_positives: Float[Array, '']


def match(
    anchors: Float[Array, 'N 4'], boxes: Float[Array, 'M 4'], labels: Int[Array, 'M'], threshold: float = 0.5
) -> Int[Array, 'N']:
    """Index of the box each anchor answers for, or -1.

    An anchor takes the box that it overlaps most (the first on ties) if their IoU reaches `threshold`. Each box
    moreover claims the anchor that overlaps it most (the first on ties), whatever their IoU; of several claims the
    first wins. Rows with label -1 are padding. Boxes are visited one after the other, so memory is O(N), never N x M.
    """
    num_anchors, num_boxes = anchors.shape[0], boxes.shape[0]
    if num_boxes == 0:
        return jnp.full(num_anchors, -1, jnp.int32)

    def visit(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best_iou_N, best_N, claims_N = state
        iou_N = jnp.where(labels[index] >= 0, box_ops.iou(anchors, boxes[index]), -1.0)
        better_N = iou_N > best_iou_N
        # Padding claims the anchor N, which does not exist: such an update is dropped.
        claimed = jnp.where(labels[index] >= 0, jnp.argmax(iou_N), num_anchors)
        return (
            jnp.where(better_N, iou_N, best_iou_N),
            jnp.where(better_N, index, best_N),
            claims_N.at[claimed].min(index, mode='drop'),
        )

    # The loop ends with the last box: most rows are padding.
    stop = jnp.max(jnp.where(labels >= 0, jnp.arange(1, num_boxes + 1), 0), initial=0)
    start = (
        jnp.full(num_anchors, -1.0),
        jnp.full(num_anchors, -1, jnp.int32),
        jnp.full(num_anchors, num_boxes, jnp.int32),
    )
    best_iou_N, best_N, claims_N = jax.lax.fori_loop(0, stop, visit, start)
    return jnp.where(claims_N < num_boxes, claims_N, jnp.where(best_iou_N >= threshold, best_N, -1))


def assign(
    anchors: Float[Array, 'N 4'], boxes: Float[Array, 'M 4'], labels: Int[Array, 'M'], threshold: float = 0.5
) -> Targets:
    """Class and regression targets of every anchor for boxes yxyx with 0-based labels (-1 pads)."""
    matched_N = match(anchors, boxes, labels, threshold)
    positive_N = matched_N >= 0
    if boxes.shape[0] == 0:
        return Targets(matched_N, jnp.zeros_like(anchors), jnp.zeros(()))
    # Background rows are encoded against themselves: zero, and no logarithm of a padding box.
    boxes_N4 = jnp.where(positive_N[:, None], boxes[matched_N], anchors)
    regressions_N4 = jnp.where(positive_N[:, None], box_ops.encode(boxes_N4, anchors), 0)
    classes_N = jnp.where(positive_N, labels[matched_N], BACKGROUND)
    return Targets(classes_N.astype(jnp.int32), regressions_N4, positive_N.sum(dtype=jnp.float32))
