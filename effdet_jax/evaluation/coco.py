"""COCO average precision and recall, computed by faster-coco-eval."""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

# name: (table, IoU threshold or None for all ten, area range, detections per image and class)
SUMMARY = {
    'AP': ('precision', None, 'all', 100),
    'AP50': ('precision', 0.5, 'all', 100),
    'AP75': ('precision', 0.75, 'all', 100),
    'AP_small': ('precision', None, 'small', 100),
    'AP_medium': ('precision', None, 'medium', 100),
    'AP_large': ('precision', None, 'large', 100),
    'AR1': ('recall', None, 'all', 1),
    'AR10': ('recall', None, 'all', 10),
    'AR100': ('recall', None, 'all', 100),
    'AR_small': ('recall', None, 'small', 100),
    'AR_medium': ('recall', None, 'medium', 100),
    'AR_large': ('recall', None, 'large', 100),
}


def coco_metrics(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> dict[str, float]:
    """The twelve COCO metrics, then `AP/<class>` and `AP50/<class>`, each in [0, 1].

    All keys are always present. A metric without ground truth (a class without objects, no small objects) is nan, where
    COCO has -1, and is left out of the means. Objects without detections score 0. A crowd matches any number of
    detections, which are then ignored. COCO has no difficult objects, so they are treated as crowds.

    Args:
        ground_truth, detections: one entry per image, in the same order.
        class_names: the names of labels 0, 1, ...

    Raises:
        UserError: if there are no images, or a label has no name.
    """
    tables = _tables(ground_truth, detections, len(class_names))
    metrics = {name: _mean(tables, metric, classes=slice(None)) for name, metric in SUMMARY.items()}
    for metric in ('AP', 'AP50'):
        metrics |= {
            f'{metric}/{name}': _mean(tables, SUMMARY[metric], classes=label) for label, name in enumerate(class_names)
        }
    return metrics


def coco_by_size(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For small, medium and large objects: the number of `objects`, `AP`, `AP50`, `AR100`, and `AP/<class>`.

    As in COCO, small means an area of at most 32^2 pixels, large one of at least 96^2; an area on a limit counts for
    both sizes. Otherwise as in `coco_metrics`.
    """
    tables = _tables(ground_truth, detections, len(class_names))
    areas_M = np.concatenate([truth.areas[~(truth.is_crowd | truth.is_difficult)] for truth in ground_truth])
    sizes = {}
    for size in ('small', 'medium', 'large'):
        low, high = tables['area_range'][tables['area'].index(size)]
        metrics = {
            'AP': ('precision', None, size, 100),
            'AP50': ('precision', 0.5, size, 100),
            'AR100': ('recall', None, size, 100),
        }
        row = {name: _mean(tables, metric, slice(None)) for name, metric in metrics.items()}
        row |= {f'AP/{name}': _mean(tables, metrics['AP'], label) for label, name in enumerate(class_names)}
        sizes[size] = {'objects': int(((areas_M >= low) & (areas_M <= high)).sum()), **row}
    return sizes


def _as_coco(images: Sequence[GroundTruth] | Sequence[Detections], num_classes: int) -> COCO:
    """An in-memory COCO file. Ids start at 1, because COCO treats a match with annotation 0 as no match."""
    annotations = [row for image_id, image in enumerate(images, start=1) for row in _annotations(image, image_id)]
    for annotation_id, annotation in enumerate(annotations, start=1):
        annotation['id'] = annotation_id
    return COCO(
        {
            'images': [{'id': image_id} for image_id in range(1, len(images) + 1)],
            'categories': [{'id': label} for label in range(num_classes)],
            'annotations': annotations,
        }
    )


def _annotations(image: GroundTruth | Detections, image_id: int) -> list[dict]:
    boxes_N4 = image.boxes_xyxy.astype(np.float64)
    sizes_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    if isinstance(image, GroundTruth):
        ignored_N = (image.is_crowd | image.is_difficult).astype(int).tolist()
        columns = {'area': image.areas.tolist(), 'iscrowd': ignored_N}
    else:
        columns = {'area': sizes_N2.prod(axis=1).tolist(), 'score': image.scores.tolist()}
    columns['bbox'] = np.concatenate([boxes_N4[:, :2], sizes_N2], axis=1).tolist()
    columns['category_id'] = image.labels.tolist()
    return [
        {'image_id': image_id, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)
    ]


def _tables(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], num_classes: int) -> dict:
    """Tables with axes T IoU thresholds, R recalls, K classes, A area ranges, M detections per image."""
    check_pairs(ground_truth, detections, num_classes)
    truth, results = _as_coco(ground_truth, num_classes), _as_coco(detections, num_classes)
    evaluation = COCOeval_faster(truth, results, iouType='bbox', print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    p = evaluation.params
    return {
        'precision': evaluation.eval['precision'],  # [T R K A M]
        'recall': evaluation.eval['recall'][:, None],  # [T 1 K A M]
        'iou': list(np.round(p.iouThrs, 2)),
        'area': list(p.areaRngLbl),
        'area_range': list(p.areaRng),
        'max_detections': list(p.maxDets),
    }


def _mean(tables: dict, metric: tuple[str, float | None, str, int], classes: int | slice) -> float:
    """The mean over the defined values of a metric (those that are not -1), nan if there are none."""
    table, iou, area, max_detections = metric
    t = slice(None) if iou is None else tables['iou'].index(iou)
    part = tables[table][t, ..., classes, tables['area'].index(area), tables['max_detections'].index(max_detections)]
    defined = part[part > -1]
    return float(defined.mean()) if defined.size else float('nan')
