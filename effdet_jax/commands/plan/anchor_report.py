"""How well the anchors of a config match its objects, and which anchors match better, as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from effdet_jax import data, inspection
from effdet_jax.data import survey
from effdet_jax.detection import anchor_fit
from effdet_jax.records.console import table

RECALL_IOU = 0.5  # for the recall in the tables; not loss.match_threshold
COCO_AREAS = (32**2, 96**2)  # pixels of the original image: small, medium, large
FIT_OBJECTS = 5_000  # evenly spaced objects for k-means
STARTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # initial anchor scales of k-means
RESOLUTION = 0.001  # smaller differences in recall or mean IoU are ignored
MIN_LOSS = 0.005  # smaller losses of recall in a group are not reported


def sections(config: Any, listing: data.Listing, fit: bool) -> Iterator[str]:
    """Sections with a table of the current anchors and advice, and with `fit` a table of the k-means proposal."""
    numbers_K, boxes_K4 = survey.network_boxes(listing, tuple(config.image.size))
    if len(boxes_K4) == 0:
        yield 'Anchors: no report, because no image with objects has an annotated size.'
        return
    groups, threshold = _groups(listing, numbers_K), config.loss.match_threshold
    a, height, width = config.model.anchors, *config.image.size
    images = f'{"a sample of " if listing.sampled else ""}{len(listing.images):,} training images'
    title = (
        f'Anchors of scale {a.scale:g}, ratios {_ratios(a.aspect_ratios)} and {len(boxes_K4):,} objects of {images}, '
        f'at {height}x{width} without jitter\n'
    )
    header = ('objects', 'number', f'best possible recall at IoU {RECALL_IOU}', 'mean best IoU', 'unmatched')
    current_K = inspection.best_ious(config)(boxes_K4)
    yield table(header, _rows(groups, current_K, threshold), title)
    yield (
        'Small, medium and large as in COCO: areas up to 32x32, up to 96x96 and above, in original pixels. Unmatched: '
        f'no anchor reaches IoU {threshold:g} (config.loss.match_threshold), so only the best anchor is trained.'
    )
    if not fit:
        report = inspection.anchor_fit(config, listing)
        advice = report and report.advice
        yield f'Advice: {advice}; --fit also tries ratios.' if advice else 'No other anchor scale is much better.'
        return
    best = propose(config, boxes_K4)
    flags = f"--config.model.anchors.scale={best.scale:g} --config.model.anchors.aspect_ratios='{_ratios(best[1])}'"
    proposed_K = inspection.best_ious(config, **best._asdict())(boxes_K4)
    if _quality(proposed_K) <= _quality(current_K):
        yield 'k-means on IoU finds no better anchors.'
        return
    yield table(header, _rows(groups, proposed_K, threshold), 'Anchors proposed by k-means on IoU\n')
    worse = [
        f'{name} {_recall(current_K[group_K]):.3f} -> {_recall(proposed_K[group_K]):.3f}'
        for name, group_K in groups
        if group_K.any() and _recall(proposed_K[group_K]) < _recall(current_K[group_K]) - MIN_LOSS
    ]
    losses = f', but lower recall for {", ".join(worse)}' if worse else ''
    yield (
        f'Recall {_recall(current_K):.3f} -> {_recall(proposed_K):.3f}, mean IoU {current_K.mean():.3f} -> '
        f'{proposed_K.mean():.3f}{losses}, with:\n\n    {flags}'
    )


def propose(config: Any, boxes: Float[np.ndarray, 'K 4']) -> anchor_fit.Anchors:
    """The best anchors from several runs of k-means; `boxes` are yxyx in network pixels."""
    a, size = config.model.anchors, config.image.size
    strides = [(size[0] / rows, size[1] / columns) for rows, columns in inspection.level_sizes(config)]
    sample_K4 = boxes[:: -(-len(boxes) // FIT_OBJECTS)]
    sides_K2 = np.maximum(sample_K4[:, 2:] - sample_K4[:, :2], 1e-3).astype(np.float64)
    count = len(a.aspect_ratios)
    object_ratios = np.quantile(sides_K2[:, 1] / sides_K2[:, 0], (np.arange(count) + 0.5) / count)
    config_ratios = [r[0] / r[1] if isinstance(r, Sequence) else float(r) for r in a.aspect_ratios]
    candidates = [
        anchor_fit.fit(sides_K2, strides, a.scales_per_octave, anchor_fit.Anchors(float(scale), tuple(ratios)))
        for scale in (a.scale, *STARTS)
        for ratios in (config_ratios, object_ratios.tolist())
    ]
    return max(candidates, key=lambda c: _quality(inspection.best_ious(config, **c._asdict())(sample_K4)))


def _quality(iou_K: np.ndarray) -> tuple[float, float]:
    """(recall, mean IoU) in units of RESOLUTION, for comparison."""
    return round(_recall(iou_K) / RESOLUTION), round(float(iou_K.mean()) / RESOLUTION)


def _groups(listing: data.Listing, numbers_K: np.ndarray) -> list[tuple[str, Bool[np.ndarray, 'K']]]:
    boxes_K4, labels_K = listing.boxes_yxyx[numbers_K], listing.labels[numbers_K]
    area_K = listing.areas[numbers_K]  # in COCO, of the masks
    area_K = np.where(np.isnan(area_K), (boxes_K4[:, 2:] - boxes_K4[:, :2]).prod(1), area_K)
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
