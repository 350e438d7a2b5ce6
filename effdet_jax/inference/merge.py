"""Test-time augmentation: merges the boxes found in several views of an image. NumPy."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from effdet_jax.errors import UserError


class Boxes(NamedTuple):
    """Boxes of one image, best first."""

    boxes_xyxy: Float[np.ndarray, 'K 4']
    scores: Float[np.ndarray, 'K']
    labels: Int[np.ndarray, 'K']


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The views of an image: each scale of the network input and, with `flip`, its mirror image too.

    `merge` names one of `MERGES`, which treats boxes with an IoU above `iou_threshold` as one object.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    merge: str = 'wbf'
    iou_threshold: float = 0.55  # of Solovyev et al.

    def __post_init__(self) -> None:
        if not self.scales or any(not 0.1 <= scale <= 10 for scale in self.scales):
            raise UserError(f'input scales {self.scales} are out of range: give at least one, each in 0.1 .. 10')
        if self.merge not in MERGES:
            raise UserError(f'unknown merge {self.merge!r}: choose one of {", ".join(MERGES)}')

    @property
    def flips(self) -> tuple[bool, ...]:
        return (False, True) if self.flip else (False,)


def merge(views: Sequence[Boxes], augmentation: Augmentation) -> Boxes:
    """Merges the boxes of all views, given in pixels of one image; the result is sorted, best first."""
    boxes_M4, scores_M, labels_M = (np.concatenate(column) for column in zip(*views, strict=True))
    rule, threshold = MERGES[augmentation.merge], augmentation.iou_threshold
    parts = [
        (*rule(boxes_M4[of_class], scores_M[of_class], len(views), threshold), label)
        for label in np.unique(labels_M)
        for of_class in [labels_M == label]
    ]
    if not parts:
        return Boxes(boxes_M4, scores_M, labels_M)
    boxes_K4 = np.concatenate([boxes for boxes, _, _ in parts])
    scores_K = np.concatenate([scores for _, scores, _ in parts])
    labels_K = np.concatenate([np.full(len(scores), label, labels_M.dtype) for _, scores, label in parts])
    best = np.argsort(-scores_K, kind='stable')
    return Boxes(boxes_K4[best], scores_K[best], labels_K[best])


def weighted_box_fusion(
    boxes: Float[np.ndarray, 'M 4'], scores: Float[np.ndarray, 'M'], num_views: int, iou_threshold: float
) -> tuple[Float[np.ndarray, 'K 4'], Float[np.ndarray, 'K']]:
    """Averages overlapping boxes of one class (Solovyev, Wang, Gabruseva 2019, arXiv:1910.13302, section 2).

    In order of their scores, each box joins the cluster whose average box has the highest IoU with it, if that is above
    `iou_threshold`; otherwise it starts a new cluster. The average is weighted by the scores, which must be positive.
    Its score is the mean score times min(size of the cluster, num_views) / num_views (equation 5).
    """
    sums_C4, totals_C, counts_C = np.zeros((len(scores), 4)), np.zeros(len(scores)), np.zeros(len(scores))
    means_C4, used = np.zeros((len(scores), 4)), 0
    for m in np.argsort(-scores, kind='stable'):
        overlaps_C = _iou(means_C4[:used], boxes[m])
        cluster = int(overlaps_C.argmax()) if used else 0
        if used == 0 or overlaps_C[cluster] <= iou_threshold:
            cluster, used = used, used + 1
        counts_C[cluster] += 1
        totals_C[cluster] += scores[m]
        sums_C4[cluster] += scores[m] * boxes[m].astype(np.float64)
        means_C4[cluster] = sums_C4[cluster] / totals_C[cluster]
    support_C = np.minimum(counts_C[:used], num_views) / num_views
    return means_C4[:used].astype(np.float32), (totals_C[:used] / counts_C[:used] * support_C).astype(np.float32)


def hard_nms(
    boxes: Float[np.ndarray, 'M 4'], scores: Float[np.ndarray, 'M'], iou_threshold: float
) -> tuple[Float[np.ndarray, 'K 4'], Float[np.ndarray, 'K']]:
    """Keeps the best of boxes of one class that overlap with an IoU above `iou_threshold`."""
    left, kept = np.argsort(-scores, kind='stable'), []
    while len(left):
        kept.append(left[0])
        left = left[1:][_iou(boxes[left[1:]], boxes[left[0]]) <= iou_threshold]
    return boxes[kept], scores[kept]


MERGES: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {  # (boxes, scores, number of views, IoU)
    'wbf': weighted_box_fusion,
    'nms': lambda boxes, scores, num_views, iou_threshold: hard_nms(boxes, scores, iou_threshold),
}


def _iou(boxes_C4: np.ndarray, box_4: np.ndarray) -> np.ndarray:
    sides_C2 = np.minimum(boxes_C4[:, 2:], box_4[2:]) - np.maximum(boxes_C4[:, :2], box_4[:2])
    shared_C = np.maximum(sides_C2, 0).prod(axis=1)
    union_C = (boxes_C4[:, 2:] - boxes_C4[:, :2]).prod(axis=1) + (box_4[2:] - box_4[:2]).prod() - shared_C
    return shared_C / np.where(shared_C > 0, union_C, 1)
