"""Converts what a detector accepts as an image (arrays, PIL images, paths) to upright RGB arrays."""

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from effdet_jax.data import decode, read_image
from effdet_jax.errors import UserError
from effdet_jax.runtime import paths

ImageLike = np.ndarray | jax.Array | Image.Image | str | os.PathLike[str]
DECODED_AS_PNG = ('LA', 'P', 'RGBA', 'I;16')  # modes for which Pillow's `convert` is not enough


def are_several(images: Any) -> bool:
    """Whether `images` is an iterable of images, not a single image or something else."""
    one = isinstance(images, str | bytes | os.PathLike | Image.Image | Mapping) or hasattr(images, '__array__')
    return isinstance(images, Iterable) and not one


def to_array(image: Any) -> Any:
    """Converts a NumPy or JAX array, a PIL image or the path of an image file to a NumPy array.

    PIL images and files become uint8 [H, W, 3] RGB, upright by their EXIF orientation. A PIL image gives the same
    pixels as its file would: transparency and 16 bits are handled by `data.decode`. Anything else is returned
    unchanged; `packing.batches` checks it.

    Raises:
      UserError: for a file that cannot be read, an address, and a PIL image that cannot be converted to RGB.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(paths.local(os.fsdecode(image)))
    if isinstance(image, Image.Image):
        return _of_pil(image)
    return np.asarray(image) if hasattr(image, '__array__') else image


def _of_pil(image: Image.Image) -> UInt8[np.ndarray, 'H W 3']:
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in DECODED_AS_PNG or 'transparency' in upright.info:
            encoded = io.BytesIO()
            upright.save(encoded, 'PNG', compress_level=0)
            return decode(encoded.getvalue(), str(image))
        if upright.mode in ('I', 'F'):
            raise ValueError(f'mode {upright.mode} has no known range')
        return np.asarray(upright.convert('RGB'))
    except Exception as error:  # Pillow reads the file only now, and raises anything if it is damaged
        raise UserError(f'{image} cannot be used ({error}): convert it to RGB, or replace its file') from error
