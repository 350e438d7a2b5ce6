"""Weights of other implementations, matched by name."""

from effdet_jax.weights.names import from_official

__all__ = ['from_official']
