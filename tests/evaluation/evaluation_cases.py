"""Random evaluations, shared by the tests of both metrics."""

import numpy as np

from effdet_jax.evaluation import Detections, GroundTruth


def truth(boxes, labels, areas=None, crowd=None, difficult=None) -> GroundTruth:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    zeros = np.zeros(len(boxes), bool)
    return GroundTruth(
        boxes,
        np.asarray(labels, int).reshape(-1),
        np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if areas is None else np.asarray(areas, np.float32),
        zeros if crowd is None else np.asarray(crowd, bool),
        zeros if difficult is None else np.asarray(difficult, bool),
    )


def found(boxes, scores, labels) -> Detections:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return Detections(boxes, np.asarray(scores, np.float32).reshape(-1), np.asarray(labels, int).reshape(-1))


def as_detections(image: GroundTruth) -> Detections:
    """Ground truth as a perfect detector would find it."""
    return Detections(image.boxes_xyxy, np.ones(len(image.labels), np.float32), image.labels)


def random_case(seed: int, num_images=12, num_classes=3, crowds=True, difficult=False, whole_pixels=False):
    """Objects of all sizes; detections near them, doubled, of the wrong class or nowhere, some with equal scores."""
    rng = np.random.default_rng(seed)
    ground_truth, detections = [], []
    for _ in range(num_images):
        boxes_M4 = _boxes(rng, rng.integers(0, 9))
        labels_M = rng.integers(0, num_classes, len(boxes_M4))
        copies_N = rng.integers(0, len(boxes_M4), rng.integers(0, 25)) if len(boxes_M4) else np.zeros(0, int)
        sizes_N2 = boxes_M4[copies_N, 2:] - boxes_M4[copies_N, :2]
        near_N4 = boxes_M4[copies_N] + rng.normal(0, 0.1, (len(copies_N), 4)) * np.tile(sizes_N2, 2)
        near_N4[:, 2:] = np.maximum(near_N4[:, 2:], near_N4[:, :2] + 1)
        wrong_N = rng.random(len(copies_N)) < 0.1
        labels_N = np.where(wrong_N, rng.integers(0, num_classes, len(copies_N)), labels_M[copies_N])
        nowhere_4 = _boxes(rng, rng.integers(0, 6))
        boxes_N4 = np.concatenate([near_N4, nowhere_4])
        labels_N = np.concatenate([labels_N, rng.integers(0, num_classes, len(nowhere_4))])
        if whole_pixels:
            boxes_M4, boxes_N4 = boxes_M4.round(), boxes_N4.round()
        segments_M = np.prod(boxes_M4[:, 2:] - boxes_M4[:, :2], axis=1) * rng.uniform(0.4, 1, len(boxes_M4))
        is_crowd_M = (rng.random(len(boxes_M4)) < 0.15) & crowds
        is_difficult_M = (rng.random(len(boxes_M4)) < 0.2) & difficult
        ground_truth.append(truth(boxes_M4, labels_M, segments_M, is_crowd_M, is_difficult_M))
        detections.append(found(boxes_N4, rng.integers(1, 50, len(boxes_N4)) / 50, labels_N))
    return ground_truth, detections, [f'class {k}' for k in range(num_classes)]


def _boxes(rng, count):
    corners_N2 = rng.uniform(0, 300, (count, 2))
    return np.concatenate([corners_N2, corners_N2 + np.exp(rng.uniform(np.log(5), np.log(300), (count, 2)))], axis=1)
