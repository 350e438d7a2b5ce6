"""Where a detector is good and where it fails: curves, kinds of error, confusion, calibration, the worst images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from effdet_jax.evaluation.matching import FOUND_IOU, Kind, Matches, best_of_each_class, claim, overlaps
from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

RECALLS = np.linspace(0, 1, 101)


class Error(NamedTuple):
    """One kind of error: how often, and how much mean AP at IoU 0.5 rises when it alone is mended."""

    count: int
    ap_gained: float


class OperatingPoint(NamedTuple):
    """What a detector does when only scores of at least `score` count; all in [0, 1]."""

    score: float
    precision: float
    recall: float
    f1: float


class Calibration(NamedTuple):
    """B bins of equal width over the scores [0, 1]; nan in bins without detections."""

    edges: Float[np.ndarray, 'edges']  # B + 1 of them
    counts: Int[np.ndarray, 'B']
    mean_scores: Float[np.ndarray, 'B']
    hit_rates: Float[np.ndarray, 'B']
    expected_error: float


class ImageScore(NamedTuple):
    """One image at a score threshold: objects found, false detections, objects missed."""

    index: int
    f1: float
    hits: int
    false: int
    missed: int


def precision_recall(matches: Matches) -> Float[np.ndarray, 'K 101']:
    """For each class the precision at the recalls 0, 0.01, ..., 1 and IoU 0.5; its mean is COCO's AP50 of the class.

    The precision at a recall is the best one at that recall or a higher one, 0 where it is not reached. A class without
    objects is nan.
    """
    return _curves(matches.labels, matches.kinds == Kind.HIT, _objects_per_class(matches))


def error_breakdown(matches: Matches) -> dict[str, Error]:
    """The six kinds of error of TIDE (`Kind` defines five), and the AP50 that mending each of them would gain.

    missed: an object that was not found and that no localisation or classification error is about. To mend means
        localisation, classification: the box or the class becomes right if the object has not been found, by the
            detection with the best score of those that are about it; the others go.
        duplicate, background, both: the detection goes.
        missed: the object goes; a class left without objects no longer counts in the mean.
    Gains do not add up: mending one kind changes what the others cost. nan without objects. Bolya et al., ECCV 2020,
    section 2.3; as in its authors' implementation, no object is taken from the detection that found it.
    """
    labels_N, kinds_N, objects_N = matches.labels, matches.kinds, matches.objects
    objects_K, is_hit_N = _objects_per_class(matches), kinds_N == Kind.HIT
    before = _mean_ap(labels_N, is_hit_N, objects_K)
    errors = {}
    for kind in (Kind.CLASSIFICATION, Kind.LOCALISATION):
        is_wrong_N = kinds_N == kind
        is_mended_N = _first_of_each(objects_N, is_wrong_N & ~np.isin(objects_N, objects_N[is_hit_N]))
        kept_N = is_mended_N | ~is_wrong_N
        mended_N = np.where(is_mended_N, np.append(matches.object_labels, -1)[objects_N], labels_N)
        after = _mean_ap(mended_N[kept_N], (is_hit_N | is_mended_N)[kept_N], objects_K)
        errors[kind.name.lower()] = Error(int(np.sum(kinds_N == kind)), after - before)
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
    """Row: what it is; column: what it was taken for; the last of either is background.

    Of the detections with a score of at least `min_score`, the best first, each takes the free object that it overlaps
    most, of any class, if that is by 0.5 or more. What remains are false alarms (last row) and missed objects (last
    column). Crowds and difficult objects do not count, nor do detections of their class that lie in them by half.

    Raises:
        UserError: no images, or a label that is not in [0, num_classes).
    """
    check_pairs(ground_truth, detections, num_classes)
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    for truth, found in zip(ground_truth, map(best_of_each_class, detections), strict=True):
        counted_M, shown_N = ~(truth.is_crowd | truth.is_difficult), found.scores >= min_score
        boxes_N4, labels_N, labels_M = found.boxes_xyxy[shown_N], found.labels[shown_N], truth.labels[counted_M]
        claimed_N = claim(overlaps(boxes_N4, truth.boxes_xyxy[counted_M])[0])
        inside_NR = overlaps(boxes_N4, truth.boxes_xyxy[~counted_M])[1] >= FOUND_IOU
        excused_N = (inside_NR & (labels_N[:, None] == truth.labels[~counted_M])).any(axis=1) & (claimed_N < 0)
        rows_N = np.append(labels_M, num_classes)[claimed_N]
        np.add.at(matrix, (rows_N[~excused_N], labels_N[~excused_N]), 1)
        matrix[:num_classes, num_classes] += np.bincount(
            np.delete(labels_M, claimed_N[claimed_N >= 0]), minlength=num_classes
        )
    return matrix


def calibration(scores_N: Float[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], num_bins: int = 10) -> Calibration:
    """Whether detections with a score of 0.7 are right in 7 cases of 10.

    The expected error is the mean of |share of hits - mean score| over the bins, weighted by their detections (Guo et
    al., On calibration of modern neural networks, ICML 2017); nan without detections. A score of 1 is in the last bin.
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
    """Precision, recall and F1 of the detections from `score` on; scores in falling order. 0 where undefined."""
    shown = int(np.searchsorted(-scores_N, -score, side='right'))
    hits = int(is_hit_N[:shown].sum())
    f1 = 2 * hits / max(shown + num_objects, 1)
    return OperatingPoint(float(score), hits / max(shown, 1), hits / max(num_objects, 1), f1)


def best_f1(scores_N: Float[np.ndarray, 'N'], is_hit_N: Bool[np.ndarray, 'N'], num_objects: int) -> OperatingPoint:
    """The score from which on F1 is largest (the highest such score); scores in falling order. Score 1 without any."""
    if not len(scores_N):
        return at_score(scores_N, is_hit_N, num_objects, 1.0)
    f1_N = 2 * np.cumsum(is_hit_N) / (np.arange(1, len(scores_N) + 1) + num_objects)
    is_last_N = np.append(scores_N[1:] < scores_N[:-1], True)  # equal scores stand or fall together
    best = np.where(is_last_N, f1_N, -1.0).argmax()
    return at_score(scores_N, is_hit_N, num_objects, float(scores_N[best]))


def rank_images(matches: Matches, min_score: float) -> list[ImageScore]:
    """All images, worst first: by F1 at `min_score`, then by the number of errors, then by the objects found.

    F1 is 2 hits / (2 hits + false + missed), and 1 for an image with nothing to find where nothing was found. So the
    last image is one with many objects and no error.
    """
    shown_N, count = matches.scores >= min_score, matches.num_images
    is_hit_N = matches.kinds == Kind.HIT
    hits_I = np.bincount(matches.images[shown_N & is_hit_N], minlength=count)
    false_I = np.bincount(matches.images[shown_N & ~is_hit_N], minlength=count)
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


def _first_of_each(objects_N: Int[np.ndarray, 'N'], among_N: Bool[np.ndarray, 'N']) -> Bool[np.ndarray, 'N']:
    """True for the first of each object's detections, of those in `among_N`."""
    positions = np.flatnonzero(among_N)
    _, first = np.unique(objects_N[positions], return_index=True)
    is_first_N = np.zeros(len(objects_N), bool)
    is_first_N[positions[first]] = True
    return is_first_N
