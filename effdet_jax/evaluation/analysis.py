"""Error analysis: precision-recall curves, TIDE errors, confusion matrix, calibration, ranking of images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from effdet_jax.evaluation.matching import (
    FOREGROUND_IOU,
    Kind,
    Matches,
    first_of_each,
    match_greedily,
    overlaps,
    top_per_class,
)
from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

RECALLS = np.linspace(0, 1, 101)


class Error(NamedTuple):
    """One kind of error: its count, and the gain in mean AP50 if only errors of this kind are fixed."""

    count: int
    ap_gained: float


class OperatingPoint(NamedTuple):
    """Precision, recall and F1 of the detections with at least this score; all in [0, 1]."""

    score: float
    precision: float
    recall: float
    f1: float


class Calibration(NamedTuple):
    """B bins of equal width over scores in [0, 1]; nan in bins without detections."""

    edges: Float[np.ndarray, 'edges']  # B + 1
    counts: Int[np.ndarray, 'B']
    mean_scores: Float[np.ndarray, 'B']
    hit_rates: Float[np.ndarray, 'B']
    expected_error: float


class ImageScore(NamedTuple):
    """One image at a score threshold: counts of true positives, false positives and missed objects."""

    index: int
    f1: float
    hits: int
    false: int
    missed: int


def precision_recall(matches: Matches) -> Float[np.ndarray, 'K 101']:
    """Precision at recalls 0, 0.01, ..., 1 and IoU 0.5 for each class, whose mean is the COCO AP50 of the class.

    The precision at a recall is the largest at that recall or above, 0 if it is not reached. A class without objects is
    nan.
    """
    return _curves(matches.labels, matches.kinds == Kind.HIT, _objects_per_class(matches))


def error_breakdown(matches: Matches) -> dict[str, Error]:
    """The six kinds of error in TIDE, and the gain in AP50 from fixing each of them.

    `Kind` defines five; missed are the objects without a hit and without a localisation or classification error. Fixing
        localisation, classification: corrects the box or class of the best-scoring error of each object without a hit,
            and removes the other errors.
        duplicate, background, both: removes the detections.
        missed: removes the objects; a class without objects is then left out of the mean.
    Gains do not add up, because fixing one kind changes the gain of the others. They are nan without objects. Bolya et
    al., ECCV 2020, section 2.3; as in the authors' implementation, a hit keeps its object.
    """
    labels_N, kinds_N, objects_N = matches.labels, matches.kinds, matches.objects
    objects_K, is_hit_N = _objects_per_class(matches), kinds_N == Kind.HIT
    before = _mean_ap(labels_N, is_hit_N, objects_K)
    errors = {}
    for kind in (Kind.CLASSIFICATION, Kind.LOCALISATION):
        is_error_N = kinds_N == kind
        is_fixed_N = first_of_each(objects_N, is_error_N & ~np.isin(objects_N, objects_N[is_hit_N]))
        kept_N = is_fixed_N | ~is_error_N
        fixed_N = np.where(is_fixed_N, np.append(matches.object_labels, -1)[objects_N], labels_N)
        after = _mean_ap(fixed_N[kept_N], (is_hit_N | is_fixed_N)[kept_N], objects_K)
        errors[kind.name.lower()] = Error(int(is_error_N.sum()), after - before)
    for kind in (Kind.BOTH, Kind.DUPLICATE, Kind.BACKGROUND):
        kept_N = kinds_N != kind
        after = _mean_ap(labels_N[kept_N], is_hit_N[kept_N], objects_K)
        errors[kind.name.lower()] = Error(int(np.sum(~kept_N)), after - before)
    missed_M = np.ones(len(matches.object_labels), bool)
    missed_M[objects_N[objects_N >= 0]] = False
    after = _mean_ap(labels_N, is_hit_N, np.bincount(matches.object_labels[~missed_M], minlength=len(objects_K)))
    return errors | {'missed': Error(int(missed_M.sum()), after - before)}


def confusion_matrix(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], num_classes: int, min_score: float
) -> Int[np.ndarray, 'K1 K1']:
    """Rows: true class, columns: predicted class; the last row and column are background.

    By descending score, each detection with at least `min_score` takes the free object of any class with the largest
    IoU, if that is at least 0.5. The remaining detections are false positives (last row), the remaining objects are
    missed (last column). Ignores crowds and difficult objects, and unmatched detections of their class with half of
    their area in one.

    Raises:
        UserError: if there are no images, or a label is not in [0, num_classes).
    """
    check_pairs(ground_truth, detections, num_classes)
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    for truth, predicted in zip(ground_truth, map(top_per_class, detections), strict=True):
        counted_M, kept_N = ~(truth.is_crowd | truth.is_difficult), predicted.scores >= min_score
        boxes_N4, labels_N, labels_M = predicted.boxes_xyxy[kept_N], predicted.labels[kept_N], truth.labels[counted_M]
        matched_N = match_greedily(overlaps(boxes_N4, truth.boxes_xyxy[counted_M])[0])
        inside_NR = overlaps(boxes_N4, truth.boxes_xyxy[~counted_M])[1] >= FOREGROUND_IOU
        ignored_N = (inside_NR & (labels_N[:, None] == truth.labels[~counted_M])).any(axis=1) & (matched_N < 0)
        rows_N = np.append(labels_M, num_classes)[matched_N]
        np.add.at(matrix, (rows_N[~ignored_N], labels_N[~ignored_N]), 1)
        missed = np.delete(labels_M, matched_N[matched_N >= 0])
        matrix[:num_classes, num_classes] += np.bincount(missed, minlength=num_classes)
    return matrix


def calibration(scores_N: Float[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], num_bins: int = 10) -> Calibration:
    """Compares scores with the share of hits: of the detections with score 0.7, 70% should be right.

    The expected calibration error is the mean of |share of hits - mean score| over the bins, weighted by their counts
    (Guo et al., On calibration of modern neural networks, ICML 2017); nan without detections. The last bin includes 1.
    """
    bins_N = np.minimum((scores_N.astype(np.float64) * num_bins).astype(int), num_bins - 1)
    counts_B, hits_B, sums_B = (
        np.bincount(bins_N, weights, num_bins) for weights in (None, is_hit_N.astype(float), scores_N)
    )
    with np.errstate(invalid='ignore'):
        mean_scores_B, hit_rates_B = sums_B / counts_B, hits_B / counts_B
    error = np.nansum(counts_B * np.abs(hit_rates_B - mean_scores_B)) / len(scores_N) if len(scores_N) else np.nan
    return Calibration(np.linspace(0, 1, num_bins + 1), counts_B, mean_scores_B, hit_rates_B, float(error))


def at_score(
    scores_N: Float[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], num_objects: int, score: float
) -> OperatingPoint:
    """Precision, recall and F1 of the detections with at least `score`; scores descend. 0 where undefined."""
    count = int(np.searchsorted(-scores_N, -score, side='right'))
    hits = int(is_hit_N[:count].sum())
    f1 = 2 * hits / max(count + num_objects, 1)
    return OperatingPoint(float(score), hits / max(count, 1), hits / max(num_objects, 1), f1)


def best_f1(scores_N: Float[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], num_objects: int) -> OperatingPoint:
    """The highest score threshold with the largest F1; scores descend. The threshold is 1 without detections."""
    if not len(scores_N):
        return at_score(scores_N, is_hit_N, num_objects, 1.0)
    f1_N = 2 * np.cumsum(is_hit_N) / (np.arange(1, len(scores_N) + 1) + num_objects)
    is_last_N = np.append(scores_N[1:] < scores_N[:-1], True)  # a threshold cannot separate equal scores
    best = np.where(is_last_N, f1_N, -1.0).argmax()
    return at_score(scores_N, is_hit_N, num_objects, float(scores_N[best]))


def rank_images(matches: Matches, min_score: float) -> list[ImageScore]:
    """All images, worst first: by F1 at `min_score`, then by the number of errors, then by the number of hits.

    F1 is 2 hits / (2 hits + false + missed), or 1 for an image without objects and detections. So the last image has
    many objects and no errors.
    """
    kept_N, count = matches.scores >= min_score, matches.num_images
    is_hit_N = matches.kinds == Kind.HIT
    hits_I = np.bincount(matches.images[kept_N & is_hit_N], minlength=count)
    false_I = np.bincount(matches.images[kept_N & ~is_hit_N], minlength=count)
    missed_I = np.bincount(matches.object_images, minlength=count) - hits_I
    errors_I = false_I + missed_I
    f1_I = np.where(hits_I + errors_I > 0, 2 * hits_I / np.maximum(2 * hits_I + errors_I, 1), 1.0)
    order_I = np.lexsort((np.arange(count), hits_I, -errors_I, f1_I))
    return [ImageScore(int(i), float(f1_I[i]), int(hits_I[i]), int(false_I[i]), int(missed_I[i])) for i in order_I]


def _objects_per_class(matches: Matches) -> Int[np.ndarray, 'K']:
    return np.bincount(matches.object_labels, minlength=matches.num_classes)


def _curves(
    labels_N: Int[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], objects_K: Int[np.ndarray, 'K']
) -> Float[np.ndarray, 'K 101']:
    curves_K101 = np.full((len(objects_K), len(RECALLS)), np.nan)
    for label in np.flatnonzero(objects_K):
        is_hit = is_hit_N[labels_N == label]
        hits = np.cumsum(is_hit)
        precision = hits / np.arange(1, len(is_hit) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(hits / objects_K[label], RECALLS)
        curves_K101[label] = np.append(envelope, 0.0)[reached]
    return curves_K101


def _mean_ap(labels_N: Int[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], objects_K: Int[np.ndarray, 'K']) -> float:
    if not objects_K.any():
        return float('nan')
    return float(_curves(labels_N, is_hit_N, objects_K)[objects_K > 0].mean())
