"""Runs a detector over a data set, on any number of devices and hosts, and computes COCO and VOC metrics."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effdet_jax import config as run_config
from effdet_jax import data, inspection
from effdet_jax.errors import UnreadableError
from effdet_jax.evaluation import Detections, GroundTruth, coco_metrics, voc_metrics
from effdet_jax.inference.detector import make_detect, to_original
from effdet_jax.model import build_model
from effdet_jax.records import pictures
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.records.console import info, table, track, warn
from effdet_jax.runtime import devices

SUMMARY = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR100', 'VOC07_AP50', 'VOC_AP50')


class ImageResult(NamedTuple):
    """The detections in one image. error: why it could not be read; '' if it could."""

    annotations: data.Annotations
    detections: Detections
    error: str = ''


Results = dict[int, ImageResult]  # by index into the source


class BestEvaluation(NamedTuple):
    """An evaluation of the best checkpoint: its step, the evaluation split, metrics and detections."""

    step: int
    source: data.Source
    metrics: dict[str, float]
    results: Results


def evaluate_best(config: Any, workdir: Path) -> dict[str, float]:
    """The metrics of `best_evaluation`."""
    return best_evaluation(config, workdir).metrics


def best_evaluation(config: Any, workdir: Path) -> BestEvaluation:
    """Evaluates the best checkpoint of `workdir` on the config's evaluation split.

    The training data are not needed: the classes are in the run's own config.

    Raises:
      UserError: if the work directory holds no run of this config.
    """
    run_config.check(config)
    d = config.dataset
    source = data.open_source(d.source, d.eval_split, d.class_names or run_config.load(workdir).dataset.class_names)
    remember_classes(config, source, d.category_ids)
    run_config.refuse_another(config, workdir, only=run_config.NETWORK_KEYS)
    step, variables = load_variables(workdir, config.checkpoint.best)
    inspection.check_sources(config, {'eval': source})
    info(f'evaluating {workdir}, step {step}, on {len(source)} images')
    detect = devices.map_devices(make_detect(config, build_model(config.model, len(source.class_names))))
    metrics, results = make_evaluate(config, source, detect)(devices.replicate(variables))
    return BestEvaluation(step, source, metrics, results)


def remember_classes(config: Any, source: data.Source, category_ids: Sequence[int]) -> None:
    """Adds the classes found in the data to the config, so that `config.json` alone says what a label means."""
    with config.unlocked():
        config.dataset.class_names = source.class_names
        config.dataset.category_ids = tuple(category_ids) or source.category_ids


def make_evaluate(
    config: Any, source: data.Source, detect: Callable
) -> Callable[[Any], tuple[dict[str, float], Results]]:
    """Returns `evaluate(variables)` -> (metrics, detections by image). `detect` is mapped, `variables` are replicated.

    Metrics are named AP, AP50, ..., VOC_AP50, AP/<class>. Boxes are in pixels of the original images. An image that
    cannot be read counts as an image without detections: its objects count as missed, and it is named and counted in
    `images_unreadable`. Without it, a damaged copy of the data could score better than the original.

    Raises:
      UserError: if more than the share config.dataset.max_unreadable_fraction of the images cannot be read.
    """
    c, image_size, names = config.eval, tuple(config.image.size), source.class_names
    batch_size = devices.host_batch_size('config.eval.batch_size', c.batch_size)
    threads, prefetch = config.dataset.threads, config.dataset.prefetch
    max_unreadable = config.dataset.max_unreadable_fraction
    num_batches = -(-len(source) // c.batch_size)

    def evaluate(variables: Any) -> tuple[dict[str, float], Results]:
        host, num_hosts = devices.host()
        batches = data.eval_batches(
            source, image_size=image_size, batch_size=batch_size, host=host, num_hosts=num_hosts, threads=threads,
            prefetch=prefetch,
        )  # fmt: skip
        mine: Results = {}
        for batch in track(batches, num_batches, 'evaluating'):
            arrays = devices.shard({'image': batch.image, 'valid_size': batch.valid_size})
            detected = devices.unshard(detect(variables, arrays['image'], arrays['valid_size']))
            boxes_xyxy, scores, labels = to_original(detected, batch.image_scale)
            for i, annotations in enumerate(batch.annotations):  # padding comes last and has none
                used = (labels[i] >= 0) & (batch.errors[i] == '')
                detections = Detections(boxes_xyxy[i][used], scores[i][used], labels[i][used])
                mine[int(batch.index[i])] = ImageResult(annotations, detections, batch.errors[i])
        everything = {index: image for part in devices.gather_objects(mine) for index, image in part.items()}
        results = dict(sorted(everything.items()))
        errors = [image.error for image in results.values() if image.error]
        for error in errors:
            warn(f'counted as an image without detections: {error}')
        data.check_unreadable(errors, len(source), max_unreadable)
        truths = [to_ground_truth_xyxy(image.annotations) for image in results.values()]
        detections = [image.detections for image in results.values()]
        metrics = coco_metrics(truths, detections, names) | voc_metrics(truths, detections, names)
        return metrics | {'images_unreadable': float(len(errors))}, results

    return evaluate


def to_ground_truth_xyxy(annotations: data.Annotations) -> GroundTruth:
    """Annotations (yxyx) as ground truth for the evaluators (xyxy)."""
    a = annotations
    return GroundTruth(a.boxes_yxyx[:, [1, 0, 3, 2]], a.labels, a.areas, a.is_crowd, a.is_difficult)


def draw(source: data.Source, results: Results, count: int) -> dict[str, np.ndarray]:
    """Draws detections beside ground truth for the first `count` readable images: {image name: RGB}."""
    drawn = {}
    for index, image in results.items():
        if len(drawn) == count:
            break
        try:
            pixels = data.load(source, index)[0]
        except UnreadableError:
            continue
        truth, detected = to_ground_truth_xyxy(image.annotations), image.detections
        drawn[f'{index:06d}'] = pictures.detections_beside_truth(
            pixels, truth.boxes_xyxy, truth.labels, detected.boxes_xyxy, detected.labels, detected.scores,
            source.class_names,
        )  # fmt: skip
    return drawn


def summary(metrics: dict[str, float], class_names: tuple[str, ...]) -> str:
    """Two tables for the terminal: the headline numbers, and AP per class."""
    per_class = [(name, metrics[f'AP/{name}'], metrics[f'AP50/{name}']) for name in class_names]
    head = table(SUMMARY, [[metrics[name] for name in SUMMARY]])
    return f'{head}\n\n{table(("class", "AP", "AP50"), per_class)}'
