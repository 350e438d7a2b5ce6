"""COCO's evaluation at COCO's size: python -m experiments.benchmarks.evaluation [IMAGES] [DETECTIONS] [REPEATS]

Random objects of 80 classes, as many in an image as COCO's validation split has, and detections of which a third lie
near an object. The time of `coco_metrics`, which is all that an evaluation computes on the host after the detector.
"""

import sys

import numpy as np

from effdet_jax.evaluation import Detections, GroundTruth, coco_metrics
from effdet_jax.records.console import info, stage, table
from effdet_jax.runtime import timing

CLASSES = 80
OBJECTS = 7.3  # of an image: 36,781 in 5,000
SIDE = 640.0


def main(images: int = 5000, detections: int = 100, repeats: int = 3) -> None:
    rng = np.random.default_rng(0)
    with stage(f'drawing {images} images'):
        truths = [draw_objects(rng) for _ in range(images)]
        found = [draw_detections(rng, truth, detections) for truth in truths]
    names = [f'class {label}' for label in range(CLASSES)]
    metrics: dict[str, float] = {}
    seconds = []
    for _ in range(repeats):
        with stage('evaluating'):
            seconds.append(timing.seconds_of(lambda: metrics.update(coco_metrics(truths, found, names))))
    s = timing.spread(seconds)
    row = (
        images,
        images * detections,
        f'{s.median:.1f}',
        f'{s.low:.1f} to {s.high:.1f}',
        metrics['AP'],
        metrics['AR100'],
    )
    info(table(('images', 'detections', 's', 'middle half', 'AP', 'AR100'), [row]))


def draw_objects(rng: np.random.Generator) -> GroundTruth:
    """Sides from 8 pixels to the whole image, small ones more often."""
    count = rng.poisson(OBJECTS)
    size_M2 = np.exp(rng.uniform(np.log(8), np.log(SIDE), (count, 2)))
    corner_M2 = rng.uniform(0, SIDE - size_M2)
    boxes_M4 = np.concatenate([corner_M2, corner_M2 + size_M2], axis=1).astype(np.float32)
    nothing_M = np.zeros(count, bool)
    return GroundTruth(boxes_M4, rng.integers(0, CLASSES, count), size_M2.prod(axis=1), nothing_M, nothing_M)


def draw_detections(rng: np.random.Generator, truth: GroundTruth, count: int) -> Detections:
    boxes_N4, labels_N = draw_many(rng, count)
    if near := min(count // 3, 5 * len(truth.labels)):
        which = rng.integers(0, len(truth.labels), near)
        boxes_N4[:near] = truth.boxes_xyxy[which] + rng.normal(0, 4, (near, 4))
        labels_N[:near] = truth.labels[which]
    return Detections(boxes_N4.astype(np.float32), rng.uniform(0, 1, count).astype(np.float32), labels_N)


def draw_many(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(boxes anywhere [N, 4], labels [N])."""
    corners_N22 = np.sort(rng.uniform(0, SIDE, (count, 2, 2)), axis=1)
    return corners_N22.reshape(count, 4), rng.integers(0, CLASSES, count)


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
