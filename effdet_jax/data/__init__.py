"""Data on the host: from files and drawings to batches of NumPy arrays. Nothing here imports jax."""

from effdet_jax.data.checks import Faults, clean, describe
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.pipeline import EvalBatch, eval_batches, train_batches
from effdet_jax.data.sources import Source, open_source, resolve_split
from effdet_jax.data.transforms import decode, image_size, read_image, resize_and_pad

__all__ = [
    'Annotations',
    'EvalBatch',
    'Example',
    'Faults',
    'Source',
    'clean',
    'decode',
    'describe',
    'eval_batches',
    'image_size',
    'open_source',
    'read_image',
    'resize_and_pad',
    'resolve_split',
    'train_batches',
]
