"""EfficientDet in JAX: images go in at the left, boxes come out at the right (ARCHITECTURE.md)."""

__version__ = '0.1.0'
