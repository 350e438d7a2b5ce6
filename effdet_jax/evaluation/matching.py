"""Which detection found which object, and what is wrong with the others: COCO's matching, TIDE's kinds of error."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

FOUND_IOU = 0.5  # an object is found from this overlap on (TIDE's t_f) ...
NEAR_IOU = 0.1  # ... and below this one a box has nothing to do with it (TIDE's t_b)
MAX_DETECTIONS = 100  # per image and class, COCO's


class Kind(enum.IntEnum):
    """What a detection is. Tested in this order, so that each is of one kind; IoUs are the largest there are.

    HIT: it found an object of its class. LOCALISATION: 0.1 <= IoU < 0.5 with an object of its class.
    CLASSIFICATION: IoU >= 0.5 with an object of another class. DUPLICATE: IoU >= 0.5 with an object of its class that
    a better score has found. BACKGROUND: IoU < 0.1 with everything. BOTH: what remains, 0.1 <= IoU < 0.5 with an object
    of another class.

    Bolya, Foley, Hays, Hoffman, TIDE: A general toolbox for identifying object detection errors, ECCV 2020, section
    2.2; the order is that of its authors' implementation.
    """

    HIT = 0
    LOCALISATION = 1
    CLASSIFICATION = 2
    DUPLICATE = 3
    BACKGROUND = 4
    BOTH = 5


@dataclass(frozen=True)
class Matches:
    """All N detections of a data set that count, best score first, and all M objects that count.

    `objects`: the object (of M) that a HIT found, that a LOCALISATION or CLASSIFICATION error is nearest to, else -1.
    """

    scores: Float[np.ndarray, 'N']
    labels: Int[np.ndarray, 'N']
    images: Int[np.ndarray, 'N']
    kinds: Int[np.ndarray, 'N']
    objects: Int[np.ndarray, 'N']
    object_labels: Int[np.ndarray, 'M']
    object_images: Int[np.ndarray, 'M']
    num_images: int
    num_classes: int


def match(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], num_classes: int) -> Matches:
    """Compares every image's detections with its objects at an IoU of 0.5, as COCO does.

    In falling order of score, a detection finds the free object of its class that it overlaps most. Crowds and
    difficult objects do not count, nor do detections that found nothing else and lie in one by half of their area, nor
    those beyond the 100 best of an image and class.

    Args:
        ground_truth, detections: one entry an image, in the same order.

    Raises:
        UserError: no images, or a label that is not in [0, num_classes).
    """
    check_pairs(ground_truth, detections, num_classes)
    columns, object_labels, object_images, first_object = [], [], [], 0
    for image, (truth, found) in enumerate(zip(ground_truth, detections, strict=True)):
        counted_M = ~(truth.is_crowd | truth.is_difficult)
        kinds_N, objects_N = _match_image(truth, found := best_of_each_class(found), counted_M)
        counts_N = kinds_N >= 0
        objects_N = np.where(objects_N >= 0, objects_N + first_object, -1)
        images_N = np.full(len(kinds_N), image)
        columns.append([x[counts_N] for x in (found.scores, found.labels, images_N, kinds_N, objects_N)])
        object_labels.append(truth.labels[counted_M])
        object_images.append(np.full(counted_M.sum(), image))
        first_object += int(counted_M.sum())
    scores_N, labels_N, images_N, kinds_N, objects_N = (np.concatenate(column) for column in zip(*columns, strict=True))
    order_N = np.argsort(-scores_N, kind='stable')
    return Matches(
        scores=scores_N[order_N],
        labels=labels_N[order_N],
        images=images_N[order_N],
        kinds=kinds_N[order_N],
        objects=objects_N[order_N],
        object_labels=np.concatenate(object_labels),
        object_images=np.concatenate(object_images),
        num_images=len(ground_truth),
        num_classes=num_classes,
    )


def claim(iou_NM: Float[np.ndarray, 'N M']) -> Int[np.ndarray, 'N']:
    """For each detection, best first, the free object that it overlaps most and by at least 0.5; -1 for none."""
    claimed_N, is_free_M = np.full(len(iou_NM), -1), np.ones(iou_NM.shape[1], bool)
    for n in np.flatnonzero((iou_NM >= FOUND_IOU).any(axis=1)):
        free_M = np.where(is_free_M, iou_NM[n], -1.0)
        best = len(free_M) - 1 - int(free_M[::-1].argmax())  # of equals the last, as COCO has it
        if free_M[best] >= FOUND_IOU:
            claimed_N[n], is_free_M[best] = best, False
    return claimed_N


def overlaps(
    boxes_N4: Float[np.ndarray, 'N 4'], boxes_M4: Float[np.ndarray, 'M 4']
) -> tuple[Float[np.ndarray, 'N M'], Float[np.ndarray, 'N M']]:
    """(intersection over union, intersection over the area of the first) of xyxy boxes; 0 where an area is 0."""
    a_N4, b_M4 = boxes_N4.astype(np.float64), boxes_M4.astype(np.float64)
    low_NM2 = np.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high_NM2 = np.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    shared_NM = np.maximum(high_NM2 - low_NM2, 0).prod(axis=2)
    areas_N1, areas_1M = (a_N4[:, 2:] - a_N4[:, :2]).prod(axis=1)[:, None], (b_M4[:, 2:] - b_M4[:, :2]).prod(axis=1)
    tiny = np.finfo(np.float64).tiny  # nothing shared over nothing at all is 0, not nan
    return shared_NM / np.maximum(areas_N1 + areas_1M - shared_NM, tiny), shared_NM / np.maximum(areas_N1, tiny)


def best_of_each_class(found: Detections) -> Detections:
    """Best score first, at most 100 of a class."""
    order_N = np.argsort(-found.scores, kind='stable')
    rank_N = np.zeros(len(order_N), int)
    for label in np.unique(found.labels):
        of_class = np.flatnonzero(found.labels[order_N] == label)
        rank_N[of_class] = np.arange(len(of_class))
    kept = order_N[rank_N < MAX_DETECTIONS]
    return Detections(found.boxes_xyxy[kept], found.scores[kept], found.labels[kept])


def _match_image(truth: GroundTruth, found: Detections, counted_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kinds, objects) of one image's detections, best first; the kind is -1 for a detection that does not count."""
    iou_NM, _ = overlaps(found.boxes_xyxy, truth.boxes_xyxy[counted_M])
    _, inside_NR = overlaps(found.boxes_xyxy, truth.boxes_xyxy[~counted_M])
    is_own_NM = found.labels[:, None] == truth.labels[counted_M]
    is_own_NR = found.labels[:, None] == truth.labels[~counted_M]
    own_NM, other_NM = np.where(is_own_NM, iou_NM, 0.0), np.where(is_own_NM, 0.0, iou_NM)
    own_N, other_N = own_NM.max(axis=1, initial=0.0), other_NM.max(axis=1, initial=0.0)
    hits_N = claim(own_NM)
    kind_if = {
        Kind.HIT: hits_N >= 0,
        -1: (is_own_NR & (inside_NR >= FOUND_IOU)).any(axis=1),
        Kind.LOCALISATION: (own_N >= NEAR_IOU) & (own_N < FOUND_IOU),
        Kind.CLASSIFICATION: other_N >= FOUND_IOU,
        Kind.DUPLICATE: own_N >= FOUND_IOU,
        Kind.BACKGROUND: other_N < NEAR_IOU,
    }
    kinds_N = np.select([*kind_if.values()], [int(kind) for kind in kind_if], default=int(Kind.BOTH))
    objects_N = hits_N
    if iou_NM.shape[1]:
        objects_N = np.where(kinds_N == Kind.LOCALISATION, own_NM.argmax(axis=1), objects_N)
        objects_N = np.where(kinds_N == Kind.CLASSIFICATION, other_NM.argmax(axis=1), objects_N)
    return kinds_N, objects_N
