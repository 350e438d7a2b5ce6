"""What a source yields: one image and its annotations."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The annotations of one image, in pixels of the original image.

    image_id: the COCO id, else the stem of the file name or the index. file_name: used in messages, may be ''.
    boxes_yxyx: float32. labels: int32, 0-based. areas: float32, the segmentation area of COCO if given, else the area
    of the box. is_crowd: a region with many objects; not a training target, and ignored by evaluation.
    is_difficult: the flag of PASCAL VOC; a training target, but ignored by evaluation.
    """

    image_id: int | str
    file_name: str
    boxes_yxyx: Float[np.ndarray, 'M 4']
    labels: Int[np.ndarray, 'M']
    areas: Float[np.ndarray, 'M']
    is_crowd: Bool[np.ndarray, 'M']
    is_difficult: Bool[np.ndarray, 'M']

    def select(self, keep_M: np.ndarray) -> 'Annotations':
        """Keeps the objects for which `keep_M` (bool [M]) is true."""
        return dataclasses.replace(self, **{field: getattr(self, field)[keep_M] for field in _PER_OBJECT})


@dataclasses.dataclass(frozen=True)
class Example:
    """One image, as encoded bytes (JPEG, PNG, ...) or as an RGB array, and its annotations."""

    image: bytes | UInt8[np.ndarray, 'H W 3']
    annotations: Annotations


_PER_OBJECT = ('boxes_yxyx', 'labels', 'areas', 'is_crowd', 'is_difficult')
