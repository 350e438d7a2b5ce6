"""A run -> a file in another format that is proven to compute the same.

Exports compute in float32, also of a bfloat16 run: ONNX Runtime and TensorFlow have no bfloat16 convolution on a CPU,
and only float32 can be compared closely. They are compared on the CPU, because GPUs and TPUs round float32 products to
fewer bits unless told otherwise, and an export does not tell them: it would be slow there.
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
from effdet_jax.errors import UserError
from effdet_jax.inference import Detections, Detector
from effdet_jax.inference.detector import (
    BOXES,
    Thresholds,
    detector_of,
    image_anchors,
    make_detect_pixels,
    make_raw,
)
from effdet_jax.inference.formats import FORMATS, Input, Program, Run
from effdet_jax.model import build_model
from effdet_jax.model.batch_norm import fold
from effdet_jax.records.checkpoint import load_variables
from effdet_jax.records.console import info
from effdet_jax.records.files import replacing
from effdet_jax.records.sessions import describe_session
from effdet_jax.runtime import xla

RAW = ('class_logits', 'box_regressions', 'anchors')
IMAGES = 8  # to compare on, or one batch where that is more
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3  # pixels of the original image; a probability ...
SCORE_SHARE = 0.01  # ... and of a score below 0.1 this share of it
RAW_TOLERANCE = 1e-4  # of the largest value of an output
UNSUPPRESSED = dict(iou=1.0, sigma=1e9)  # thresholds with which neither kind of NMS changes anything
ROUNDING = 1e-6  # relative; about what a network makes of the rounding of its weights
ADVICE = 'nothing was written; another --format, or another version of jax or of the converter, may compute the same'


class Original(NamedTuple):
    """What is exported, and what it is compared with."""

    config: Any
    variables: Any
    step: int


class Agreement(NamedTuple):
    """Detections of two detectors, matched one to one."""

    pairs: int  # within the tolerances of each other
    pixels: float  # largest distance within a pair
    score: float  # largest difference within a pair
    alone: list[str]  # detections of either without a partner: what they are, and how far the nearest is


def export(workdir: Path, out: Path, format_name: str, outputs: str, batch: int | None = None) -> None:
    """Writes `out` and says what it is; nothing is there before it has run and agreed with the original.

    Args:
      format_name: one of `FORMATS`.
      outputs: 'boxes' or 'raw', see `boxes_program` and `raw_program`.
      batch: the only number of images that the program takes; any number where None.

    Raises:
      UserError: where the format cannot hold the program, a converter is missing, `out` is there already or cannot be
        written, or the export differs from the original by more than the tolerances above; for a backbone alone.
    """
    if out.exists():
        raise UserError(f'{out} exists already: remove it or choose another --out')
    if (format_name, outputs) == ('onnx', 'boxes'):
        raise UserError(
            'jax2onnx cannot convert the NMS of a batch (no batching rule for lax.fori_loop): take --outputs=raw, or '
            '--format=stablehlo or savedmodel'
        )
    if (format_name, outputs) == ('savedmodel', 'boxes'):
        batch = batch or 1  # TensorFlow refuses top_k of a batch whose size is open ("dynamic_iota has dynamic shapes")
    make, compare = {'boxes': (boxes_program, _compare_boxes), 'raw': (raw_program, _compare_raw)}[outputs]
    with jax.default_device(_cpu()):
        original = _original(workdir)
        program = make(original, batch)
        facts = metadata(original, program, format_name)
        images, whence = _images(original.config, max(IMAGES, batch or 0))
        form = FORMATS[format_name]
        try:
            with replacing(out) as temporary:
                start = perf_counter()
                form.write(program, facts, temporary)
                seconds = perf_counter() - start
                agreement = compare(original, program, facts, form.load(temporary), images, batch)
        except OSError as error:
            raise UserError(f'{out} cannot be written ({error.strerror or error}): choose another --out') from error
    info(f'{out}: {outputs}, {_megabytes(out):.1f} MB, exported in {seconds:.1f} s')
    info(f'compared with the original on {len(images)} {whence}: {agreement}')


def _original(workdir: Path) -> Original:
    config = run_config.load_detector(workdir)
    if not config.dataset.class_names:
        raise UserError(f'{workdir} holds a backbone alone: train a detector from it with config.train.init_from')
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
            'an export is compared on the CPU, which JAX_PLATFORMS hides: append ",cpu" to JAX_PLATFORMS'
        ) from error


def boxes_program(original: Original, batch: int | None) -> Program:
    """(pixels uint8 [p, 3], sizes int32 [b, 2], score, iou, sigma) -> boxes xyxy [b, K, 4], scores, labels [b, K].

    `pixels` are the RGB images row by row, one after the other, and perhaps more; `sizes` their heights and widths.
    Boxes in pixels of the original images, best first; unused places have label -1.
    """
    detect = make_detect_pixels(original.config, _model(original.config))

    def function(pixels: Any, sizes: Any, score: Any, iou: Any, sigma: Any) -> tuple[jax.Array, ...]:
        return detect(original.variables, pixels, sizes, Thresholds(score, iou, sigma))

    inputs = (Input('pixels', ('p', 3), 'uint8'), Input('sizes', (batch or 'b', 2), 'int32'))
    return Program(function, (*inputs, *(Input(name, (), 'float32') for name in Thresholds._fields)), BOXES)


def raw_program(original: Original, batch: int | None) -> Program:
    """(images uint8 [b, H, W, 3], valid_size int32 [b, 2]) -> class logits [b, N, K], regressions [b, N, 4], anchors.

    `images` are resized to the network's input and padded at the right and at the bottom; `valid_size` is the height
    and width of the picture in them. Anchors [N, 4] and regressions are yxyx and ty, tx, th, tw: detection/boxes.py.
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
    """What a file says of itself, fit for JSON."""
    c = original.config
    session = describe_session(original.step, jax.default_backend())
    return {
        'format': format_name,
        'inputs': [i._asdict() for i in program.inputs],
        'outputs': list(program.outputs),
        'class_names': list(c.dataset.class_names),
        'category_ids': list(c.dataset.category_ids),
        'thresholds': dict(score=c.eval.score_threshold, iou=c.eval.iou_threshold, sigma=c.eval.sigma),
        'preprocessing': {
            'size': list(c.image.size),
            'resize': 'keeps the proportions, bilinear, no antialiasing; padded at the right and at the bottom',
            'mean': list(c.image.mean),
            'std': list(c.image.std),
            'padding': c.image.padding,
        },
        'config': run_config.to_json(c),
        **{key: session[key] for key in ('step', 'started', 'versions', 'commit')},
    }


def compare_detections(theirs: Sequence[Detections], ours: Sequence[Detections], floor: float, most: int) -> Agreement:
    """Pairs detections image by image: of one class and within the tolerances, whatever their order.

    One that has no partner may be missing where it stood at the edge: within the tolerance of the score below which
    nothing is kept, which is `floor`, and in an image with `most` detections that of the last of them. That excuses at
    most half of all detections.
    """
    pixels, score, pairs, total = 0.0, 0.0, 0, 0
    alone, excused = [], []
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
        for found, other, partners in ((a, b, i[near]), (b, a, j[near])):
            for index in np.setdiff1d(np.arange(len(found)), partners).tolist():
                (excused if found.scores[index] <= edge else alone).append(_nearest(found, other, index))
    return Agreement(pairs, pixels, score, alone if len(excused) <= total / 2 else alone + excused)


def _score_tolerance(scores: Any) -> Any:
    return np.minimum(SCORE_TOLERANCE, SCORE_SHARE * scores)


def _nearest(found: Detections, other: Detections, index: int) -> str:
    what = f'{found.names[index]} with score {found.scores[index]:.4f}'
    same = np.flatnonzero(other.labels == found.labels[index])
    if not same.size:
        return f'{what} is found by one of them alone'
    boxes = np.abs(other.boxes_xyxy[same] - found.boxes_xyxy[index]).max(axis=1)
    nearest = boxes.argmin()
    score = abs(other.scores[same][nearest] - found.scores[index])
    allowed = _score_tolerance(found.scores[index])
    return f'{what} by {boxes[nearest]:.3g} pixels and {score:.2g} in score (allowed {BOX_TOLERANCE}, {allowed:.2g})'


def _compare_boxes(
    original: Original, program: Program, facts: dict, run: Run, images: list[np.ndarray], batch: int | None
) -> str:
    """What the network and the decoding of boxes give must agree closely, so NMS is switched off for it first.

    What NMS makes of it may depend on rounding, in soft NMS most of all: each rival multiplies a score by a function of
    its IoU, and a hundred of them multiply its error; of two rivals with nearly equal scores, either may be the first.
    Runs of few steps find hundreds of boxes in one place. So where detections differ after NMS, as many may as differ
    twice over in the original itself when its weights are rounded otherwise.
    """
    detect, c = xla.jit(make_detect_pixels(original.config, _model(original.config))), original.config.eval

    def detector(variables: Any) -> Detector:
        return detector_of(lambda *inputs: detect(variables, *inputs[:2], Thresholds(*inputs[2:])), facts, size)

    def compared(theirs: list[Detections], ours: list[Detections]) -> Agreement:
        return compare_detections(theirs, ours, c.score_threshold, c.max_detections)

    size = batch or IMAGES
    theirs, ours = detector(original.variables), detector_of(run, facts, size)
    before = compared(theirs(images, **UNSUPPRESSED), ours(images, **UNSUPPRESSED))
    if before.alone:
        raise UserError(f'the export differs from the original, before NMS: {before.alone[0]}; {ADVICE}')
    expected = theirs(images)
    after = compared(expected, ours(images))
    agreement = f'{after.pairs} boxes within {after.pixels:.2g} pixels, scores within {after.score:.1g}'
    if not after.alone:
        return agreement
    itself = compared(expected, detector(_rounded_otherwise(original.variables))(images))
    if len(after.alone) > min(2 * len(itself.alone), after.pairs):
        raise UserError(
            f'the export differs from the original: {after.alone[0]}; {len(after.alone)} differ so, and '
            f'{len(itself.alone)} in the original when its weights change by {ROUNDING:.0e}; {ADVICE}'
        )
    return (
        f'{agreement}; {len(after.alone)} differ by more, because NMS amplifies rounding here, as in a run of few '
        f'steps: {len(itself.alone)} do in the original when its weights change by {ROUNDING:.0e}'
    )


def _rounded_otherwise(variables: Any) -> Any:
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
    """(some images that the run is evaluated on, what they are); drawings where there are none here."""
    d = config.dataset
    try:
        source = data.open_source(d.source, d.eval_split, d.class_names)
        images = [np.asarray(data.load(source, index)[0]) for index in range(min(count, len(source)))]
        whence = f'images of {d.source} {d.eval_split}'.rstrip()
    except UserError as error:
        info(f'note: the images of the evaluation cannot be read here ({error}): embedded drawings in their place')
        images, whence = [], 'embedded drawings'
    return images + [np.asarray(shapes.draw(index).image) for index in range(count - len(images))], whence


def _model(config: Any) -> Any:
    return build_model(config.model, len(config.dataset.class_names))


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob('*') if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6
