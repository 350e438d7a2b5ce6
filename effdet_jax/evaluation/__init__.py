"""Metrics from detections and ground truth, in NumPy without jax."""

from effdet_jax.evaluation.coco import coco_by_size, coco_metrics
from effdet_jax.evaluation.types import Detections, GroundTruth
from effdet_jax.evaluation.voc import voc_metrics

__all__ = ['Detections', 'GroundTruth', 'coco_by_size', 'coco_metrics', 'voc_metrics']
