"""How the anchors of a config fit its objects, and which would fit better, as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from effdet_jax import data, inspection
from effdet_jax.data import survey
from effdet_jax.detection import anchor_fit, anchors
from effdet_jax.records.console import table

RECALL_IOU = 0.5
COCO_AREAS = (32**2, 96**2)  # pixels of the original image: small, medium, large
FIT_OBJECTS = 5_000  # k-means sees so many, evenly spread
STARTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # anchor scales that k-means starts from
BETTER = 0.001  # of the recall, or of the mean IoU where the recall is the same
WORSE = 0.005  # recall of a group; what is lost less is not told


def sections(config: Any, listing: data.Listing, fit: bool) -> Iterator[str]:
    """A table of the anchors as they are, and with `fit` one of those that k-means proposes, with advice."""
    numbers_K, boxes_K4 = survey.network_boxes(listing, tuple(config.image.size))
    if len(boxes_K4) == 0:
        yield 'Anchors: the annotations do not say the size of any image with objects, so nothing can be said.'
        return
    groups, threshold = _groups(listing, numbers_K), config.loss.match_threshold
    a, height, width = config.model.anchors, *config.image.size
    pictures = f'{len(listing.images):,} {"of the " if listing.sampled else ""}training images'
    title = (
        f'Anchors of scale {a.scale:g}, ratios {_ratios(a.aspect_ratios)} and {len(boxes_K4):,} objects of {pictures}, '
        f'as they are at {height}x{width} before jitter\n'
    )
    header = ('objects', 'number', f'best possible recall at IoU {RECALL_IOU}', 'mean best IoU', 'by force only')
    now_K = inspection.best_ious(config)(boxes_K4)
    yield table(header, _rows(groups, now_K, threshold), title)
    yield (
        'Small, medium, large as COCO has it: areas under 32x32, 96x96 pixels of the original image. By force only: no '
        f'anchor reaches IoU {threshold:g} (config.loss.match_threshold), so only the best one learns the object.'
    )
    if not fit:
        advice = (known := inspection.anchor_fit(config, listing)) and known.advice
        yield f'Advice: {advice}; --fit looks for ratios too.' if advice else 'No other anchor scale fits much better.'
        return
    best = propose(config, boxes_K4)
    flags = f"--config.model.anchors.scale={best.scale:g} --config.model.anchors.aspect_ratios='{_ratios(best[1])}'"
    then_K = inspection.best_ious(config, **best._asdict())(boxes_K4)
    if _worth(then_K) <= _worth(now_K):
        yield 'k-means on IoU finds no anchors that fit better.'
        return
    yield table(header, _rows(groups, then_K, threshold), 'With the anchors that k-means on IoU proposes\n')
    worse = [
        f'{name} {_recall(now_K[group_K]):.3f} -> {_recall(then_K[group_K]):.3f}'
        for name, group_K in groups
        if group_K.any() and _recall(then_K[group_K]) < _recall(now_K[group_K]) - WORSE
    ]
    but = f', but less recall for {", ".join(worse)}' if worse else ''
    yield (
        f'Recall {_recall(now_K):.3f} -> {_recall(then_K):.3f}, mean IoU {now_K.mean():.3f} -> {then_K.mean():.3f}'
        f'{but}, with:\n\n    {flags}'
    )


def propose(config: Any, boxes: Float[np.ndarray, 'K 4']) -> anchor_fit.Anchors:
    """The best of several k-means, for boxes yxyx in network pixels; of equally good ones the first."""
    a, size = config.model.anchors, config.image.size
    levels = anchors.level_sizes(tuple(size), anchors.MIN_LEVEL, config.model.max_level)
    strides = [(size[0] / rows, size[1] / columns) for rows, columns in levels]
    few_K4 = boxes[:: -(-len(boxes) // FIT_OBJECTS)]
    sides_K2 = np.maximum(few_K4[:, 2:] - few_K4[:, :2], 1e-3).astype(np.float64)
    count = len(a.aspect_ratios)
    of_objects = np.quantile(sides_K2[:, 1] / sides_K2[:, 0], (np.arange(count) + 0.5) / count)
    own = [r[0] / r[1] if isinstance(r, Sequence) else float(r) for r in a.aspect_ratios]
    found = [
        anchor_fit.fit(sides_K2, strides, a.octaves, anchor_fit.Anchors(float(scale), tuple(ratios)))
        for scale in (a.scale, *STARTS)
        for ratios in (own, of_objects.tolist())
    ]
    return max(found, key=lambda one: _worth(inspection.best_ious(config, **one._asdict())(few_K4)))


def _worth(iou_K: np.ndarray) -> tuple[float, float]:
    """Recall first; differences that mean nothing are rounded away."""
    return round(_recall(iou_K) / BETTER), round(float(iou_K.mean()) / BETTER)


def _groups(listing: data.Listing, numbers_K: np.ndarray) -> list[tuple[str, Bool[np.ndarray, 'K']]]:
    boxes_K4, labels_K = listing.boxes_yxyx[numbers_K], listing.labels[numbers_K]
    area_K = (boxes_K4[:, 2:] - boxes_K4[:, :2]).prod(1)
    area_K = np.where(np.isnan(listing.areas[numbers_K]), area_K, listing.areas[numbers_K])  # COCO's are of the masks
    size_K = np.digitize(area_K, COCO_AREAS)
    sizes = [(name, size_K == number) for number, name in enumerate(('small', 'medium', 'large'))]
    classes = [(name, labels_K == label) for label, name in enumerate(listing.class_names)]
    return [('all', np.ones(len(labels_K), bool)), *sizes, *classes]


def _rows(groups: list[tuple[str, np.ndarray]], iou_K: np.ndarray, threshold: float) -> Iterator[tuple]:
    for name, group_K in groups:
        iou = iou_K[group_K]
        if len(iou):
            yield name, len(iou), _recall(iou), float(iou.mean()), int((iou < threshold).sum())
        else:
            yield name, 0, None, None, 0


def _recall(iou_K: np.ndarray) -> float:
    return float((iou_K >= RECALL_IOU).mean())


def _ratios(ratios: Sequence[Any]) -> str:
    return '(' + ', '.join(f'{r:g}' if isinstance(r, float | int) else str(tuple(r)) for r in ratios) + ')'
