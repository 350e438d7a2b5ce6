"""What a source yields: one image and what is known of it."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What is known of one image, in pixels of the original image.

    image_id: COCO: its id; else the stem of the file name, or the index. file_name: for messages, '' where there is
    none. boxes_yxyx: float32. labels: int32, 0-based. areas: float32, COCO's segmentation area where given, else the
    area of the box. is_crowd: a region of many objects, no training target, not to be held against a detector.
    is_difficult: PASCAL VOC's mark; a training target, ignored by its evaluation.
    """

    image_id: int | str
    file_name: str
    boxes_yxyx: Float[np.ndarray, 'M 4']
    labels: Int[np.ndarray, 'M']
    areas: Float[np.ndarray, 'M']
    is_crowd: Bool[np.ndarray, 'M']
    is_difficult: Bool[np.ndarray, 'M']

    def select(self, keep_M: np.ndarray) -> 'Annotations':
        """The same image with the objects where `keep_M` (bool [M]) is true."""
        return dataclasses.replace(self, **{field: getattr(self, field)[keep_M] for field in _PER_OBJECT})


@dataclasses.dataclass(frozen=True)
class Example:
    """One image, encoded (JPEG, PNG, ... bytes) or RGB, and its annotations."""

    image: bytes | UInt8[np.ndarray, 'H W 3']
    annotations: Annotations


_PER_OBJECT = ('boxes_yxyx', 'labels', 'areas', 'is_crowd', 'is_difficult')
