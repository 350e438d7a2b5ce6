"""Matches detections to objects as COCO does, and classifies the errors as TIDE does."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

FOREGROUND_IOU = 0.5  # at least this IoU is a match (t_f in TIDE)
BACKGROUND_IOU = 0.1  # a smaller IoU means background (t_b in TIDE)
MAX_DETECTIONS = 100  # per image and class, as in COCO


class Kind(enum.IntEnum):
    """The kind of a detection: the first that applies, based on the largest IoU.

    HIT: matches an object of its class.
    LOCALISATION: 0.1 <= IoU < 0.5 with an object of its class.
    CLASSIFICATION: IoU >= 0.5 with an object of another class.
    DUPLICATE: IoU >= 0.5 with an object of its class that matches a detection of higher score.
    BACKGROUND: IoU < 0.1 with all objects.
    BOTH: the rest, 0.1 <= IoU < 0.5 with an object of another class.

    Bolya, Foley, Hays, Hoffman, TIDE: A general toolbox for identifying object detection errors, ECCV 2020, section
    2.2; the order is that of the authors' implementation.
    """

    HIT = 0
    LOCALISATION = 1
    CLASSIFICATION = 2
    DUPLICATE = 3
    BACKGROUND = 4
    BOTH = 5


@dataclass(frozen=True)
class Matches:
    """All N detections and M objects of a data set that are not ignored, detections by descending score.

    `objects`: the index of the object that a HIT matches or that an error of LOCALISATION or CLASSIFICATION overlaps
    most, else -1.
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
    """Matches the detections and objects of every image at an IoU of 0.5, as COCO does.

    By descending score, each detection takes the free object of its class with the largest IoU. Ignored are crowds and
    difficult objects, unmatched detections with half of their area in one, and all but the 100 best detections per
    image and class.

    Args:
        ground_truth, detections: one entry per image, in the same order.

    Raises:
        UserError: if there are no images, or a label is not in [0, num_classes).
    """
    check_pairs(ground_truth, detections, num_classes)
    columns, object_labels, object_images, first_object = [], [], [], 0
    for image, (truth, predicted) in enumerate(zip(ground_truth, detections, strict=True)):
        counted_M = ~(truth.is_crowd | truth.is_difficult)
        kinds_N, objects_N = _match_image(truth, predicted := top_per_class(predicted), counted_M)
        counts_N = kinds_N >= 0
        objects_N = np.where(objects_N >= 0, objects_N + first_object, -1)
        images_N = np.full(len(kinds_N), image)
        columns.append([x[counts_N] for x in (predicted.scores, predicted.labels, images_N, kinds_N, objects_N)])
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


def match_greedily(iou_NM: Float[np.ndarray, 'N M']) -> Int[np.ndarray, 'N']:
    """For each detection in order, the free object with the largest IoU of at least 0.5, or -1."""
    matched_N, is_free_M = np.full(len(iou_NM), -1), np.ones(iou_NM.shape[1], bool)
    for n in np.flatnonzero((iou_NM >= FOREGROUND_IOU).any(axis=1)):
        free_M = np.where(is_free_M, iou_NM[n], -1.0)
        best = len(free_M) - 1 - int(free_M[::-1].argmax())  # the last of equals, as in COCO
        if free_M[best] >= FOREGROUND_IOU:
            matched_N[n], is_free_M[best] = best, False
    return matched_N


def overlaps(
    boxes_N4: Float[np.ndarray, 'N 4'], boxes_M4: Float[np.ndarray, 'M 4']
) -> tuple[Float[np.ndarray, 'N M'], Float[np.ndarray, 'N M']]:
    """(IoU, intersection over the area of the first box) of xyxy boxes; 0 if that area is 0."""
    a_N4, b_M4 = boxes_N4.astype(np.float64), boxes_M4.astype(np.float64)
    low_NM2 = np.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high_NM2 = np.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    shared_NM = np.maximum(high_NM2 - low_NM2, 0).prod(axis=2)
    areas_N1, areas_1M = (a_N4[:, 2:] - a_N4[:, :2]).prod(axis=1)[:, None], (b_M4[:, 2:] - b_M4[:, :2]).prod(axis=1)
    tiny = np.finfo(np.float64).tiny  # makes 0 / 0 equal to 0 instead of nan
    return shared_NM / np.maximum(areas_N1 + areas_1M - shared_NM, tiny), shared_NM / np.maximum(areas_N1, tiny)


def top_per_class(detections: Detections) -> Detections:
    """The 100 best detections of each class, by descending score."""
    order_N = np.argsort(-detections.scores, kind='stable')
    rank_N = np.zeros(len(order_N), int)
    for label in np.unique(detections.labels):
        of_class = np.flatnonzero(detections.labels[order_N] == label)
        rank_N[of_class] = np.arange(len(of_class))
    kept = order_N[rank_N < MAX_DETECTIONS]
    return Detections(detections.boxes_xyxy[kept], detections.scores[kept], detections.labels[kept])


def first_of_each(objects_N: Int[np.ndarray, 'N'], mask_N: Bool[np.ndarray, 'N']) -> Bool[np.ndarray, 'N']:
    """True for the first detection of each object among those in `mask_N`."""
    positions = np.flatnonzero(mask_N)
    _, first = np.unique(objects_N[positions], return_index=True)
    is_first_N = np.zeros(len(objects_N), bool)
    is_first_N[positions[first]] = True
    return is_first_N


def _match_image(truth: GroundTruth, predicted: Detections, counted_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kinds, objects) of the detections in one image, by descending score; the kind is -1 if ignored."""
    iou_NM, _ = overlaps(predicted.boxes_xyxy, truth.boxes_xyxy[counted_M])
    _, inside_NR = overlaps(predicted.boxes_xyxy, truth.boxes_xyxy[~counted_M])
    is_own_NM = predicted.labels[:, None] == truth.labels[counted_M]
    is_own_NR = predicted.labels[:, None] == truth.labels[~counted_M]
    own_NM, other_NM = np.where(is_own_NM, iou_NM, 0.0), np.where(is_own_NM, 0.0, iou_NM)
    own_N, other_N = own_NM.max(axis=1, initial=0.0), other_NM.max(axis=1, initial=0.0)
    hits_N = match_greedily(own_NM)
    kind_if = {
        Kind.HIT: hits_N >= 0,
        -1: (is_own_NR & (inside_NR >= FOREGROUND_IOU)).any(axis=1),
        Kind.LOCALISATION: (own_N >= BACKGROUND_IOU) & (own_N < FOREGROUND_IOU),
        Kind.CLASSIFICATION: other_N >= FOREGROUND_IOU,
        Kind.DUPLICATE: own_N >= FOREGROUND_IOU,
        Kind.BACKGROUND: other_N < BACKGROUND_IOU,
    }
    kinds_N = np.select([*kind_if.values()], [int(kind) for kind in kind_if], default=int(Kind.BOTH))
    objects_N = hits_N
    if iou_NM.shape[1]:
        objects_N = np.where(kinds_N == Kind.LOCALISATION, own_NM.argmax(axis=1), objects_N)
        objects_N = np.where(kinds_N == Kind.CLASSIFICATION, other_NM.argmax(axis=1), objects_N)
    return kinds_N, objects_N
