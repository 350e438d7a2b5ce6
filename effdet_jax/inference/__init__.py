"""Detection with a trained model: from a work directory or an export to boxes."""

from effdet_jax.inference.detections import Detections
from effdet_jax.inference.detector import Detector
from effdet_jax.inference.merge import Augmentation

__all__ = ['Augmentation', 'Detections', 'Detector']
