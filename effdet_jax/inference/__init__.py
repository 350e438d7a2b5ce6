"""From a work directory to boxes."""

from effdet_jax.inference.detector import Detections, Detector

__all__ = ['Detections', 'Detector']
