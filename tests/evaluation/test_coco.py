import contextlib
import io
import math

import numpy as np
import pytest
from evaluation_cases import as_detections, found, random_case, truth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effdet_jax.errors import UserError
from effdet_jax.evaluation import coco_metrics
from effdet_jax.evaluation.coco import SUMMARY


@pytest.mark.parametrize('seed', range(8))
def test_equals_pycocotools(seed):
    case = random_case(seed, num_classes=1 + seed % 4)
    metrics, oracle = coco_metrics(*case), pycocotools(*case)
    assert metrics.keys() == oracle.keys()
    for name, value in oracle.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_more_than_a_hundred_detections_equal_pycocotools():
    (ground_truth, _, names), rng = random_case(0, num_images=1), np.random.default_rng(1)
    boxes = ground_truth[0].boxes_xyxy[rng.integers(0, len(ground_truth[0].labels), 150)] + rng.normal(0, 3, (150, 4))
    detections = [found(boxes, rng.random(150), np.zeros(150))]
    metrics, oracle = (measure(ground_truth, detections, names) for measure in (coco_metrics, pycocotools))
    assert metrics == pytest.approx(oracle, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize('crowds', [False, True])
def test_ground_truth_as_detections_scores_one(crowds):
    ground_truth, _, names = random_case(3, num_images=20, crowds=crowds)
    metrics = coco_metrics(ground_truth, [as_detections(image) for image in ground_truth], names)
    ones = [name for name in metrics if name not in ('AR1', 'AR10')]
    assert {name: metrics[name] for name in ones} == dict.fromkeys(ones, 1.0)


def test_hand_computed():
    # Two objects. Best detection: exact. Second: nothing there. Third: IoU 0.6 with the other object, so a match at the
    # thresholds 0.5, 0.55 and 0.6. Precision is 1 up to recall 1/2 (51 of the 101 points), then 2/3 or 0.
    ground_truth = [truth([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])]
    detections = [found([[0, 0, 10, 10], [90, 90, 99, 99], [50, 50, 60, 56]], [0.9, 0.8, 0.7], [0, 0, 0])]
    metrics = coco_metrics(ground_truth, detections, ['cell'])
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    expected = {'AP50': low, 'AP75': high, 'AP': 0.3 * low + 0.7 * high, 'AR1': 0.5, 'AR100': 0.3 * 1 + 0.7 * 0.5}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert metrics['AP/cell'] == metrics['AP'] and metrics['AP50/cell'] == metrics['AP50']
    assert metrics['AP_small'] == metrics['AP'] and math.isnan(metrics['AP_large'])


def test_the_size_of_an_object_is_its_area_in_the_dataset():
    small = truth([[0, 0, 200, 200]], [0], areas=[100])
    metrics = coco_metrics([small], [as_detections(small)], ['a'])
    assert metrics['AP_small'] == 1 and math.isnan(metrics['AP_large'])


def test_no_detections_score_zero_and_classes_without_objects_are_nan():
    ground_truth = [truth([[0, 0, 10, 10]], [1]), truth([], [])]
    metrics = coco_metrics(ground_truth, [found([], [], [])] * 2, ['absent', 'missed'])
    assert metrics['AP'] == metrics['AR100'] == metrics['AP/missed'] == metrics['AP50/missed'] == 0
    assert math.isnan(metrics['AP/absent']) and math.isnan(metrics['AP50/absent'])


def test_keys_do_not_depend_on_the_images():
    empty = coco_metrics([truth([], [])], [found([], [], [])], ['a', 'b'])
    assert [*empty] == [*SUMMARY, 'AP/a', 'AP/b', 'AP50/a', 'AP50/b']
    assert all(math.isnan(value) for value in empty.values())


@pytest.mark.parametrize('mark', ['crowd', 'difficult'])
def test_ignored_objects_count_neither_for_nor_against(mark):
    boxes, labels = [[0, 0, 40, 40], [100, 0, 140, 40]], [0, 0]
    everything = found([*boxes, [100, 0, 120, 40]], [0.5, 0.9, 0.8], [0, 0, 0])
    assert coco_metrics([truth(boxes, labels, **{mark: [0, 1]})], [everything], ['a'])['AP'] == pytest.approx(1)
    assert coco_metrics([truth(boxes, labels)], [everything], ['a'])['AP'] < 1


def test_prints_nothing(capfd):
    coco_metrics(*random_case(0, num_images=2))
    assert capfd.readouterr() == ('', '')


def test_errors_name_what_to_mend():
    with pytest.raises(UserError, match='no images'):
        coco_metrics([], [], ['a'])
    with pytest.raises(UserError, match=r'image 0 has label 1, but the labels are 0 to 0'):
        coco_metrics([truth([[0, 0, 1, 1]], [1])], [found([], [], [])], ['a'])
    with pytest.raises(UserError, match=r'detections of image 0 has label -1'):
        coco_metrics([truth([], [])], [found([[0, 0, 1, 1]], [1], [-1])], ['a'])
    with pytest.raises(ValueError, match='1 images of ground truth, 0 images of detections'):
        coco_metrics([truth([], [])], [], ['a'])


def pycocotools(ground_truth, detections, names):
    """The reference implementation, fed through files' dictionaries and its own summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth_coco, found_coco = coco(ground_truth, len(names)), coco(detections, len(names))
        metrics = dict(zip(SUMMARY, summary(truth_coco, found_coco), strict=True))
        per_class = [summary(truth_coco, found_coco, label + 1) for label in range(len(names))]
    for column, name in enumerate(('AP', 'AP50')):
        metrics |= {f'{name}/{names[k]}': numbers[column] for k, numbers in enumerate(per_class)}
    return {name: math.nan if value == -1 else value for name, value in metrics.items()}


def summary(truth_coco, found_coco, category=None):
    evaluation = COCOeval(truth_coco, found_coco, 'bbox')
    if category is not None:
        evaluation.params.catIds = [category]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def coco(images, num_classes):
    annotations = []
    for image_id, image in enumerate(images, 1):
        for i, (x1, y1, x2, y2) in enumerate(image.boxes_xyxy.astype(float)):
            row = {'image_id': image_id, 'bbox': [x1, y1, x2 - x1, y2 - y1], 'category_id': int(image.labels[i]) + 1}
            if hasattr(image, 'scores'):
                row |= {'score': float(image.scores[i]), 'area': (x2 - x1) * (y2 - y1), 'iscrowd': 0}
            else:
                row |= {'area': float(image.areas[i]), 'iscrowd': int(image.is_crowd[i])}
            annotations.append(row | {'id': len(annotations) + 1})
    result = COCO()
    result.dataset = {
        'images': [{'id': i} for i in range(1, len(images) + 1)],
        'categories': [{'id': k + 1} for k in range(num_classes)],
        'annotations': annotations,
    }
    result.createIndex()
    return result
