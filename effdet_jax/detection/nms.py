"""Non-maximum suppression, hard and Gaussian soft, with static shapes (docs/reference.md, Postprocessing)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.detection import boxes as box_ops
from effdet_jax.kernels.loops import max_and_argmax

Number = float | Float[Array, '']  # an Array, where it is to change without another compilation


class Selection(NamedTuple):
    """What NMS kept, best first; unused places have index -1 and score 0."""

    indices: Int[Array, 'K']
    scores: Float[Array, 'K']  # decayed, in the soft kind


def nms(
    boxes: Float[Array, 'N 4'],
    scores: Float[Array, 'N'],
    classes: Int[Array, 'N'],
    *,
    kind: str,
    iou_threshold: Number = 0.5,
    sigma: Number = 0.5,
    score_threshold: Number = 0.001,
    max_outputs: int = 100,
) -> Selection:
    """Greedy NMS of one image: take the best score above `score_threshold` (the first on ties), then weaken its rivals.

    Rivals are boxes of the same class; give all the same class for a class-agnostic pass. kind 'hard' removes rivals
    with an IoU above `iou_threshold`; kind 'gaussian' multiplies every rival's score by exp(-IoU^2 / sigma) (Bodla et
    al. 2017, equation 3), so boxes fade rather than vanish and the IoU threshold plays no part.

    Raises:
      ValueError: for another kind.
    """
    if kind not in ('hard', 'gaussian'):
        raise ValueError(f'nms kind {kind!r} is unknown: choose hard or gaussian')

    def select(place: Array, state: tuple[Array, Selection]) -> tuple[Array, Selection]:
        left_N, kept = state
        score, best = max_and_argmax(left_N)
        valid = score > score_threshold
        iou_N = jnp.where(classes == classes[best], box_ops.iou(boxes, boxes[best]), 0)
        if kind == 'hard':
            left_N = jnp.where(iou_N > iou_threshold, -jnp.inf, left_N)
        else:
            left_N = left_N * jnp.exp(-(iou_N**2) / sigma)
        kept = Selection(
            kept.indices.at[place].set(jnp.where(valid, best, -1)),
            kept.scores.at[place].set(jnp.where(valid, score, 0)),
        )
        return left_N.at[best].set(-jnp.inf), kept

    empty = Selection(jnp.full(max_outputs, -1, jnp.int32), jnp.zeros(max_outputs, scores.dtype))
    return jax.lax.fori_loop(0, max_outputs, select, (scores, empty))[1]
