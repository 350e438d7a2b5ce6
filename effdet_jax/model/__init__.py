"""The network: parameters live here and nowhere else."""

from effdet_jax.model.efficientdet import EfficientDet, Outputs, build_model

__all__ = ['EfficientDet', 'Outputs', 'build_model']
