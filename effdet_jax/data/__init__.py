"""The input pipeline on the host: from files or generated images to batches of NumPy arrays, without jax."""

from effdet_jax.data.checks import KINDS, Finding, clean
from effdet_jax.data.example import Annotations, Example
from effdet_jax.data.listing import Listing
from effdet_jax.data.pipeline import EvalBatch, Unreadable, check_unreadable, eval_batches, load, train_batches
from effdet_jax.data.sources import CheckableSource, Source, fingerprint, open_source, resolve_split
from effdet_jax.data.speed import batch_rate, stage_rates
from effdet_jax.data.transforms import decode, image_size, read_image, resize_and_pad

__all__ = [
    'KINDS',
    'Annotations',
    'CheckableSource',
    'EvalBatch',
    'Example',
    'Finding',
    'Listing',
    'Source',
    'Unreadable',
    'batch_rate',
    'check_unreadable',
    'clean',
    'decode',
    'eval_batches',
    'fingerprint',
    'image_size',
    'load',
    'open_source',
    'read_image',
    'resize_and_pad',
    'resolve_split',
    'stage_rates',
    'train_batches',
]
