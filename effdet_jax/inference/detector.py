"""uint8 images -> boxes: the one jitted function behind evaluation, prediction and export."""

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
    """What may change from call to call in one compiled program."""

    score: float | Float[Array, '']  # below it nothing is found, 0..1
    iou: float | Float[Array, '']  # of two boxes that hard NMS takes for one object, 0..1
    sigma: float | Float[Array, '']  # of Gaussian NMS: the smaller, the faster rivals fade


# (pixels [P, 3], sizes [B, 2], thresholds) -> boxes xyxy [B, K, 4], scores, labels; see make_detect_pixels
DetectPixels = Callable[[Any, Any, Thresholds], tuple[Any, Any, Any]]


BOXES = ('boxes', 'scores', 'labels')  # what such a function returns, by the names that exports give them


class Detector:
    """A trained detector, ready to be called on images of any size.

    detector = Detector.load('runs/d3')
    found = detector(image)                   # uint8 [H, W, 3] RGB, a PIL image, or the path of a file
    found = detector([image, another])        # of any sizes and kinds: a list
    found = detector(image, score=0.3)        # compiles nothing again
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
        """`functions`: one for each scale of `augmentation`; a single one without it. `load` makes them."""
        self.class_names, self.category_ids = tuple(class_names), tuple(category_ids)
        self.batch_size = batch_size
        self._functions, self._thresholds = functions, thresholds
        self._augmentation = augmentation or merge.Augmentation()

    @classmethod
    def load(
        cls, workdir: str | Path, *, batch_size: int = 8, augmentation: merge.Augmentation | None = None
    ) -> 'Detector':
        """The best checkpoint of a run, or a StableHLO export. The network sees at most `batch_size` images at once.

        With `augmentation`, each view goes through hard NMS, whatever the config says, before they are merged.

        Raises:
          UserError: where the work directory holds no run, or a backbone alone; for an address, augmentation of an
            export, and an export of raw outputs.
        """
        folder = paths.local(workdir)
        if folder.is_file():
            return _of_export(folder, batch_size, augmentation)
        config: Any = run_config.load_detector(folder)
        if not config.dataset.class_names:
            raise UserError(
                'these weights are a backbone alone: train a detector from them with config.train.init_from'
            )
        model = build_model(config.model, len(config.dataset.class_names))
        _, variables = checkpoint.load_variables(folder, config.checkpoint.best)
        variables = jax.device_put(fold(variables))
        if augmentation:  # the faded copies that soft NMS leaves would pull down the averages that merging takes
            config.eval.nms = 'hard'
        scales = augmentation.scales if augmentation else (1.0,)
        return cls(
            [functools.partial(xla.jit(make_detect_pixels(config, model, scale)), variables) for scale in scales],
            config.dataset.class_names,
            config.dataset.category_ids,
            Thresholds(config.eval.score_threshold, config.eval.iou_threshold, config.eval.sigma),
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
        """What is found in an image, or in each of a list of them, of any sizes.

        An image is an array of NumPy or JAX, uint8 [H, W, 3] in RGB, a PIL image, or the path of a file. The latter two
        are turned upright by their EXIF orientation, and boxes are those of the upright image.

        `score`, `iou` and `sigma` replace the config's thresholds (see `Thresholds`).

        Raises:
          UserError: for anything that is no such image, and for a threshold out of range.
        """
        if are_several(images):
            return list(self.stream(images, score=score, iou=iou, sigma=sigma))
        return next(self.stream([images], score=score, iou=iou, sigma=sigma))

    def stream(
        self,
        images: Iterable[Any],  # ImageLike: what is not is refused in a line
        *,
        score: float | None = None,
        iou: float | None = None,
        sigma: float | None = None,
    ) -> Iterator[Detections]:
        """As a call with a list, one after the other: takes the next images while the device works on those before."""
        thresholds = _chosen(self._thresholds, score=score, iou=iou, sigma=sigma)
        running: Callable[[], list[Detections]] | None = None
        for batch, places in packing.batches(map(to_array, images), self.batch_size):
            before, running = running, self._start(batch, places, thresholds)
            yield from before() if before else ()
        yield from running() if running else ()

    def _start(self, images: list[np.ndarray], places: int, thresholds: Thresholds) -> Callable[[], list[Detections]]:
        """Sends a batch to the device; calling the result waits for it."""
        views = [
            (flip, function(*packed, thresholds))
            for flip in self._augmentation.flips
            for packed in [packing.pack(images, places, flip=flip)]
            for function in self._functions
        ]
        widths = [image.shape[1] for image in images]

        def finish() -> list[Detections]:
            arrived = [(flip, jax.device_get(found)) for flip, found in views]
            return [
                self._merge([_one_image(found, place, width, flip) for flip, found in arrived], thresholds)
                for place, width in enumerate(widths)
            ]

        return finish

    def _merge(self, views: list[merge.Boxes], thresholds: Thresholds) -> Detections:
        found = views[0]
        if len(views) > 1:
            most = max(len(view.scores) for view in views)
            merged = merge.merge(views, self._augmentation)
            kept = np.flatnonzero(merged.scores > thresholds.score)[:most]
            found = merge.Boxes(*(column[kept] for column in merged))
        return Detections(*found, tuple(self.class_names[label] for label in found.labels.tolist()))


def make_detect_pixels(config: Any, model: EfficientDet, scale: float = 1.0) -> Callable[..., tuple[Array, ...]]:
    """`detect(variables, pixels uint8 [P, 3], sizes [B, 2], thresholds)`: from images of any sizes to their boxes.

    `pixels` are B images row by row, one after the other (`packing.pack`; images of one size [B, H, W, 3], reshaped),
    and `sizes` their heights and widths. `scale` multiplies the size of the network's input. Returns boxes xyxy in
    pixels of the original images [B, K, 4], scores [B, K], labels [B, K] (-1: padding), best first. Pure: to be jitted
    or exported as it is.
    """
    height, width = (max(round(scale * side), 1) for side in config.image.size)
    detect_resized = make_detect(config, model, (height, width))

    def detect(
        variables: Any, pixels: UInt8[Array, 'P 3'], sizes: Int[Array, 'B 2'], thresholds: Thresholds
    ) -> tuple[Array, ...]:
        images, valid_size, image_scale = preprocess.resize_and_pad(pixels, sizes, (height, width))
        boxes_xyxy, scores, labels = to_original(detect_resized(variables, images, valid_size, thresholds), image_scale)
        # Of a very long image one row of network pixels is left, which reaches further than the image does.
        limits_B14 = sizes[:, None, np.array([1, 0, 1, 0])].astype(jnp.float32)
        return jnp.minimum(boxes_xyxy, limits_B14), scores, labels

    return detect


def make_detect(
    config: Any, model: EfficientDet, image_size: tuple[int, int] | None = None
) -> Callable[..., NetworkDetections]:
    """`detect(variables, images uint8 [B, H, W, 3], valid_size [B, 2])` -> detections in network pixels.

    The images are resized and padded to `image_size` (the config's) already. `thresholds` may be given as a fourth
    argument instead of the config's.
    """
    raw = make_raw(config, model)
    anchors_N4 = image_anchors(config, image_size)
    c = config.eval
    defaults = Thresholds(c.score_threshold, c.iou_threshold, c.sigma)
    options = dict(per_class=c.per_class, max_candidates=c.max_candidates, kind=c.nms, max_outputs=c.max_detections)

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
    """`raw(variables, images uint8 [B, H, W, 3], valid_size [B, 2])` -> what the network says of each anchor.

    The images are resized and padded already; their normalisation is part of it.
    """
    statistics = config.image.mean, config.image.std, config.image.padding

    def raw(variables: Any, images: Array, valid_size: Array) -> Outputs:
        outputs: Any = model.apply(variables, preprocess.normalize(images, valid_size, *statistics), train=False)
        return outputs

    return raw


def image_anchors(config: Any, image_size: tuple[int, int] | None = None) -> Float[np.ndarray, 'N 4']:
    """The anchors of an input of `image_size`; of the config's, where none is given."""
    a, size = config.model.anchors, tuple(config.image.size) if image_size is None else image_size
    levels = anchors.level_sizes(size, anchors.MIN_LEVEL, config.model.max_level)
    return anchors.make_anchors(levels, size, a.scale, a.octaves, a.aspect_ratios)


def to_original(detections: NetworkDetections, image_scale: Any) -> tuple[Any, Any, Any]:
    """(boxes xyxy in pixels of the original images `[B, K, 4]`, scores `[B, K]`, labels `[B, K]`, -1 as padding).

    In NumPy or jax, as the detections and `image_scale` `[B]` are.
    """
    return (
        detections.boxes[..., np.array([1, 0, 3, 2])] * image_scale[:, None, None],
        detections.scores,
        detections.labels,
    )


def detector_of(run: Callable[..., tuple[Any, ...]], metadata: Mapping[str, Any], batch_size: int = 8) -> Detector:
    """The detector that an exported program of (pixels, sizes, score, iou, sigma) is; `metadata`: of its file."""
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
        raise UserError(f'{file} is an export of raw outputs: export with --outputs=boxes for a Detector')
    if augmentation:
        raise UserError(f'{file} is an export, which looks once: give the work directory of its run')
    return detector_of(xla.jit(call), metadata, batch_size)


def _one_image(found: Sequence[np.ndarray], place: int, width: int, flip: bool) -> merge.Boxes:
    """Of a batch, without padding and as the image lay before it was mirrored."""
    boxes_K4, scores_K, labels_K = (column[place] for column in found)
    if flip:
        x1, y1, x2, y2 = boxes_K4.T
        boxes_K4 = np.stack([width - x2, y1, width - x1, y2], axis=1)
    used = int(np.count_nonzero(labels_K >= 0))  # the places behind them are padding
    return merge.Boxes(boxes_K4[:used], scores_K[:used], labels_K[:used])


def _chosen(defaults: Thresholds, **given: float | None) -> Thresholds:
    """As Python floats: another type would be another program."""
    thresholds = defaults._replace(**{name: value for name, value in given.items() if value is not None})
    if not (0 <= thresholds.score <= 1 and 0 <= thresholds.iou <= 1 and thresholds.sigma > 0):
        raise UserError(f'thresholds out of range: {thresholds}; score and iou lie in 0 .. 1, sigma above 0')
    return Thresholds(*map(float, thresholds))
