"""The inputs of all evaluators: ground truth and detections of one image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int

from effdet_jax.errors import UserError


@dataclass(frozen=True)
class GroundTruth:
    """The objects of one image, boxes in pixels of the original image, 0-based labels.

    `areas` are the object areas given by the dataset (COCO: of the mask, not the box), used only to distinguish small,
    medium and large. `is_crowd` marks a box around many objects (COCO), `is_difficult` an object that VOC ignores.
    """

    boxes_xyxy: Float32[np.ndarray, 'M 4']
    labels: Int[np.ndarray, 'M']
    areas: Float32[np.ndarray, 'M']
    is_crowd: Bool[np.ndarray, 'M']
    is_difficult: Bool[np.ndarray, 'M']


@dataclass(frozen=True)
class Detections:
    """The detections in one image, boxes in its original pixels, 0-based labels, in any order, without padding."""

    boxes_xyxy: Float32[np.ndarray, 'N 4']
    scores: Float32[np.ndarray, 'N']
    labels: Int[np.ndarray, 'N']


def check_pairs(ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], num_classes: int) -> None:
    """Raises an error for inputs that would silently score 0: no images, unequal lengths, unknown labels."""
    if len(ground_truth) != len(detections):
        raise ValueError(f'{len(ground_truth)} images of ground truth, {len(detections)} images of detections')
    if not ground_truth:
        raise UserError('evaluation: the evaluation split has no images: choose another config.dataset.eval_split')
    for kind, images in (('ground truth', ground_truth), ('detections', detections)):
        for index, image in enumerate(images):
            outside = image.labels[(image.labels < 0) | (image.labels >= num_classes)]
            if outside.size:
                raise UserError(
                    f'evaluation: {kind} of image {index} has label {outside[0]}, but the labels are 0 to '
                    f'{num_classes - 1}: check the class names of the evaluation split'
                )
