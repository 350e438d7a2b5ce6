"""PASCAL VOC average precision at IoU 0.5, by the rules of its development kit (VOCevaldet.m)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from effdet_jax.evaluation.matching import first_of_each, overlaps
from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

MIN_IOU = 0.5
CORNER_PIXELS = (0.0, 0.0, 1.0, 1.0)  # added to xyxy boxes: those of VOC include both corner pixels


def voc_metrics(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> dict[str, float]:
    """`VOC07_AP50` (11-point average, VOC 2007), `VOC_AP50` (area, since VOC 2010), and both for each class.

    Each detection is assigned to the object of its class and image with the largest IoU. If that is at least 0.5, the
    detection with the highest score is a true positive, and all others of the object are false positives. Detections
    assigned to difficult objects or to crowds, which VOC does not have, are ignored. All others are false positives.

    Boxes include both corner pixels, so a width is `x2 - x1 + 1`. They must not be widened when read; shifting all of
    them by a pixel changes nothing.

    All keys are always present. A class without objects is nan and is left out of the mean.

    Args:
        ground_truth, detections: one entry per image, in the same order.
        class_names: the names of labels 0, 1, ...

    Raises:
        UserError: if there are no images, or a label has no name.
    """
    check_pairs(ground_truth, detections, len(class_names))
    truth_labels_M = np.concatenate([image.labels for image in ground_truth])
    ignored_M = np.concatenate([image.is_difficult | image.is_crowd for image in ground_truth])
    scores_N = np.concatenate([image.scores for image in detections])
    labels_N = np.concatenate([image.labels for image in detections])
    objects_N = _assign(ground_truth, detections)

    order_N = np.argsort(-scores_N, kind='stable')
    labels_N, objects_N = labels_N[order_N], objects_N[order_N]
    is_hit_N = first_of_each(objects_N, objects_N >= 0)
    counts_N = ~np.append(ignored_M, False)[objects_N]  # index -1: a false positive, which counts

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
    """The mean of the largest precision at a recall of at least 0, 0.1, ..., 1.

    Compares recalls as integers, because `recall >= 3 * 0.1` in floating point is false for a recall of exactly 0.3.

    Args:
        is_hit: whether a detection is a true positive (else a false positive), by descending score.
        num_objects: the number of objects, at least 1.
    """
    hits = np.cumsum(is_hit)
    precision = hits / np.arange(1, len(is_hit) + 1)
    best = [precision[10 * hits >= tenth * num_objects].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))


def area_average(is_hit: Bool[np.ndarray, 'N'], num_objects: int) -> float:
    """The area under the monotone precision-recall curve. Arguments as in `eleven_point_average`."""
    precision = np.cumsum(is_hit) / np.arange(1, len(is_hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[is_hit].sum() / num_objects)  # each hit raises the recall by 1 / num_objects


def _assign(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections]) -> Int[np.ndarray, 'N']:
    """The index (over all images) of the object that each detection is assigned to, or -1."""
    objects, first_object = [], 0
    for truth, predicted in zip(ground_truth, detections, strict=True):
        if len(truth.labels):
            boxes = (image.boxes_xyxy.astype(np.float64) + CORNER_PIXELS for image in (predicted, truth))
            iou_NM, _ = overlaps(*boxes)
            iou_NM = np.where(predicted.labels[:, None] == truth.labels[None, :], iou_NM, 0.0)
            best_N = iou_NM.argmax(axis=1)
            objects.append(np.where(iou_NM.max(axis=1) >= MIN_IOU, best_N + first_object, -1))
        else:
            objects.append(np.full(len(predicted.labels), -1))
        first_object += len(truth.labels)
    return np.concatenate(objects)


def _mean(values) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float('nan')
