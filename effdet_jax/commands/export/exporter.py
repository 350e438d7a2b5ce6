"""Exports a run to another format, and compares the export with the original before writing it.

Exports compute in float32, even if the run uses bfloat16: ONNX Runtime and TensorFlow have no bfloat16 convolution on
the CPU, and only float32 allows a close comparison. The comparison runs on the CPU, because GPUs and TPUs by default
round the inputs of float32 products to fewer bits. Exports keep that default, because full precision is slow there.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from effdet_jax import config as run_config
from effdet_jax import data
from effdet_jax.data import shapes
from effdet_jax.errors import UserError, explaining_write_errors
from effdet_jax.inference import Detections, Detector
from effdet_jax.inference.detector import BOXES, Thresholds, detector_of, image_anchors, make_detect_pixels, make_raw
from effdet_jax.inference.formats import FORMATS, Input, Program, Run
from effdet_jax.model import build_model
from effdet_jax.model.batch_norm import fold
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.records.console import info
from effdet_jax.records.files import replacing
from effdet_jax.records.sessions import describe_session
from effdet_jax.runtime import xla

RAW = ('class_logits', 'box_regressions', 'anchors')
IMAGES = 8  # compared, or one batch if that is more
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3  # pixels of the original image; absolute, for scores above 0.1
SCORE_SHARE = 0.01  # relative, for scores below 0.1
RAW_TOLERANCE = 1e-4  # relative to the largest value of an output
UNSUPPRESSED = dict(iou=1.0, sigma=1e9)  # thresholds that switch both kinds of NMS off
ROUNDING = 1e-6  # relative change of the weights, about the effect of float32 rounding within the network
ADVICE = 'nothing was written; try another --format, or another version of jax or of the converter'


class Original(NamedTuple):
    """The detector that is exported and compared with."""

    config: Any
    variables: Any
    step: int


class Agreement(NamedTuple):
    """The detections of two detectors, matched one to one."""

    pairs: int  # number of matches within the tolerances
    pixels: float  # largest distance within a pair
    score: float  # largest difference within a pair
    unmatched: list[str]  # detections without a partner, and how far away the nearest is


def export(workdir: Path, out: Path, format_name: str, outputs: str, batch: int | None = None) -> None:
    """Exports a run to `out`. The file appears only after the export has run and agreed with the original.

    Args:
      format_name: one of `FORMATS`.
      outputs: 'boxes' or 'raw', see `boxes_program` and `raw_program`.
      batch: the fixed number of images of the program; None for any number.

    Raises:
      UserError: if the run has only a backbone, the format cannot represent the program, a converter is missing, `out`
        exists or cannot be written, or the export differs from the original by more than the tolerances above.
    """
    if out.exists():
        raise UserError(f'{out} already exists: remove it or choose another --out')
    if (format_name, outputs) == ('onnx', 'boxes'):
        raise UserError(
            'jax2onnx cannot convert batched NMS (no batching rule for lax.fori_loop): use --outputs=raw, or '
            '--format=stablehlo or savedmodel'
        )
    if (format_name, outputs) == ('savedmodel', 'boxes'):
        batch = batch or 1  # TensorFlow refuses top_k with a variable batch size ("dynamic_iota has dynamic shapes")
    make, compare = {'boxes': (boxes_program, _compare_boxes), 'raw': (raw_program, _compare_raw)}[outputs]
    with jax.default_device(_cpu()):
        original = _original(workdir)
        program = make(original, batch)
        facts = metadata(original, program, format_name)
        images, description = _images(original.config, max(IMAGES, batch or 0))
        form = FORMATS[format_name]
        with explaining_write_errors(out, 'choose another --out'), replacing(out) as temporary:
            start = perf_counter()
            form.write(program, facts, temporary)
            seconds = perf_counter() - start
            agreement = compare(original, program, facts, form.load(temporary), images, batch)
    info(f'{out}: {outputs}, {_megabytes(out):.1f} MB, exported in {seconds:.1f} s')
    info(f'compared with the original on {len(images)} {description}: {agreement}')


def _original(workdir: Path) -> Original:
    config = run_config.load_detector(workdir)
    if not config.dataset.class_names:
        raise UserError(f'{workdir} has only a backbone: train a detector from it with config.train.init_from')
    if config.model.dtype != 'float32':
        info(f'note: the run computes in {config.model.dtype}, the export in float32')
        config.model.dtype = 'float32'
    step, variables = load_variables(workdir, config.checkpoint.best)
    return Original(config, jax.tree.map(jnp.asarray, fold(variables)), step)


def _cpu() -> Any:
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError as error:
        raise UserError(
            'exports are compared on the CPU, which JAX_PLATFORMS excludes: append ",cpu" to JAX_PLATFORMS'
        ) from error


def boxes_program(original: Original, batch: int | None) -> Program:
    """(pixels uint8 [p, 3], sizes int32 [b, 2], score, iou, sigma) -> boxes xyxy [b, K, 4], scores, labels [b, K].

    `pixels` has the RGB images row by row, one after the other; further pixels are ignored. `sizes` has their heights
    and widths. Boxes are in pixels of the original images, best first; padding has label -1.
    """
    detect = make_detect_pixels(original.config, _model(original.config))

    def function(pixels: Any, sizes: Any, score: Any, iou: Any, sigma: Any) -> tuple[jax.Array, ...]:
        return detect(original.variables, pixels, sizes, Thresholds(score, iou, sigma))

    inputs = (Input('pixels', ('p', 3), 'uint8'), Input('sizes', (batch or 'b', 2), 'int32'))
    return Program(function, (*inputs, *(Input(name, (), 'float32') for name in Thresholds._fields)), BOXES)


def raw_program(original: Original, batch: int | None) -> Program:
    """(images uint8 [b, H, W, 3], valid_size int32 [b, 2]) -> class logits [b, N, K], regressions [b, N, 4], anchors.

    `images` are resized to the network input and padded on the right and at the bottom; `valid_size` is their height
    and width without padding. Anchors [N, 4] are yxyx; regressions are ty, tx, th, tw, see detection/boxes.py.
    """
    raw, anchors_N4 = make_raw(original.config, _model(original.config)), image_anchors(original.config)

    def function(images: Any, valid_size: Any) -> tuple[jax.Array, ...]:
        return *raw(original.variables, images, valid_size), jnp.asarray(anchors_N4)

    height, width = original.config.image.size
    b = batch or 'b'
    return Program(
        function, (Input('images', (b, height, width, 3), 'uint8'), Input('valid_size', (b, 2), 'int32')), RAW
    )


def metadata(original: Original, program: Program, format_name: str) -> dict[str, Any]:
    """The metadata of an export, as JSON types."""
    c = original.config
    session = describe_session(original.step, jax.default_backend())
    return {
        'format': format_name,
        'inputs': [i._asdict() for i in program.inputs],
        'outputs': list(program.outputs),
        'class_names': list(c.dataset.class_names),
        'category_ids': list(c.dataset.category_ids),
        'thresholds': dict(score=c.eval.score_threshold, iou=c.eval.nms_iou_threshold, sigma=c.eval.sigma),
        'preprocessing': {
            'size': list(c.image.size),
            'resize': 'bilinear without antialiasing, aspect ratio kept; padded on the right and at the bottom',
            'mean': list(c.image.mean),
            'std': list(c.image.std),
            'padding': c.image.padding,
        },
        'config': run_config.to_json(c),
        **{key: session[key] for key in ('step', 'started', 'versions', 'commit')},
    }


def compare_detections(theirs: Sequence[Detections], ours: Sequence[Detections], floor: float, most: int) -> Agreement:
    """Matches detections of the same class within the tolerances, image by image, in any order.

    A detection may lack a partner if its score is within the tolerance of the cutoff: `floor`, or the last score of an
    image with `most` detections. At most half of all detections are excused in this way.
    """
    pixels, score, pairs, total = 0.0, 0.0, 0, 0
    unmatched, excused = [], []
    for a, b in zip(theirs, ours, strict=True):
        boxes_MK = np.abs(a.boxes_xyxy[:, None] - b.boxes_xyxy[None]).max(axis=2)
        scores_MK = np.abs(a.scores[:, None] - b.scores[None])
        cost_MK = np.maximum(boxes_MK / BOX_TOLERANCE, scores_MK / _score_tolerance(a.scores)[:, None])
        cost_MK = np.where((a.labels[:, None] == b.labels[None]) & (cost_MK <= 1), cost_MK, 1e6)
        i, j = linear_sum_assignment(cost_MK)
        near = cost_MK[i, j] <= 1
        pixels = max(pixels, boxes_MK[i, j][near].max(initial=0))
        score = max(score, scores_MK[i, j][near].max(initial=0))
        pairs, total = pairs + int(near.sum()), total + len(a) + len(b)
        last = max([floor, *(side.scores[-1] for side in (a, b) if len(side) == most)])
        edge = last + _score_tolerance(last)
        for side, other, partners in ((a, b, i[near]), (b, a, j[near])):
            for index in np.setdiff1d(np.arange(len(side)), partners).tolist():
                (excused if side.scores[index] <= edge else unmatched).append(_nearest(side, other, index))
    return Agreement(pairs, pixels, score, unmatched if len(excused) <= total / 2 else unmatched + excused)


def _score_tolerance(scores: Any) -> Any:
    return np.minimum(SCORE_TOLERANCE, SCORE_SHARE * scores)


def _nearest(detections: Detections, other: Detections, index: int) -> str:
    what = f'{detections.names[index]} with score {detections.scores[index]:.4f}'
    same = np.flatnonzero(other.labels == detections.labels[index])
    if not same.size:
        return f'{what} is detected by only one of them'
    boxes = np.abs(other.boxes_xyxy[same] - detections.boxes_xyxy[index]).max(axis=1)
    nearest = boxes.argmin()
    score = abs(other.scores[same][nearest] - detections.scores[index])
    allowed = _score_tolerance(detections.scores[index])
    return f'{what} by {boxes[nearest]:.3g} pixels and {score:.2g} in score (allowed {BOX_TOLERANCE}, {allowed:.2g})'


def _compare_boxes(
    original: Original, program: Program, facts: dict, run: Run, images: list[np.ndarray], batch: int | None
) -> str:
    """Compares the detections before NMS, which must agree closely, and after NMS.

    NMS amplifies rounding errors, soft NMS most: every overlapping box multiplies a score by a function of its IoU, and
    of two boxes with nearly equal scores either may come first. A short run detects hundreds of boxes in one place. So
    we also perturb the weights of the original by `ROUNDING`: after NMS, the export may differ in at most twice as many
    detections as the perturbed original.
    """
    detect, c = xla.jit(make_detect_pixels(original.config, _model(original.config))), original.config.eval

    def detector(variables: Any) -> Detector:
        return detector_of(lambda *inputs: detect(variables, *inputs[:2], Thresholds(*inputs[2:])), facts, size)

    def compared(theirs: list[Detections], ours: list[Detections]) -> Agreement:
        return compare_detections(theirs, ours, c.score_threshold, c.max_detections)

    size = batch or IMAGES
    theirs, ours = detector(original.variables), detector_of(run, facts, size)
    before = compared(theirs(images, **UNSUPPRESSED), ours(images, **UNSUPPRESSED))
    if before.unmatched:
        raise UserError(f'the export differs from the original before NMS: {before.unmatched[0]}; {ADVICE}')
    expected = theirs(images)
    after = compared(expected, ours(images))
    agreement = f'{after.pairs} boxes within {after.pixels:.2g} pixels, scores within {after.score:.1g}'
    if not after.unmatched:
        return agreement
    perturbed = compared(expected, detector(_perturbed(original.variables))(images))
    if len(after.unmatched) > min(2 * len(perturbed.unmatched), after.pairs):
        raise UserError(
            f'the export differs from the original: {after.unmatched[0]}; {len(after.unmatched)} detections differ, '
            f'but only {len(perturbed.unmatched)} if the weights change by {ROUNDING:.0e}; {ADVICE}'
        )
    return (
        f'{agreement}; {len(after.unmatched)} differ by more, because NMS amplifies rounding, as is common after few '
        f'training steps: {len(perturbed.unmatched)} differ in the original if its weights change by {ROUNDING:.0e}'
    )


def _perturbed(variables: Any) -> Any:
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: x * (1 + ROUNDING * generator.standard_normal(x.shape, np.float32)), variables)


def _compare_raw(
    original: Original, program: Program, facts: dict, run: Run, images: list[np.ndarray], batch: int | None
) -> str:
    fitted = [data.resize_and_pad(image, tuple(original.config.image.size)) for image in images[: batch or IMAGES]]
    arrays = np.stack([f[0] for f in fitted]), np.array([f[1] for f in fitted], np.int32)
    worst = 0.0
    for name, a, b in zip(program.outputs, jax.jit(program.function)(*arrays), run(*arrays), strict=True):
        difference = float(np.abs(np.asarray(a) - b).max() / np.abs(a).max())
        if not difference <= RAW_TOLERANCE:
            raise UserError(
                f'the export differs from the original: {name} by {difference:.1e} of its largest value (allowed '
                f'{RAW_TOLERANCE:.0e}); {ADVICE}'
            )
        worst = max(worst, difference)
    return f'{", ".join(program.outputs)} within {worst:.1e} of the largest value'


def _images(config: Any, count: int) -> tuple[list[np.ndarray], str]:
    """(images of the evaluation split, their description); drawings if the images are not available here."""
    d = config.dataset
    try:
        source = data.open_source(d.source, d.eval_split, d.class_names)
        images = [np.asarray(data.load(source, index)[0]) for index in range(min(count, len(source)))]
        description = f'images of {d.source} {d.eval_split}'.rstrip()
    except UserError as error:
        info(f'note: the evaluation images cannot be read ({error}): comparing on embedded drawings instead')
        images, description = [], 'embedded drawings'
    return images + [np.asarray(shapes.draw(index).image) for index in range(count - len(images))], description


def _model(config: Any) -> Any:
    return build_model(config.model, len(config.dataset.class_names))


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob('*') if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6
