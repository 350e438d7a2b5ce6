"""A detector over a whole data set: every image once, on any number of devices and hosts -> COCO and VOC numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from effdet_jax import data
from effdet_jax.evaluation import Detections, GroundTruth, coco_metrics, voc_metrics
from effdet_jax.inference.detector import to_original
from effdet_jax.records import pictures
from effdet_jax.records.metrics import table, track
from effdet_jax.training import parallel

SUMMARY = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR100', 'VOC07_AP50', 'VOC_AP50')

Found = dict[int, tuple[data.Annotations, Detections]]  # by index into the source


def make_evaluate(
    config: Any, source: data.Source, detect: Callable
) -> Callable[[Any], tuple[dict[str, float], Found]]:
    """`evaluate(variables) -> (metrics, all detections)`; `detect` is mapped, and `variables` are replicated.

    Metrics are named AP, AP50, ..., VOC_AP50, AP/<class>; boxes are in pixels of the original images.
    """
    c, image_size, names = config.eval, tuple(config.image.size), source.class_names
    batch_size = parallel.host_batch_size('config.eval.batch_size', c.batch_size)
    threads, prefetch = config.dataset.threads, config.dataset.prefetch
    num_batches = -(-len(source) // c.batch_size)

    def evaluate(variables: Any) -> tuple[dict[str, float], Found]:
        host, num_hosts = parallel.host()
        batches = data.eval_batches(
            source, image_size=image_size, batch_size=batch_size, host=host, num_hosts=num_hosts, threads=threads,
            prefetch=prefetch,
        )  # fmt: skip
        mine: Found = {}
        for batch in track(batches, num_batches, 'evaluating'):
            arrays = parallel.shard({'image': batch.image, 'valid_size': batch.valid_size})
            found = parallel.unshard(detect(variables, arrays['image'], arrays['valid_size']))
            boxes_xyxy, scores, labels = to_original(found, batch.image_scale)
            for i, annotations in enumerate(batch.annotations):  # padding comes last and has none
                used = labels[i] >= 0
                detections = Detections(boxes_xyxy[i][used], scores[i][used], labels[i][used])
                mine[int(batch.index[i])] = annotations, detections
        everything = {index: pair for part in parallel.gather_objects(mine) for index, pair in part.items()}
        found = dict(sorted(everything.items()))
        truths = [to_ground_truth_xyxy(annotations) for annotations, _ in found.values()]
        detections = [d for _, d in found.values()]
        return coco_metrics(truths, detections, names) | voc_metrics(truths, detections, names), found

    return evaluate


def to_ground_truth_xyxy(annotations: data.Annotations) -> GroundTruth:
    """Annotations yxyx as the evaluators take them."""
    a = annotations
    return GroundTruth(a.boxes_yxyx[:, [1, 0, 3, 2]], a.labels, a.areas, a.is_crowd, a.is_difficult)


def draw(source: data.Source, found: Found, count: int) -> dict[str, np.ndarray]:
    """Detections beside ground truth for the first `count` images, {image name: RGB}."""
    drawn = {}
    for index in list(found)[:count]:
        annotations, detections = found[index]
        example = source[index]
        image = example.image
        pixels = data.decode(image, annotations.file_name) if isinstance(image, bytes) else image
        truth = to_ground_truth_xyxy(annotations)
        drawn[f'{index:06d}'] = pictures.detections_beside_truth(
            pixels, truth.boxes_xyxy, truth.labels, detections.boxes_xyxy, detections.labels, detections.scores,
            source.class_names,
        )  # fmt: skip
    return drawn


def summary(metrics: dict[str, float], class_names: tuple[str, ...]) -> str:
    """Two tables for the terminal: the headline numbers, and AP per class."""
    per_class = [(name, metrics[f'AP/{name}'], metrics[f'AP50/{name}']) for name in class_names]
    head = table(SUMMARY, [[metrics[name] for name in SUMMARY]])
    return f'{head}\n\n{table(("class", "AP", "AP50"), per_class)}'
