"""A detector over a whole data set: every image once, on any number of devices and hosts -> COCO and VOC numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from effdet_jax import data
from effdet_jax.errors import UnreadableError
from effdet_jax.evaluation import Detections, GroundTruth, coco_metrics, voc_metrics
from effdet_jax.inference.detector import to_original
from effdet_jax.records import pictures
from effdet_jax.records.metrics import table, track, warn
from effdet_jax.training import parallel

SUMMARY = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR100', 'VOC07_AP50', 'VOC_AP50')

Found = dict[int, tuple[data.Annotations, Detections]]  # by index into the source


def make_evaluate(
    config: Any, source: data.Source, detect: Callable
) -> Callable[[Any], tuple[dict[str, float], Found]]:
    """`evaluate(variables) -> (metrics, all detections)`; `detect` is mapped, and `variables` are replicated.

    Metrics are named AP, AP50, ..., VOC_AP50, AP/<class>; boxes are in pixels of the original images. An image that
    cannot be read counts as one in which nothing is found: its objects are missed, and it is named and counted in
    `images_unreadable`. Leaving it out would make the figures of a damaged copy better than those of a sound one.

    Raises:
      UserError: when more than the share config.dataset.max_unreadable of the images cannot be read.
    """
    c, image_size, names = config.eval, tuple(config.image.size), source.class_names
    batch_size = parallel.host_batch_size('config.eval.batch_size', c.batch_size)
    threads, prefetch = config.dataset.threads, config.dataset.prefetch
    max_unreadable = config.dataset.max_unreadable
    num_batches = -(-len(source) // c.batch_size)

    def evaluate(variables: Any) -> tuple[dict[str, float], Found]:
        host, num_hosts = parallel.host()
        batches = data.eval_batches(
            source, image_size=image_size, batch_size=batch_size, host=host, num_hosts=num_hosts, threads=threads,
            prefetch=prefetch,
        )  # fmt: skip
        mine: Found = {}
        errors: list[str] = []
        for batch in track(batches, num_batches, 'evaluating'):
            arrays = parallel.shard({'image': batch.image, 'valid_size': batch.valid_size})
            found = parallel.unshard(detect(variables, arrays['image'], arrays['valid_size']))
            boxes_xyxy, scores, labels = to_original(found, batch.image_scale)
            errors += filter(None, batch.errors)
            for i, annotations in enumerate(batch.annotations):  # padding comes last and has none
                used = (labels[i] >= 0) & (batch.errors[i] == '')
                detections = Detections(boxes_xyxy[i][used], scores[i][used], labels[i][used])
                mine[int(batch.index[i])] = annotations, detections
        parts = parallel.gather_objects((mine, errors))
        errors = [error for _, part in parts for error in part]
        for error in errors:
            warn(f'counted as an image in which nothing is found: {error}')
        data.check_unreadable(errors, len(source), max_unreadable)
        everything = {index: pair for part, _ in parts for index, pair in part.items()}
        found = dict(sorted(everything.items()))
        truths = [to_ground_truth_xyxy(annotations) for annotations, _ in found.values()]
        detections = [d for _, d in found.values()]
        metrics = coco_metrics(truths, detections, names) | voc_metrics(truths, detections, names)
        return metrics | {'images_unreadable': float(len(errors))}, found

    return evaluate


def to_ground_truth_xyxy(annotations: data.Annotations) -> GroundTruth:
    """Annotations yxyx as the evaluators take them."""
    a = annotations
    return GroundTruth(a.boxes_yxyx[:, [1, 0, 3, 2]], a.labels, a.areas, a.is_crowd, a.is_difficult)


def draw(source: data.Source, found: Found, count: int) -> dict[str, np.ndarray]:
    """Detections beside ground truth for the first `count` images that can be read, {image name: RGB}."""
    drawn = {}
    for index, (annotations, detections) in found.items():
        if len(drawn) == count:
            break
        try:
            pixels = data.load(source, index)[0]
        except UnreadableError:
            continue
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
