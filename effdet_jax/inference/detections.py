"""The detections in one image: filter, draw, crop, convert."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from effdet_jax.errors import import_optional
from effdet_jax.inference.images import ImageLike, to_array
from effdet_jax.records import pictures


@dataclasses.dataclass(frozen=True)
class Detections:
    """The detections in one image, best first. Boxes are in pixels of the original image."""

    boxes_xyxy: Float[np.ndarray, 'K 4']
    scores: Float[np.ndarray, 'K']
    labels: Int[np.ndarray, 'K']  # 0-based
    names: tuple[str, ...]  # of the labels

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> 'Detections':
        """The detections with a score of at least `score`."""
        return self._where(self.scores >= score)

    def of(self, names: str | Iterable[str]) -> 'Detections':
        """The detections of one class, or of several, by name."""
        wanted = {names} if isinstance(names, str) else set(names)
        return self._where(np.array([name in wanted for name in self.names], bool))

    def draw(self, image: ImageLike, *, enlarge: bool = True) -> UInt8[np.ndarray, 'H2 W2 3']:
        """Draws boxes, names and scores onto a copy of the image, in RGB. By default, small images are enlarged."""
        by_label = dict(zip(self.labels.tolist(), self.names, strict=True))
        names = [by_label.get(label, '') for label in range(max(by_label, default=-1) + 1)]
        return pictures.draw_boxes(to_array(image), self.boxes_xyxy, self.labels, names, self.scores, enlarge=enlarge)

    def crops(self, image: ImageLike) -> list[UInt8[np.ndarray, '_ _ 3']]:
        """Cuts each box out of the image, rounded outwards to whole pixels, at least one."""
        pixels = to_array(image)
        height, width, _ = pixels.shape
        limits_4 = np.array([width, height, width, height])
        corners_K4 = np.concatenate([np.floor(self.boxes_xyxy[:, :2]), np.ceil(self.boxes_xyxy[:, 2:])], axis=1)
        corners_K4 = np.clip(corners_K4, 0, limits_4 - [1, 1, 0, 0]).astype(int)
        return [pixels[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] for x1, y1, x2, y2 in corners_K4]

    def to_coco(self, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Converts to COCO results: bbox is x, y, width, height; `category_ids` by label (`Detector.category_ids`)."""
        return [
            {
                'image_id': image_id,
                'category_id': category_ids[label],
                'bbox': [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                'score': round(float(score), 5),
            }
            for (x1, y1, x2, y2), score, label in zip(self.boxes_xyxy, self.scores, self.labels, strict=True)
        ]

    def to_supervision(self) -> Any:
        """Converts to `supervision.Detections`, for the trackers and annotators of that package.

        Raises:
          UserError: if it is not installed.
        """
        return import_optional('supervision', 'supervision').Detections(
            xyxy=self.boxes_xyxy,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={'class_name': np.array(self.names, str)},
        )

    def _where(self, kept_K: Bool[np.ndarray, 'K']) -> 'Detections':
        names = tuple(name for name, kept in zip(self.names, kept_K, strict=True) if kept)
        return Detections(self.boxes_xyxy[kept_K], self.scores[kept_K], self.labels[kept_K], names)
