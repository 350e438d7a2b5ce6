"""COCO's average precision and recall, counted by faster-coco-eval."""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from effdet_jax.evaluation.types import Detections, GroundTruth, check_pairs

# name: (table, IoU threshold or all ten, area range, detections per image and class)
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
    """COCO's twelve numbers, then `AP/<class>` and `AP50/<class>`, each in [0, 1].

    The keys are always the same: a number about which the ground truth says nothing (a class without objects, no small
    objects; COCO's -1) is nan, and a class without objects does not count in the means. Objects without detections
    score 0. A crowd is matched by any number of detections and counts neither for nor against them; COCO knows no
    difficult objects, so they are treated as crowds.

    Args:
        ground_truth, detections: one entry an image, in the same order.
        class_names: the name of label 0, 1, ...

    Raises:
        UserError: no images, or a label without a name.
    """
    check_pairs(ground_truth, detections, len(class_names))
    tables = _count(_as_coco(ground_truth, len(class_names)), _as_coco(detections, len(class_names)))
    metrics = {name: _mean(tables, number, classes=slice(None)) for name, number in SUMMARY.items()}
    for number in ('AP', 'AP50'):
        metrics |= {
            f'{number}/{name}': _mean(tables, SUMMARY[number], classes=label) for label, name in enumerate(class_names)
        }
    return metrics


def coco_by_size(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For small, medium and large objects: how many `objects`, `AP`, `AP50`, `AR100`, and `AP/<class>`.

    Small is an area of up to 32^2 pixels, large one of 96^2 or more, COCO's; an area on a limit is of both sizes.
    Otherwise as `coco_metrics`.
    """
    check_pairs(ground_truth, detections, len(class_names))
    tables = _count(_as_coco(ground_truth, len(class_names)), _as_coco(detections, len(class_names)))
    areas_M = np.concatenate([truth.areas[~(truth.is_crowd | truth.is_difficult)] for truth in ground_truth])
    sizes = {}
    for size in ('small', 'medium', 'large'):
        low, high = tables['area_range'][tables['area'].index(size)]
        numbers = {
            'AP': ('precision', None, size, 100),
            'AP50': ('precision', 0.5, size, 100),
            'AR100': ('recall', None, size, 100),
        }
        row = {name: _mean(tables, number, slice(None)) for name, number in numbers.items()}
        row |= {f'AP/{name}': _mean(tables, numbers['AP'], label) for label, name in enumerate(class_names)}
        sizes[size] = {'objects': int(((areas_M >= low) & (areas_M <= high)).sum()), **row}
    return sizes


def _as_coco(images: Sequence[GroundTruth] | Sequence[Detections], num_classes: int) -> COCO:
    """An in-memory COCO file. Ids start at 1, because COCO reads a match with annotation 0 as no match."""
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


def _count(truth: COCO, found: COCO) -> dict:
    """The axes of every table: T IoU thresholds, (R recalls,) K classes, A area ranges, M detections per image."""
    evaluation = COCOeval_faster(truth, found, iouType='bbox', print_function=_silent)
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


def _mean(tables: dict, number: tuple[str, float | None, str, int], classes: int | slice) -> float:
    """The mean over the measured part of a table, nan where nothing is measured (COCO's -1)."""
    table, iou, area, max_detections = number
    t = slice(None) if iou is None else tables['iou'].index(iou)
    part = tables[table][t, ..., classes, tables['area'].index(area), tables['max_detections'].index(max_detections)]
    measured = part[part > -1]
    return float(measured.mean()) if measured.size else float('nan')


def _silent(*_) -> None:
    pass
