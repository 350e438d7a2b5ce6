"""PASCAL VOC's average precision at IoU 0.5, by the rules of its development kit (VOCevaldet.m)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

MIN_OVERLAP = 0.5


def voc_metrics(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> dict[str, float]:
    """`VOC07_AP50` (mean of 11 points, VOC 2007), `VOC_AP50` (area, VOC 2010 on), and both for each class.

    In falling order of score, each detection looks at the object of its class and image that it overlaps most. If that
    overlap is at least 0.5, the first to look is a true positive and every later one a false positive; a look at a
    difficult object (or a crowd, which VOC does not know) counts as neither. Everything else is a false positive.
    Boxes are VOC's, with both corners inside: a width is `x2 - x1 + 1`. So they must not have been widened when read;
    shifting all of them by a pixel changes nothing.

    The keys are always the same. A class without objects is nan and does not count in the mean.

    Args:
        ground_truth, detections: one entry an image, in the same order.
        class_names: the name of label 0, 1, ...

    Raises:
        UserError: no images, or a label without a name.
    """
    check_pairs(ground_truth, detections, len(class_names))
    truth_labels_M = np.concatenate([image.labels for image in ground_truth])
    ignored_M = np.concatenate([image.is_difficult | image.is_crowd for image in ground_truth])
    scores_N = np.concatenate([image.scores for image in detections])
    labels_N = np.concatenate([image.labels for image in detections])
    objects_N = _looked_at(ground_truth, detections)

    order_N = np.argsort(-scores_N, kind='stable')
    labels_N, objects_N = labels_N[order_N], objects_N[order_N]
    is_hit_N = _first_looks(objects_N)
    counts_N = (objects_N < 0) | ~_take(ignored_M, objects_N)

    averages = {'VOC07_AP50': eleven_point_average, 'VOC_AP50': area_average}
    per_class: dict[str, dict[str, float]] = {kind: {} for kind in averages}
    for label, name in enumerate(class_names):
        num_objects = int(np.count_nonzero((truth_labels_M == label) & ~ignored_M))
        is_hit = is_hit_N[counts_N & (labels_N == label)]
        for kind, average in averages.items():
            per_class[kind][name] = average(is_hit, num_objects) if num_objects else float('nan')
    means = {kind: _mean(values.values()) for kind, values in per_class.items()}
    return means | {f'{kind}/{name}': value for kind, values in per_class.items() for name, value in values.items()}


def eleven_point_average(is_hit: Bool[np.ndarray, 'N'], num_objects: int) -> float:
    """The mean of the best precisions at a recall of at least 0, 0.1, ..., 1.

    Recalls are compared as whole numbers: `recall >= 3 * 0.1` in floating point misses a recall of exactly 0.3.

    Args:
        is_hit: in falling order of score, whether a detection is a true positive (else a false one).
        num_objects: how many there are to find, at least 1.
    """
    hits = np.cumsum(is_hit)
    precision = hits / np.arange(1, len(is_hit) + 1)
    best = [precision[10 * hits >= tenth * num_objects].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))


def area_average(is_hit: Bool[np.ndarray, 'N'], num_objects: int) -> float:
    """The area under precision over recall, precision first made non-increasing. Arguments as eleven_point_average."""
    precision = np.cumsum(is_hit) / np.arange(1, len(is_hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[is_hit].sum() / num_objects)  # each hit is a step of 1 / num_objects in recall


def _looked_at(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections]) -> Int[np.ndarray, 'N']:
    """For each detection, the number (over all images) of the object it looks at, -1 for none."""
    numbers, first_number = [], 0
    for truth, found in zip(ground_truth, detections, strict=True):
        if len(truth.labels):
            overlap_NM = _overlap(found.boxes_xyxy.astype(np.float64), truth.boxes_xyxy.astype(np.float64))
            overlap_NM = np.where(found.labels[:, None] == truth.labels[None, :], overlap_NM, 0.0)
            best_N = overlap_NM.argmax(axis=1)
            numbers.append(np.where(overlap_NM.max(axis=1) >= MIN_OVERLAP, best_N + first_number, -1))
        else:
            numbers.append(np.full(len(found.labels), -1))
        first_number += len(truth.labels)
    return np.concatenate(numbers)


def _overlap(boxes_N4: Float[np.ndarray, 'N 4'], boxes_M4: Float[np.ndarray, 'M 4']) -> Float[np.ndarray, 'N M']:
    """Intersection over union of xyxy boxes that own both of their corner pixels."""
    low_NM2 = np.maximum(boxes_N4[:, None, :2], boxes_M4[None, :, :2])
    high_NM2 = np.minimum(boxes_N4[:, None, 2:], boxes_M4[None, :, 2:])
    intersection_NM = np.maximum(high_NM2 - low_NM2 + 1, 0).prod(axis=2)
    return intersection_NM / (_area(boxes_N4)[:, None] + _area(boxes_M4)[None, :] - intersection_NM)


def _area(boxes_N4: Float[np.ndarray, 'N 4']) -> Float[np.ndarray, 'N']:
    return np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2] + 1, 0).prod(axis=1)


def _first_looks(objects_N: Int[np.ndarray, 'N']) -> Bool[np.ndarray, 'N']:
    """True where an object occurs for the first time; never for -1."""
    _, first = np.unique(objects_N, return_index=True)
    is_first_N = np.zeros(len(objects_N), bool)
    is_first_N[first] = True
    return is_first_N & (objects_N >= 0)


def _take(values_M: Bool[np.ndarray, 'M'], indices_N: Int[np.ndarray, 'N']) -> Bool[np.ndarray, 'N']:
    """values_M[indices_N], False where the index is -1."""
    return np.append(values_M, False)[indices_N]


def _mean(values) -> float:
    measured = [value for value in values if not np.isnan(value)]
    return float(np.mean(measured)) if measured else float('nan')
