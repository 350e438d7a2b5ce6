import math

import numpy as np
import pytest
from evaluation_cases import as_detections, found, random_case, truth
from hypothesis import given
from hypothesis import strategies as st

from effdet_jax.errors import UserError
from effdet_jax.evaluation import voc_metrics
from effdet_jax.evaluation.voc import area_average, eleven_point_average


@pytest.mark.parametrize('seed', range(8))
def test_equals_the_rules_applied_one_by_one(seed):
    case = random_case(seed, num_classes=1 + seed % 4, difficult=True, whole_pixels=True)
    assert voc_metrics(*case) == pytest.approx(one_by_one(*case), abs=1e-12, nan_ok=True)


def test_ground_truth_as_detections_scores_one():
    ground_truth, _, names = random_case(3, num_images=20, difficult=True)
    metrics = voc_metrics(ground_truth, [as_detections(image) for image in ground_truth], names)
    assert set(metrics.values()) == {1.0}
    assert [*metrics][:2] == ['VOC07_AP50', 'VOC_AP50'] and 'VOC07_AP50/class 2' in metrics


def test_hand_computed():
    # Hit, miss, hit of 4 objects: precision 1 at recall 1/4 (points 0, .1, .2), 2/3 at recall 1/2 (.3, .4, .5), then 0.
    ground_truth = [truth([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9], [60, 0, 69, 9]], [0, 0, 0, 0])]
    detections = [found([[0, 0, 9, 9], [90, 0, 99, 9], [20, 0, 29, 9]], [0.9, 0.8, 0.7], [0, 0, 0])]
    metrics = voc_metrics(ground_truth, detections, ['dog'])
    assert metrics['VOC07_AP50/dog'] == metrics['VOC07_AP50'] == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)
    assert metrics['VOC_AP50/dog'] == metrics['VOC_AP50'] == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3)


@pytest.mark.parametrize(('height', 'score'), [(5, 1.0), (4, 0.0)])
def test_half_an_object_is_enough_counted_in_whole_pixels(height, score):
    # 10 x 10 pixels, corners included; the detection has its upper rows. IoU 50 / 100 just counts, 40 / 100 does not.
    assert ap([truth([[1, 1, 10, 10]], [0])], [found([[1, 1, 10, height]], [1], [0])]) == score


def test_a_second_look_at_an_object_is_a_false_positive_even_if_another_object_is_free():
    # Both detections overlap the left object most; COCO would give the second one the right object.
    ground_truth = [truth([[0, 0, 99, 99], [20, 0, 119, 99]], [0, 0])]
    detections = [found([[0, 0, 99, 99], [4, 0, 103, 99]], [0.9, 0.8], [0, 0])]
    assert ap(ground_truth, detections) == 0.5


def test_difficult_objects_count_neither_for_nor_against():
    boxes = [[0, 0, 9, 9], [50, 0, 59, 9]]
    detections = [found([boxes[1], boxes[1], boxes[0]], [0.9, 0.8, 0.7], [0, 0, 0])]
    assert ap([truth(boxes, [0, 0], difficult=[0, 1])], detections) == 1
    assert ap([truth(boxes, [0, 0])], detections) < 1
    assert math.isnan(ap([truth(boxes, [0, 0], difficult=[1, 1])], detections))


def test_an_object_of_another_class_or_image_is_no_match():
    box = [[0, 0, 9, 9]]
    assert voc_metrics([truth(box, [0])], [found(box, [1], [1])], ['a', 'b'])['VOC_AP50/a'] == 0
    assert ap([truth(box, [0]), truth([], [])], [found([], [], []), found(box, [1], [0])]) == 0


def test_equal_scores_keep_the_order_of_the_detections():
    ground_truth = [truth([[0, 0, 9, 9]], [0])]
    hit, miss = [0, 0, 9, 9], [50, 50, 59, 59]
    assert ap(ground_truth, [found([hit, miss], [0.5, 0.5], [0, 0])]) == 1
    assert ap(ground_truth, [found([miss, hit], [0.5, 0.5], [0, 0])]) == 0.5


def test_no_detections_score_zero_and_classes_without_objects_are_nan():
    metrics = voc_metrics([truth([[0, 0, 9, 9]], [1])], [found([], [], [])], ['absent', 'missed'])
    assert metrics['VOC_AP50'] == metrics['VOC07_AP50'] == metrics['VOC_AP50/missed'] == 0
    assert math.isnan(metrics['VOC07_AP50/absent'])


def test_no_images_is_the_users_error():
    with pytest.raises(UserError, match='no images'):
        voc_metrics([], [], ['a'])


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 10))
def test_averages_lie_within_bounds_and_trailing_misses_change_nothing(hits, missed):
    is_hit, num_objects = np.array(hits, bool), max(1, sum(hits) + missed)
    for average in (eleven_point_average, area_average):
        value = average(is_hit, num_objects)
        assert 0 <= value <= 1
        assert average(np.append(is_hit, [False] * 5), num_objects) == pytest.approx(value)


@pytest.mark.parametrize('num_hits', range(11))
def test_averages_of_a_detector_that_makes_no_mistakes(num_hits):
    is_hit = np.ones(num_hits, bool)
    assert area_average(is_hit, 10) == pytest.approx(num_hits / 10)
    assert eleven_point_average(is_hit, 10) == pytest.approx((num_hits + 1) / 11 if num_hits else 0)


def ap(ground_truth, detections):
    return voc_metrics(ground_truth, detections, ['a'])['VOC_AP50']


def one_by_one(ground_truth, detections, names):
    """The development kit's loops, spelled out."""
    metrics = {}
    for k, name in enumerate(names):
        rows = [
            (float(score), i, box)
            for i, image in enumerate(detections)
            for box, score, label in zip(image.boxes_xyxy, image.scores, image.labels, strict=True)
            if label == k
        ]
        rows.sort(key=lambda row: -row[0])
        taken, hits = set(), []
        for _, i, box in rows:
            overlaps = [
                (iou(box, b), j) for j, b in enumerate(ground_truth[i].boxes_xyxy) if ground_truth[i].labels[j] == k
            ]
            best, j = max(overlaps, key=lambda pair: pair[0], default=(0, -1))
            if best >= 0.5:
                if ground_truth[i].is_difficult[j] or ground_truth[i].is_crowd[j]:
                    continue
                hits.append((i, j) not in taken)
                taken.add((i, j))
            else:
                hits.append(False)
        positives = sum(int(np.sum((g.labels == k) & ~g.is_difficult & ~g.is_crowd)) for g in ground_truth)
        points = [(sum(hits[: n + 1]), sum(hits[: n + 1]) / (n + 1)) for n in range(len(hits))]
        best_from = [max([p for h, p in points if 10 * h >= t * positives], default=0) for t in range(11)]
        steps = [max(p for h, p in points if h >= need) for need in range(1, sum(hits) + 1)]
        metrics[f'VOC07_AP50/{name}'] = sum(best_from) / 11 if positives else math.nan
        metrics[f'VOC_AP50/{name}'] = sum(steps) / positives if positives else math.nan
    for kind in ('VOC07_AP50', 'VOC_AP50'):
        metrics[kind] = np.nanmean([metrics[f'{kind}/{name}'] for name in names])
    return metrics


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return float(width * height / (sum(areas) - width * height))
