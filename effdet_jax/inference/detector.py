"""From uint8 images to boxes: the function behind evaluation, prediction and export."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from effdet_jax import config as run_config
from effdet_jax.detection import anchors, preprocess
from effdet_jax.detection.postprocess import Detections as NetworkDetections
from effdet_jax.detection.postprocess import postprocess
from effdet_jax.errors import UserError
from effdet_jax.inference import formats, merge, packing
from effdet_jax.inference.detections import Detections
from effdet_jax.inference.images import ImageLike, are_several, to_array
from effdet_jax.model import EfficientDet, Outputs, build_model
from effdet_jax.model.batch_norm import fold
from effdet_jax.records import checkpoint
from effdet_jax.runtime import paths, xla


class Thresholds(NamedTuple):
    """The thresholds, arguments of the compiled program: changing them compiles nothing."""

    score: float | Float[Array, '']  # detections below it are dropped, 0..1
    iou: float | Float[Array, '']  # above it hard NMS drops the lower box, 0..1
    sigma: float | Float[Array, '']  # of Gaussian NMS: the smaller, the stronger it lowers overlapping boxes


# (pixels [P, 3], sizes [B, 2], thresholds) -> boxes xyxy [B, K, 4], scores, labels; see make_detect_pixels
DetectPixels = Callable[[Any, Any, Thresholds], tuple[Any, Any, Any]]


BOXES = ('boxes', 'scores', 'labels')  # names of these outputs in exports


class Detector:
    """A trained detector for images of any size.

    detector = Detector.load('runs/d3')
    detections = detector(image)              # uint8 [H, W, 3] RGB, a PIL image, or the path of a file
    detections = detector([image, another])   # a list of results; images may differ in size and type
    detections = detector(image, score=0.3)   # compiles nothing again
    """

    def __init__(
        self,
        functions: Sequence[DetectPixels],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        thresholds: Thresholds,
        *,
        batch_size: int = 8,
        augmentation: merge.Augmentation | None = None,
    ) -> None:
        """`functions` has one function for each scale of `augmentation`, or a single one without it; see `load`."""
        self.class_names, self.category_ids = tuple(class_names), tuple(category_ids)
        self.batch_size = batch_size
        self._functions, self._thresholds = functions, thresholds
        self._augmentation = augmentation or merge.Augmentation()

    @classmethod
    def load(
        cls, workdir: str | Path, *, batch_size: int = 8, augmentation: merge.Augmentation | None = None
    ) -> 'Detector':
        """Loads the best checkpoint of a run, or a StableHLO export. Runs on at most `batch_size` images at once.

        With `augmentation`, every view uses hard NMS, whatever the config says, before the views are merged.

        Raises:
          UserError: if there is no run or only a backbone, if the export has raw outputs or `augmentation` is given for
            an export, and for an address such as gs://bucket.
        """
        folder = paths.local(workdir)
        if folder.is_file():
            return _of_export(folder, batch_size, augmentation)
        config: Any = run_config.load_detector(folder)
        if not config.dataset.class_names:
            raise UserError(f'{folder} has only a backbone: train a detector from it with config.train.init_from')
        model = build_model(config.model, len(config.dataset.class_names))
        _, variables = checkpoint.load_variables(folder, config.checkpoint.best)
        variables = jax.device_put(fold(variables))
        if augmentation:  # the low-scored duplicates that soft NMS keeps would lower the merged scores
            config.eval.nms = 'hard'
        scales = augmentation.scales if augmentation else (1.0,)
        return cls(
            [functools.partial(xla.jit(make_detect_pixels(config, model, scale)), variables) for scale in scales],
            config.dataset.class_names,
            config.dataset.category_ids,
            Thresholds(config.eval.score_threshold, config.eval.nms_iou_threshold, config.eval.sigma),
            batch_size=batch_size,
            augmentation=augmentation,
        )

    @overload
    def __call__(
        self, images: ImageLike, *, score: float | None = ..., iou: float | None = ..., sigma: float | None = ...
    ) -> Detections: ...
    @overload
    def __call__(
        self,
        images: Iterable[ImageLike],
        *,
        score: float | None = ...,
        iou: float | None = ...,
        sigma: float | None = ...,
    ) -> list[Detections]: ...
    def __call__(self, images: Any, *, score: Any = None, iou: Any = None, sigma: Any = None) -> Any:
        """Detects objects in one image, or in each image of a list.

        An image is a NumPy or JAX array, uint8 [H, W, 3] in RGB, a PIL image, or the path of a file. PIL images and
        files are turned upright by their EXIF orientation, and boxes refer to the upright image.

        `score`, `iou` and `sigma` replace the thresholds of the config (see `Thresholds`).

        Raises:
          UserError: for anything else than an image, and for a threshold out of range.
        """
        if are_several(images):
            return list(self.stream(images, score=score, iou=iou, sigma=sigma))
        return next(self.stream([images], score=score, iou=iou, sigma=sigma))

    def stream(
        self,
        images: Iterable[Any],  # of ImageLike; anything else is a UserError
        *,
        score: float | None = None,
        iou: float | None = None,
        sigma: float | None = None,
    ) -> Iterator[Detections]:
        """Like a call with a list, but yields one by one, and reads the next images while the device is working."""
        thresholds = _chosen(self._thresholds, score=score, iou=iou, sigma=sigma)
        running: Callable[[], list[Detections]] | None = None
        for batch, places in packing.batches(map(to_array, images), self.batch_size):
            before, running = running, self._start(batch, places, thresholds)
            yield from before() if before else ()
        yield from running() if running else ()

    def _start(self, images: list[np.ndarray], places: int, thresholds: Thresholds) -> Callable[[], list[Detections]]:
        """Sends a batch to the device. Calling the returned function waits for the result."""
        views = [
            (flip, function(*packed, thresholds))
            for flip in self._augmentation.flips
            for packed in [packing.pack(images, places, flip=flip)]
            for function in self._functions
        ]
        widths = [image.shape[1] for image in images]

        def finish() -> list[Detections]:
            outputs = [(flip, jax.device_get(arrays)) for flip, arrays in views]
            return [
                self._merge([_one_image(arrays, place, width, flip) for flip, arrays in outputs], thresholds)
                for place, width in enumerate(widths)
            ]

        return finish

    def _merge(self, views: list[merge.Boxes], thresholds: Thresholds) -> Detections:
        boxes = views[0]
        if len(views) > 1:
            most = max(len(view.scores) for view in views)
            merged = merge.merge(views, self._augmentation)
            kept = np.flatnonzero(merged.scores > thresholds.score)[:most]
            boxes = merge.Boxes(*(column[kept] for column in merged))
        return Detections(*boxes, tuple(self.class_names[label] for label in boxes.labels.tolist()))


def make_detect_pixels(config: Any, model: EfficientDet, scale: float = 1.0) -> Callable[..., tuple[Array, ...]]:
    """Makes `detect(variables, pixels uint8 [P, 3], sizes [B, 2], thresholds)` for images of any sizes.

    `pixels` has B images, row by row and one after the other (see `packing.pack`); `sizes` has their heights and
    widths. `scale` multiplies the size of the network input. `detect` is pure, so it can be jitted and exported. It
    returns boxes xyxy in pixels of the original images [B, K, 4], scores [B, K] and labels [B, K] (-1: padding), best
    first.
    """
    height, width = (max(round(scale * side), 1) for side in config.image.size)
    detect_resized = make_detect(config, model, (height, width))

    def detect(
        variables: Any, pixels: UInt8[Array, 'P 3'], sizes: Int[Array, 'B 2'], thresholds: Thresholds
    ) -> tuple[Array, ...]:
        images, valid_size, image_scale = preprocess.resize_and_pad(pixels, sizes, (height, width))
        boxes_xyxy, scores, labels = to_original(detect_resized(variables, images, valid_size, thresholds), image_scale)
        # A very long image becomes a single row of network pixels, which extends beyond the image.
        limits_B14 = sizes[:, None, np.array([1, 0, 1, 0])].astype(jnp.float32)
        return jnp.minimum(boxes_xyxy, limits_B14), scores, labels

    return detect


def make_detect(
    config: Any, model: EfficientDet, image_size: tuple[int, int] | None = None
) -> Callable[..., NetworkDetections]:
    """Makes `detect(variables, images uint8 [B, H, W, 3], valid_size [B, 2])`, with detections in network pixels.

    The images are already resized and padded to `image_size`, by default the config's. An optional fourth argument
    `thresholds` replaces the config's.
    """
    raw = make_raw(config, model)
    anchors_N4 = image_anchors(config, image_size)
    c = config.eval
    defaults = Thresholds(c.score_threshold, c.nms_iou_threshold, c.sigma)
    options = dict(per_class=c.per_class_nms, max_candidates=c.max_candidates, kind=c.nms, max_outputs=c.max_detections)

    def detect(
        variables: Any, images: Array, valid_size: Array, thresholds: Thresholds = defaults
    ) -> NetworkDetections:
        outputs = raw(variables, images, valid_size)

        def finish(class_logits: Array, box_regressions: Array, size: Array) -> NetworkDetections:
            return postprocess(
                class_logits, box_regressions, jnp.asarray(anchors_N4), size, score_threshold=thresholds.score,
                iou_threshold=thresholds.iou, sigma=thresholds.sigma, **options,
            )  # fmt: skip

        return jax.vmap(finish)(outputs.class_logits, outputs.box_regressions, valid_size)

    return detect


def make_raw(config: Any, model: EfficientDet) -> Callable[..., Outputs]:
    """Makes `raw(variables, images uint8 [B, H, W, 3], valid_size [B, 2])`, with the network's outputs per anchor.

    The images are already resized and padded; `raw` normalises them.
    """
    statistics = config.image.mean, config.image.std, config.image.padding

    def raw(variables: Any, images: Array, valid_size: Array) -> Outputs:
        outputs: Any = model.apply(variables, preprocess.normalize(images, valid_size, *statistics), train=False)
        return outputs

    return raw


def image_anchors(config: Any, image_size: tuple[int, int] | None = None) -> Float[np.ndarray, 'N 4']:
    """The anchors for a network input of `image_size`, by default the config's."""
    a, size = config.model.anchors, tuple(config.image.size) if image_size is None else image_size
    levels = anchors.level_sizes(size, anchors.MIN_LEVEL, config.model.max_level)
    return anchors.make_anchors(levels, size, a.scale, a.scales_per_octave, a.aspect_ratios)


def to_original(detections: NetworkDetections, image_scale: Any) -> tuple[Any, Any, Any]:
    """(boxes xyxy in pixels of the original images `[B, K, 4]`, scores `[B, K]`, labels `[B, K]`, -1: padding).

    Works on NumPy and jax arrays. `image_scale` is `[B]`.
    """
    return (
        detections.boxes[..., np.array([1, 0, 3, 2])] * image_scale[:, None, None],
        detections.scores,
        detections.labels,
    )


def detector_of(run: Callable[..., tuple[Any, ...]], metadata: Mapping[str, Any], batch_size: int = 8) -> Detector:
    """A detector from an exported program of (pixels, sizes, score, iou, sigma) and the metadata of its file."""
    return Detector(
        [lambda pixels, sizes, thresholds: run(pixels, sizes, *map(np.float32, thresholds))],
        metadata['class_names'],
        metadata['category_ids'],
        Thresholds(**metadata['thresholds']),
        batch_size=batch_size,
    )


def _of_export(file: Path, batch_size: int, augmentation: merge.Augmentation | None) -> Detector:
    call, metadata = formats.read_stablehlo(file)
    if metadata['outputs'] != list(BOXES):
        raise UserError(f'{file} is an export of raw outputs: a Detector needs an export with --outputs=boxes')
    if augmentation:
        raise UserError(f'{file} is an export, which cannot augment: give the work directory of its run')
    return detector_of(xla.jit(call), metadata, batch_size)


def _one_image(outputs: Sequence[np.ndarray], place: int, width: int, flip: bool) -> merge.Boxes:
    """The boxes of one image of a batch, without padding, mirrored back if `flip`."""
    boxes_K4, scores_K, labels_K = (column[place] for column in outputs)
    if flip:
        x1, y1, x2, y2 = boxes_K4.T
        boxes_K4 = np.stack([width - x2, y1, width - x1, y2], axis=1)
    used = int(np.count_nonzero(labels_K >= 0))  # the rest is padding
    return merge.Boxes(boxes_K4[:used], scores_K[:used], labels_K[:used])


def _chosen(defaults: Thresholds, **given: float | None) -> Thresholds:
    """The thresholds of a call, as Python floats: another type would compile another program."""
    thresholds = defaults._replace(**{name: value for name, value in given.items() if value is not None})
    if not (0 <= thresholds.score <= 1 and 0 <= thresholds.iou <= 1 and thresholds.sigma > 0):
        raise UserError(f'thresholds out of range: {thresholds}: score and iou must be in 0 .. 1, sigma above 0')
    return Thresholds(*map(float, thresholds))
