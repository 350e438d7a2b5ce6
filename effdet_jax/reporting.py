"""Builds report.html from an evaluation: analysis, charts and pictures for the template."""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup

from effdet_jax import config as run_config
from effdet_jax import data
from effdet_jax.configs import default
from effdet_jax.configs.scaling import SCALES
from effdet_jax.errors import UnreadableError
from effdet_jax.evaluate import Results, to_ground_truth_xyxy
from effdet_jax.evaluation import Detections, GroundTruth, analysis, coco_by_size
from effdet_jax.evaluation.matching import Kind, Matches, match
from effdet_jax.records import charts, page, pictures
from effdet_jax.records.charts import SERIES, Line
from effdet_jax.records.console import info
from effdet_jax.records.files import write_atomically
from effdet_jax.records.metrics import read_metrics
from effdet_jax.records.sessions import read_sessions
from effdet_jax.runtime import devices

FILE = 'report.html'
NUM_PICTURES = 4  # number of best and of worst images
PICTURE_SIDE = 640  # pixels of the longer side
MAX_COLORED_CLASSES = len(SERIES)  # with more classes, only the mean is coloured


def write_report(
    config: Any, workdir: Path, out: Path, source: data.Source, step: int, metrics: dict[str, float], results: Results
) -> None:
    """Writes the page about one evaluation to `out`, atomically.

    Args:
        config: the config of the run.
        workdir: its work directory, for the log and the sessions.
        source: the evaluation split.
        step: the training step of the evaluated weights.
        metrics, results: the results of `evaluate.make_evaluate`.
    """
    names = source.class_names
    truths = [to_ground_truth_xyxy(image.annotations) for image in results.values()]
    detections = [image.detections for image in results.values()]
    matches = match(truths, detections, len(names))
    is_hit_N = matches.kinds == Kind.HIT
    best = analysis.best_f1(matches.scores, is_hit_N, len(matches.object_labels))
    content = {
        'run': {
            'name': config.name, 'folder': workdir.resolve().name, 'step': step, 'images': len(results),
            'objects': len(matches.object_labels), 'classes': len(names), 'split': _split(config),
            'made': datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC'), 'size': tuple(config.image.size),
        },
        'metrics': metrics,
        'best': best,
        'config': _config(config),
        'curves': _curves(read_metrics(workdir / 'metrics.jsonl')),
        'classes': _classes(matches, names, metrics),
        'precision_recall': _precision_recall(matches, names, best),
        'confusion': _confusion(analysis.confusion_matrix(truths, detections, len(names), best.score), names),
        'errors': _errors(matches, best.score),
        'sizes': coco_by_size(truths, detections, names),
        'names': names,
        'calibration': _calibration(matches, best.score),
        'images': _images(source, results, matches, best.score),
        'unreadable': [image.error for image in results.values() if image.error],
        'machine': _machine(workdir, config),
    }  # fmt: skip
    write_atomically(out, page.render(content).encode())


def write_after_training(
    config: Any, workdir: Path, source: data.Source, step: int, metrics: dict[str, float], results: Results
) -> None:
    """Writes the report of the last evaluation. If that fails, it prints a note: a finished run must not fail here."""
    try:
        write_report(config, workdir, workdir / FILE, source, step, metrics, results)
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        info(f'note: {FILE} could not be written ({reason}); try python -m effdet_jax report --workdir={workdir}')


def _split(config: Any) -> str:
    spec, split = data.resolve_split(config.dataset.source, config.dataset.eval_split)
    return f'{spec}, {split}' if split else spec


def _config(config: Any) -> dict[str, Any]:
    """The whole config, and the keys that differ from the defaults of this model."""
    defaults = default.get_config(config.name if config.name in SCALES else 'd0')
    shown_elsewhere = ('dataset.class_names', 'dataset.category_ids', 'name')
    different = [row for row in run_config.differences(config, defaults) if row[0] not in shown_elsewhere]
    return {'differences': different, 'all': sorted(run_config.flatten(run_config.to_json(config)))}


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """{title: chart} for the metrics in the log."""
    panels = {
        'Training loss': [('train/loss', 'loss', 5), ('train/class_loss', 'class', 6)],
        'Average precision': [('eval/AP50', 'AP50', 5), ('eval/AP75', 'AP75', 2), ('eval/AP', 'AP', 6)],
        'Learning rate': [('train/learning_rate', '', 5)],
    }
    drawn = {}
    for title, wanted in panels.items():
        lines = []
        for key, name, color in wanted:
            points = [(row['step'], row[key]) for row in rows if key in row]
            if points:
                steps, values = np.array(points, float).T
                lines.append(Line(name, steps, values, SERIES[color]))
        if lines:
            top = 1.0 if title == 'Average precision' else None
            name = f'curve-{title.lower().replace(" ", "-")}'
            drawn[title] = charts.line_chart(name, lines, x_label='step', y_range=(0, top))
    return drawn


def _classes(matches: Matches, names: Sequence[str], metrics: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for label, name in enumerate(names):
        mine_N, num_objects = matches.labels == label, int(np.sum(matches.object_labels == label))
        best = analysis.best_f1(matches.scores[mine_N], matches.kinds[mine_N] == Kind.HIT, num_objects)
        rows.append(
            {'name': name, 'objects': num_objects, 'best': best if num_objects else None}
            | {key: metrics[f'{key}/{name}'] for key in ('AP', 'AP50', 'VOC07_AP50', 'VOC_AP50')}
        )
    return rows


def _precision_recall(matches: Matches, names: Sequence[str], best: analysis.OperatingPoint) -> dict[str, Markup]:
    x_range, y_range = (0, 1), (0, 1.02)
    return {
        'curves': charts.line_chart(
            'precision-recall', _precision_over_recall(matches, names), x_label='recall', x_range=x_range,
            y_range=y_range, legend='lower left',
        ),
        'trade': charts.line_chart(
            'scores', _over_score(matches), x_label='minimum score', x_range=x_range,
            y_range=y_range, legend='best', mark_x=best.score,
        ),
    }  # fmt: skip


def _precision_over_recall(matches: Matches, names: Sequence[str]) -> list[Line]:
    """A line for each class; if there are more classes than colours, they are faint, with a coloured mean."""
    curves_K101 = analysis.precision_recall(matches)
    present = np.flatnonzero(~np.isnan(curves_K101).any(axis=1)).tolist()

    def line(name: str, curve: np.ndarray, *look: Any) -> Line:
        return Line(name, analysis.RECALLS, np.where(curve > 0, curve, np.nan), *look)

    if len(present) <= MAX_COLORED_CLASSES:
        return [
            line(f'{names[k]} {curves_K101[k].mean():.3f}', curves_K101[k], SERIES[k % len(SERIES)]) for k in present
        ]
    mean = curves_K101[present].mean(axis=0)
    lines = [line('', curves_K101[k], charts.FAINT, 0.8) for k in present]
    return [*lines, line(f'mean of {len(present)} classes {mean.mean():.3f}', mean)]


def _over_score(matches: Matches) -> list[Line]:
    scores, is_hit_N = np.linspace(0, 1, 101), matches.kinds == Kind.HIT
    points = [analysis.at_score(matches.scores, is_hit_N, len(matches.object_labels), score) for score in scores]
    precision, recall, f1 = np.array([(p.precision, p.recall, p.f1) for p in points]).T
    precision[scores > matches.scores.max(initial=0.0)] = np.nan  # undefined without detections
    return [
        Line('precision', scores, precision),
        Line('recall', scores, recall, SERIES[2]),
        Line('F1', scores, f1, SERIES[6]),
    ]


def _confusion(matrix: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Rows of (name, [(count, share of the row)]). The last row, background, has shares of the columns instead."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shares[-1] = matrix[-1] / np.maximum(matrix.sum(axis=0), 1)
    labels = [*names, 'background']
    rows = [
        (name, [*zip(counts.tolist(), row.tolist(), strict=True)])
        for name, counts, row in zip(labels, matrix, shares, strict=True)
    ]
    return {'labels': labels, 'rows': rows}


def _errors(matches: Matches, min_score: float) -> dict[str, dict[str, float]]:
    """For each kind of error: count, count above `min_score`, AP gained, and its share of the largest gain."""
    shown_N = matches.scores >= min_score
    fields = ('scores', 'labels', 'images', 'kinds', 'objects')
    shown = dataclasses.replace(matches, **{field: getattr(matches, field)[shown_N] for field in fields})
    every, few = analysis.error_breakdown(matches), analysis.error_breakdown(shown)
    most = max(error.ap_gained for error in every.values()) or 1.0
    return {
        kind: {**error._asdict(), 'shown': few[kind].count, 'share': error.ap_gained / most}
        for kind, error in every.items()
    }


def _calibration(matches: Matches, min_score: float) -> dict[str, Any]:
    is_hit_N, shown_N = matches.kinds == Kind.HIT, matches.scores >= min_score
    result = analysis.calibration(matches.scores, is_hit_N)
    chart = charts.calibration_chart('calibration', result.edges, result.counts, result.mean_scores, result.hit_rates)
    shown = analysis.calibration(matches.scores[shown_N], is_hit_N[shown_N])
    return {'chart': chart, 'error': result.expected_error, 'shown_error': shown.expected_error}


def _images(
    source: data.Source, results: Results, matches: Matches, min_score: float
) -> dict[str, list[dict[str, Any]]]:
    """The worst images, worst first, and the best, best first. No image is in both lists."""
    ranked = analysis.rank_images(matches, min_score)
    worst = ranked[: min(NUM_PICTURES, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][: -NUM_PICTURES - 1 : -1]
    indices = list(results)

    def show(images: Sequence[analysis.ImageScore]) -> list[dict[str, Any]]:
        return [{'score': image, **_pictures(source, indices[image.index], results, min_score)} for image in images]

    return {'worst': show(worst), 'best': show(best)}


def _pictures(source: data.Source, index: int, results: Results, min_score: float) -> dict[str, Any]:
    """`truth` and `detections` as pictures, or the `error` of an image that cannot be read."""
    annotations, detections, error = results[index]
    name = Path(annotations.file_name).name or str(annotations.image_id)
    try:
        pixels, _ = data.load(source, index)
    except UnreadableError as reason:  # it may have changed since the evaluation
        return {'name': name, 'error': error or str(reason)}
    factor = min(PICTURE_SIDE / max(pixels.shape[:2]), 1.0)
    if factor < 1:
        pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    truth, shown_N = to_ground_truth_xyxy(annotations), detections.scores >= min_score
    left = _draw(pixels, truth, source.class_names, factor)
    shown = Detections(detections.boxes_xyxy[shown_N], detections.scores[shown_N], detections.labels[shown_N])
    right = _draw(pixels, shown, source.class_names, factor)
    return {
        'name': name, 'error': '', 'truth': left, 'detections': right, 'objects': len(truth.labels),
        'found': int(shown_N.sum()),
    }  # fmt: skip


def _draw(pixels: np.ndarray, boxes: GroundTruth | Detections, names: Sequence[str], factor: float) -> str:
    scores = boxes.scores if isinstance(boxes, Detections) else None
    scaled = (boxes.boxes_xyxy * factor).astype(np.float32)
    return page.jpeg_data_uri(pictures.draw_boxes(pixels, scaled, boxes.labels, names, scores))


def _machine(workdir: Path, config: Any) -> dict[str, Any]:
    """The speed from the log, which excludes compilation, and the machines of all sessions."""
    rows = [row for row in read_metrics(workdir / 'metrics.jsonl') if 'train/images_per_second' in row]
    speeds = np.array([row['train/images_per_second'] for row in rows], float)
    steps = np.diff([0, *(row['step'] for row in rows)])
    used = speeds > 0
    chart = None
    if used.sum() > 1:
        line = Line('', np.array([row['step'] for row in rows])[used], speeds[used])
        chart = charts.line_chart('speed', [line], x_label='step')
    return {
        'sessions': read_sessions(workdir),
        'evaluated_on': devices.describe_devices(),
        'images_per_second': float(np.median(speeds[used])) if used.any() else None,
        'waiting': float(np.median([row['train/waiting_for_data'] for row in rows])) if rows else None,
        'hours': float(np.sum(steps[used] * config.train.batch_size / speeds[used]) / 3600) if used.any() else None,
        'chart': chart,
    }
