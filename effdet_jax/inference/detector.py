"""uint8 images -> boxes: the one jitted function behind evaluation, prediction and export."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from effdet_jax import config as run_config
from effdet_jax.data import transforms
from effdet_jax.detection import anchors, preprocess
from effdet_jax.detection.postprocess import Detections as NetworkDetections
from effdet_jax.detection.postprocess import postprocess
from effdet_jax.errors import UserError
from effdet_jax.model import EfficientDet, build_model
from effdet_jax.records import checkpoint


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image, best first; pixels of the original image."""

    boxes_xyxy: Float[np.ndarray, 'K 4']
    scores: Float[np.ndarray, 'K']
    labels: Int[np.ndarray, 'K']  # 0-based
    names: tuple[str, ...]  # of the labels

    def above(self, min_score: float) -> 'Detections':
        """Those with a score of at least `min_score`."""
        kept_K = self.scores >= min_score
        names = tuple(name for name, kept in zip(self.names, kept_K, strict=True) if kept)
        return Detections(self.boxes_xyxy[kept_K], self.scores[kept_K], self.labels[kept_K], names)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """As COCO results: bbox is x, y, width, height."""
        return [
            {
                'image_id': image_id,
                'category_id': category_ids[label],
                'bbox': [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                'score': round(float(score), 5),
            }
            for (x1, y1, x2, y2), score, label in zip(self.boxes_xyxy, self.scores, self.labels, strict=True)
        ]


class Detector:
    """A trained detector, ready to be called on images of any size.

    detector = Detector.load('runs/d3')
    detections = detector(image)      # uint8 [H, W, 3] RGB
    """

    def __init__(self, config: Any, variables: dict[str, Any]) -> None:
        """`config` as a work directory holds it, with the class names filled in."""
        self.class_names: tuple[str, ...] = tuple(config.dataset.class_names)
        if not self.class_names:
            raise UserError(
                'these weights are a backbone alone: train a detector from them with config.train.init_from'
            )
        self.category_ids: tuple[int, ...] = tuple(config.dataset.category_ids)
        self._image_size = tuple(config.image.size)
        model = build_model(config.model, len(self.class_names))
        self._variables = jax.device_put(variables)
        self._detect = jax.jit(make_detect(config, model))

    @classmethod
    def load(cls, workdir: str | Path) -> 'Detector':
        """The best checkpoint of a run.

        Raises:
          UserError: where the work directory holds no run.
        """
        config = run_config.load(Path(workdir))
        _, variables = checkpoint.load_variables(Path(workdir))
        return cls(config, variables)

    def __call__(self, image: UInt8[np.ndarray, 'H W 3']) -> Detections:
        """Everything found in an RGB image."""
        resized, valid_size, image_scale = transforms.resize_and_pad(image, self._image_size)
        found = self._detect(self._variables, resized[None], np.asarray([valid_size], np.int32))
        boxes_xyxy, scores, labels = (x[0] for x in to_original(found, np.asarray([image_scale], np.float32)))
        kept = labels >= 0
        names = tuple(self.class_names[label] for label in labels[kept])
        # Of a very long image one row of network pixels is left, which reaches further than the image does.
        height, width, _ = image.shape
        boxes_xyxy = np.minimum(boxes_xyxy, np.array([width, height, width, height], np.float32))
        return Detections(boxes_xyxy[kept], scores[kept], labels[kept], names)


def make_detect(config: Any, model: EfficientDet) -> Callable[[Any, Array, Array], NetworkDetections]:
    """`detect(variables, images uint8 [B, H, W, 3], valid_size [B, 2])` -> detections in network pixels."""
    statistics = config.image.mean, config.image.std, config.image.padding
    anchors_N4 = image_anchors(config)
    c = config.eval
    options = dict(
        per_class=c.per_class,
        max_candidates=c.max_candidates,
        kind=c.nms,
        iou_threshold=c.iou_threshold,
        sigma=c.sigma,
        score_threshold=c.score_threshold,
        max_outputs=c.max_detections,
    )

    def detect(variables: Any, images: Array, valid_size: Array) -> NetworkDetections:
        outputs: Any = model.apply(variables, preprocess.normalize(images, valid_size, *statistics), train=False)

        def finish(class_logits: Array, box_regressions: Array, size: Array) -> NetworkDetections:
            return postprocess(class_logits, box_regressions, jnp.asarray(anchors_N4), size, **options)

        return jax.vmap(finish)(outputs.class_logits, outputs.box_regressions, valid_size)

    return detect


def image_anchors(config: Any) -> Float[np.ndarray, 'N 4']:
    """The anchors of the config's input size."""
    a, size = config.model.anchors, tuple(config.image.size)
    levels = anchors.level_sizes(size, anchors.MIN_LEVEL, config.model.max_level)
    return anchors.make_anchors(levels, size, a.scale, a.octaves, a.aspect_ratios)


def to_original(
    detections: NetworkDetections, image_scale: Float[np.ndarray, 'B']
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes xyxy in pixels of the original images `[B, K, 4]`, scores `[B, K]`, labels `[B, K]`, -1 as padding)."""
    boxes_yxyx, scores, labels = (np.asarray(x) for x in detections)
    return boxes_yxyx[..., [1, 0, 3, 2]] * image_scale[:, None, None], scores, labels
