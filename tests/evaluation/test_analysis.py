"""Numbers that were computed by hand, and curves whose mean must be COCO's AP."""

import math

import numpy as np
import pytest
from evaluation_cases import as_detections, found, random_case, truth
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.evaluation import analysis, coco_by_size, coco_metrics
from effdet_jax.evaluation.matching import Kind, match

CAT, DOG = 0, 1

# Two images. The first has two cats and a dog, the second a cat and a dog; every object has 10x10 pixels.
GROUND_TRUTH = [
    truth([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [CAT, CAT, DOG]),
    truth([[0, 0, 10, 10], [40, 0, 50, 10]], [CAT, DOG]),
]
DETECTIONS = [
    found(
        [
            [0, 0, 10, 10],  # the first cat
            [0, 0, 10, 8],  # the same again
            [20, 0, 30, 4],  # the second cat, badly: IoU 0.4
            [40, 0, 50, 10],  # the dog, called a cat
            [70, 70, 80, 80],  # nothing there
            [40, 0, 50, 3],  # badly on the dog and called a cat
        ],
        [0.95, 0.85, 0.75, 0.65, 0.55, 0.45],
        [CAT] * 6,
    ),
    found([[40, 0, 50, 10]], [0.9], [DOG]),  # the cat of the second image is missed
]
# Cats: hit, duplicate, localisation, classification, background, both; 1 of 3 found at precision 1: recalls 0..0.33,
# which are 34 of 101 points. Dogs: 1 of 2 found at precision 1: recalls 0..0.50, 51 points.
CATS, DOGS = 34 / 101, 51 / 101


def hits(matches):
    return matches.kinds == Kind.HIT


def test_the_case_is_what_it_says():
    matches = match(GROUND_TRUTH, DETECTIONS, 2)
    order = [Kind.HIT, Kind.HIT, Kind.DUPLICATE, Kind.LOCALISATION, Kind.CLASSIFICATION, Kind.BACKGROUND, Kind.BOTH]
    assert list(matches.kinds) == order
    assert analysis.precision_recall(matches).mean(axis=1) == pytest.approx([CATS, DOGS])


def test_error_breakdown_by_hand():
    errors = analysis.error_breakdown(match(GROUND_TRUTH, DETECTIONS, 2))
    before = (CATS + DOGS) / 2
    # Localisation: the cats are hit, duplicate, hit, ...: precision 2/3 at recalls up to 0.66, 33 points more.
    localised = (34 + 33 * 2 / 3) / 101
    # Classification: the cat box on the dog becomes a dog of score 0.65: both dogs are found, at precision 1.
    # Missed: the second image's cat goes; the first of two cats remains found: 51 points.
    expected = {
        'localisation': (1, (localised + DOGS) / 2 - before),
        'classification': (1, (CATS + 1) / 2 - before),
        'both': (1, 0.0),
        'duplicate': (1, 0.0),  # behind the last hit: precision at the recalls reached does not change
        'background': (1, 0.0),
        'missed': (1, (51 / 101 + DOGS) / 2 - before),
    }
    assert errors.keys() == expected.keys()
    for kind, (count, gain) in expected.items():
        assert errors[kind].count == count, kind
        assert errors[kind].ap_gained == pytest.approx(gain, abs=1e-12), kind


def test_false_detections_cost_what_their_scores_say():
    # nothing there (0.9), cat (0.8): precision 1/2 at all recalls; without the first 1.
    ground_truth = [truth([[0, 0, 10, 10]], [CAT])]
    errors = analysis.error_breakdown(
        match(ground_truth, [found([[50, 0, 60, 10], [0, 0, 10, 10]], [0.9, 0.8], [CAT] * 2)], 1)
    )
    assert errors['background'] == (1, pytest.approx(0.5))


def test_mending_leaves_a_found_object_to_its_finder():
    # A bad box (0.9) before a good one (0.8) on one cat: the bad one goes, and precision rises from 1/2 to 1.
    detections = found([[0, 0, 10, 4], [0, 0, 10, 10]], [0.9, 0.8], [CAT] * 2)
    errors = analysis.error_breakdown(match([truth([[0, 0, 10, 10]], [CAT])], [detections], 1))
    assert errors['localisation'] == (1, pytest.approx(0.5))
    assert errors['missed'] == (0, 0)


def test_of_several_bad_boxes_the_best_is_mended():
    # Two bad boxes on a cat and one on nothing between them: mended hit, background. Without both, precision 0.
    detections = found([[0, 0, 10, 4], [50, 0, 60, 10], [0, 0, 10, 3]], [0.9, 0.8, 0.7], [CAT] * 3)
    errors = analysis.error_breakdown(match([truth([[0, 0, 10, 10]], [CAT])], [detections], 1))
    assert errors['localisation'] == (2, pytest.approx(1))


def test_an_object_with_only_a_bad_box_is_not_missed_too():
    errors = analysis.error_breakdown(
        match([truth([[0, 0, 10, 10]], [CAT])], [found([[0, 0, 10, 4]], [0.9], [CAT])], 1)
    )
    assert {kind: error.count for kind, error in errors.items() if error.count} == {'localisation': 1}
    assert errors['localisation'].ap_gained == pytest.approx(1)


def test_a_class_that_is_missed_altogether_leaves_the_mean():
    ground_truth = [truth([[0, 0, 10, 10], [40, 0, 50, 10]], [CAT, DOG])]
    errors = analysis.error_breakdown(match(ground_truth, [found([[0, 0, 10, 10]], [0.9], [CAT])], 2))
    assert errors['missed'] == (1, pytest.approx(0.5))


@pytest.mark.parametrize('seed', range(6))
def test_curves_have_cocos_ap50_as_their_mean(seed):
    ground_truth, detections, names = random_case(seed, num_images=25, num_classes=1 + seed % 4, difficult=seed > 3)
    curves = analysis.precision_recall(match(ground_truth, detections, len(names)))
    metrics = coco_metrics(ground_truth, detections, names)
    for name, curve in zip(names, curves, strict=True):
        assert curve.mean() == pytest.approx(metrics[f'AP50/{name}'], abs=1e-9, nan_ok=True)
        assert np.all(np.diff(curve) <= 0) or np.isnan(curve).all()


@pytest.mark.parametrize('seed', range(4))
def test_no_mending_makes_it_worse_and_counts_add_up(seed):
    ground_truth, detections, names = random_case(seed, num_images=25)
    matches = match(ground_truth, detections, len(names))
    errors = analysis.error_breakdown(matches)
    assert min(error.ap_gained for error in errors.values()) >= 0
    assert sum(e.count for kind, e in errors.items() if kind != 'missed') == np.sum(~hits(matches))


def test_confusion_matrix_by_hand():
    # From 0.5 on: the hits; the cat box on the dog; false alarms: duplicate, bad cat, nothing there. Missed: the second
    # cat, and the cat of the second image.
    expected = [
        [1, 0, 2],  # cats: 1 found, 2 missed
        [1, 1, 0],  # dogs: 1 taken for a cat, 1 found
        [3, 0, 0],  # background taken for a cat
    ]
    assert analysis.confusion_matrix(GROUND_TRUTH, DETECTIONS, 2, min_score=0.5).tolist() == expected
    # From 0.92 on the first cat is all there is.
    assert analysis.confusion_matrix(GROUND_TRUTH, DETECTIONS, 2, 0.92).tolist() == [[1, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_the_better_score_takes_the_object_whatever_its_class():
    detections = found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.6, 0.8], [CAT, DOG])
    matrix = analysis.confusion_matrix([truth([[0, 0, 10, 10]], [CAT])], [detections], 2, 0.5)
    assert matrix.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_a_perfect_detector_has_a_diagonal():
    ground_truth, _, names = random_case(1, num_images=20, crowds=False)
    matrix = analysis.confusion_matrix(ground_truth, [as_detections(image) for image in ground_truth], len(names), 0.5)
    labels = np.concatenate([image.labels for image in ground_truth])
    assert matrix.sum() == np.trace(matrix) == len(labels)


@pytest.mark.parametrize('seed', range(3))
def test_rows_are_the_objects_and_columns_the_detections(seed):
    ground_truth, detections, names = random_case(seed, num_images=20, crowds=False)
    matrix = analysis.confusion_matrix(ground_truth, detections, len(names), 0.4)
    for labels, totals, shown in (
        (ground_truth, matrix.sum(axis=1), lambda image: image.labels),
        (detections, matrix.sum(axis=0), lambda image: image.labels[image.scores >= np.float32(0.4)]),
    ):
        counts = np.bincount(np.concatenate([shown(image) for image in labels]), minlength=len(names))
        np.testing.assert_array_equal(totals[:-1], counts)


def test_crowds_are_no_row_and_what_lies_in_them_no_false_alarm():
    crowd = truth([[0, 0, 100, 100]], [CAT], crowd=[True])
    detections = found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.9], [CAT, DOG])
    assert analysis.confusion_matrix([crowd], [detections], 2, 0.5).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_calibration_by_hand():
    # Scores 0.9 and 0.8 in the upper bin, one of them right: 0.5 against 0.85. Score 0.1 in the lower one, wrong.
    result = analysis.calibration(np.array([0.9, 0.8, 0.1]), np.array([True, False, False]), num_bins=2)
    assert result.counts.tolist() == [1, 2]
    assert result.hit_rates.tolist() == [0, 0.5]
    assert result.mean_scores == pytest.approx([0.1, 0.85])
    assert result.expected_error == pytest.approx((1 * 0.1 + 2 * 0.35) / 3)


def test_calibration_at_the_limits():
    assert analysis.calibration(np.array([1.0, 0.0]), np.array([True, False])).counts[[0, -1]].tolist() == [1, 1]
    nothing = analysis.calibration(np.zeros(0), np.zeros(0, bool))
    assert math.isnan(nothing.expected_error) and nothing.counts.sum() == 0


def test_scores_that_are_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    scores = rng.random(200_000)
    assert analysis.calibration(scores, rng.random(200_000) < scores).expected_error < 0.01
    assert analysis.calibration(scores, rng.random(200_000) < scores**2).expected_error == pytest.approx(
        1 / 6, abs=0.01
    )


def test_operating_points_by_hand():
    matches = match(GROUND_TRUTH, DETECTIONS, 2)
    # In falling order hit, hit, then nothing but errors: best from 0.9 on, 2 of 2 right and 2 of 5 found.
    best = analysis.best_f1(matches.scores, hits(matches), 5)
    assert best == (pytest.approx(0.9), 1.0, 0.4, pytest.approx(4 / 7))
    assert analysis.at_score(matches.scores, hits(matches), 5, 0.5) == (0.5, 2 / 6, 0.4, pytest.approx(4 / 11))
    assert analysis.best_f1(np.zeros(0), np.zeros(0, bool), 5) == (1.0, 0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30), st.integers(0, 5))
def test_no_score_has_a_better_f1(detections, missed):
    detections.sort(key=lambda pair: -pair[0])
    scores, is_hit = np.array([s / 10 for s, _ in detections]), np.array([h for _, h in detections])
    num_objects = int(is_hit.sum()) + missed
    every = [analysis.at_score(scores, is_hit, num_objects, score).f1 for score in scores]
    assert analysis.best_f1(scores, is_hit, num_objects).f1 == pytest.approx(max(every))


def test_images_are_ranked_worst_first():
    cat, nothing = truth([[0, 0, 10, 10]], [CAT]), truth([], [])
    two_cats = truth([[0, 0, 10, 10], [20, 0, 30, 10]], [CAT, CAT])
    one, none, wrong = found([[0, 0, 10, 10]], [0.9], [CAT]), found([], [], []), found([[50, 0, 60, 10]], [0.9], [CAT])
    pairs = [
        (two_cats, as_detections(two_cats)),
        (nothing, none),
        (cat, none),
        (cat, wrong),
        (two_cats, one),
        (cat, one),
    ]
    ranked = analysis.rank_images(match([t for t, _ in pairs], [d for _, d in pairs], 1), min_score=0.5)
    assert ranked == [
        (3, 0.0, 0, 1, 1), (2, 0.0, 0, 0, 1), (4, pytest.approx(2 / 3), 1, 0, 1),
        (1, 1.0, 0, 0, 0), (5, 1.0, 1, 0, 0), (0, 1.0, 2, 0, 0),
    ]  # fmt: skip


def test_detections_below_the_score_do_not_count_for_an_image():
    ranked = analysis.rank_images(match([GROUND_TRUTH[0]], [DETECTIONS[0]], 2), min_score=0.7)
    assert ranked == [(0, pytest.approx(2 * 1 / (2 * 1 + 2 + 2)), 1, 2, 2)]


def test_by_size_agrees_with_the_summary():
    case = random_case(2, num_images=40)
    sizes, metrics = coco_by_size(*case), coco_metrics(*case)
    for size, row in sizes.items():
        assert row['AP'] == metrics[f'AP_{size}']
        assert row['AR100'] == metrics[f'AR_{size}']
        assert np.nanmean([row[f'AP/{name}'] for name in case[2]]) == pytest.approx(row['AP'])
    counted = [~(image.is_crowd | image.is_difficult) for image in case[0]]
    assert sum(row['objects'] for row in sizes.values()) == sum(int(mask.sum()) for mask in counted)


def test_nothing_to_find():
    matches = match([truth([], [])], [found([[0, 0, 1, 1]], [0.5], [0])], 1)
    assert np.isnan(analysis.precision_recall(matches)).all()
    errors = analysis.error_breakdown(matches)
    assert errors['background'].count == 1 and math.isnan(errors['background'].ap_gained)
