"""What an evaluator compares: the ground truth and the detections of one image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int

from effdet_jax.errors import UserError


@dataclass(frozen=True)
class GroundTruth:
    """The objects of one image, boxes in pixels of the original image, labels from 0.

    `areas` are the dataset's own object areas (COCO: of the segment, not of the box); they only choose between small,
    medium and large. `is_crowd` marks one box around many objects (COCO), `is_difficult` an object that VOC leaves out.
    """

    boxes_xyxy: Float32[np.ndarray, 'M 4']
    labels: Int[np.ndarray, 'M']
    areas: Float32[np.ndarray, 'M']
    is_crowd: Bool[np.ndarray, 'M']
    is_difficult: Bool[np.ndarray, 'M']


@dataclass(frozen=True)
class Detections:
    """What was found in one image, boxes in pixels of the original image, labels from 0, in any order, no padding."""

    boxes_xyxy: Float32[np.ndarray, 'N 4']
    scores: Float32[np.ndarray, 'N']
    labels: Int[np.ndarray, 'N']


def check_pairs(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], num_classes: int) -> None:
    """Refuses what would end in a silent 0: no images, unequal lengths, labels outside of [0, num_classes)."""
    if len(ground_truth) != len(detections):
        raise ValueError(f'{len(ground_truth)} images of ground truth, {len(detections)} images of detections')
    if not ground_truth:
        raise UserError('evaluation: the evaluation split holds no images; choose another eval_split')
    for kind, images in (('ground truth', ground_truth), ('detections', detections)):
        for index, image in enumerate(images):
            outside = image.labels[(image.labels < 0) | (image.labels >= num_classes)]
            if outside.size:
                raise UserError(
                    f'evaluation: {kind} of image {index} has label {outside[0]}, but {num_classes} classes are named '
                    f'(0 to {num_classes - 1}); check the class names of the evaluation split'
                )
