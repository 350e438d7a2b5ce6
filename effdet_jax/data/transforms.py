"""Pixels and boxes on their way to the network: decode, scale, crop, pad. Pure functions.

Flips, colour and normalisation happen on the device, after these; the padding is zeroed there once more, because a
pad is the mean colour only after normalising (spec 9).
"""

import io
import stat
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps

from effdet_jax.errors import UnreadableError

# What an image may claim to be before any of it is decoded: 537 MB as RGB. Far above any camera; a bomb claims more.
MAX_PIXELS = 178_956_970
MAX_BYTES = 2**31 - 1  # of a file; OpenCV's decoders take no more

# Read by OpenCV, and by Pillow, which tells their size from the header. A format of which only one of them knows is
# refused: either its size is unknown until it is decoded, or its decoder is one that few have tested.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'AVIF', 'JPEG2000', 'PPM', 'SUN')

# Of a damaged image OpenCV prints several lines; ours is one, and names the file.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(encoded: bytes, name: str, *, upright: bool = False) -> UInt8[np.ndarray, 'H W 3']:
    """Encoded image -> RGB.

    Grey becomes three equal channels, 16 bits become 8, transparent pixels are laid on white, as viewers show them.
    The orientation in a photograph's EXIF data is ignored, because annotations refer to the stored pixels, unless
    `upright`. `name` is for the message of the UnreadableError that an undecodable, empty or enormous image raises.
    """
    header = _open_header(encoded, name)
    if header.mode in ('RGBA', 'LA', 'PA') or 'transparency' in header.info:
        return _on_white(header, name, upright)
    # IMREAD_COLOR_RGB: three channels of 8 bits, whatever the file holds
    flags = cv2.IMREAD_COLOR_RGB if upright else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image_HW3 = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise UnreadableError(name, f'cannot be decoded ({error.err})') from error
    if image_HW3 is None:
        raise UnreadableError(name, 'not an image that can be decoded')
    return image_HW3


def read_image(path: str | Path) -> UInt8[np.ndarray, 'H W 3']:
    """An image file -> RGB, turned upright by its EXIF orientation; otherwise as `decode`."""
    return decode(read_bytes(path), str(path), upright=True)


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file of at most MAX_BYTES; an UnreadableError where it cannot be read."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # of a device or a pipe one could read for ever
            raise UnreadableError(path, 'not a regular file')
        if status.st_size > MAX_BYTES:
            raise UnreadableError(path, f'{status.st_size:,} bytes, more than {MAX_BYTES:,}')
        return path.read_bytes()
    except OSError as error:
        reason = f'cannot be read ({error.strerror})'
        raise UnreadableError(path, reason, 'check the path and its permissions') from error
    except ValueError as error:  # a NUL, half a character
        raise UnreadableError(repr(str(path)), f'no file can have this name ({error})', 'correct it') from error


def image_size(encoded: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the stored pixels, from the header alone. Raises UnreadableError as `decode`."""
    header = _open_header(encoded, name)
    return header.height, header.width


def scaled_size(height: int, width: int, target_hw: tuple[int, int]) -> tuple[tuple[int, int], np.float32]:
    """((height, width) that fits into `target_hw` with the same aspect ratio, scale).

    In float32 with truncation, as the official code: 141 pixels scaled by 128 / 141 are 127 pixels (spec 9).
    """
    scale = min(np.float32(target_hw[0]) / np.float32(height), np.float32(target_hw[1]) / np.float32(width))
    # a very long image must keep one row
    return (max(1, int(np.float32(height) * scale)), max(1, int(np.float32(width) * scale))), scale


def resize_and_pad(
    image: UInt8[np.ndarray, 'h w 3'], image_size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, 'H W 3'], tuple[int, int], float]:
    """For evaluation and prediction: scales the image to fit into `image_size` (H, W), zeros at bottom and right.

    Returns (image, valid_size: the (height, width) of the part that is image, image_scale: multiply a box in network
    pixels by it to return to the original image).
    """
    height, width, _ = image.shape
    valid_size, scale = scaled_size(height, width, image_size)
    return _pad(_resize(image, valid_size), image_size), valid_size, float(np.float32(1) / scale)


def jitter_resize_crop(
    image: UInt8[np.ndarray, 'h w 3'],
    boxes: Float[np.ndarray, 'M 4'],
    image_size: tuple[int, int],
    scale_range: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, 'H W 3'], tuple[int, int], Float[np.ndarray, 'K 4'], Bool[np.ndarray, 'M']]:
    """For training: scales by a random factor of the size that fits, crops at random or pads to `image_size` (spec 9).

    `boxes` are yxyx pixels of the image. Returns (image, valid_size, the boxes that are left in yxyx pixels of the
    network input, clipped to [0, side - 1], and which of the M boxes they are).
    """
    factor = np.float32(rng.uniform(*scale_range))
    target = (max(1, int(factor * np.float32(image_size[0]))), max(1, int(factor * np.float32(image_size[1]))))
    height, width, _ = image.shape
    scaled, _ = scaled_size(height, width, target)
    draws = rng.random(2, np.float32)
    top, left = (int(np.float32(max(0, s - out)) * u) for s, out, u in zip(scaled, image_size, draws, strict=True))

    crop = _resize(image, scaled)[top : top + image_size[0], left : left + image_size[1]]
    boxes_M4 = _scale_boxes(boxes, (height, width), scaled) - np.array([top, left, top, left], np.float32)
    # official clips to the last pixel, not to the edge (spec 9)
    boxes_M4 = np.clip(boxes_M4, np.float32(0), np.array([*image_size, *image_size], np.float32) - 1)
    keep_M = np.all(boxes_M4[:, 2:] > boxes_M4[:, :2], axis=1)
    valid_size = crop.shape[0], crop.shape[1]
    return _pad(crop, image_size), valid_size, boxes_M4[keep_M], keep_M


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres and without antialiasing (spec 9)."""
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def _pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    padded = np.zeros((*size, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _scale_boxes(boxes_M4: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """By the integer sizes, not by the scale they were truncated from: boxes stay on their pixels (spec 9)."""
    normalized_M4 = boxes_M4 / np.array([*size, *size], np.float32)
    return normalized_M4 * np.array([*new_size, *new_size], np.float32)


def _open_header(encoded: bytes, name: str) -> Image.Image:
    """The image not yet decoded, of a known format and a bearable size."""
    if not encoded:
        raise UnreadableError(name, 'the file is empty')
    try:
        header = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableError(name, _ENORMOUS, 'scale it down or remove it') from error
    except Exception as error:  # Pillow's readers raise what they like on damaged headers
        raise UnreadableError(name, f'not an image that can be decoded, of {", ".join(FORMATS)}') from error
    if header.height * header.width > MAX_PIXELS:
        raise UnreadableError(name, _ENORMOUS, 'scale it down or remove it')
    return header


def _on_white(image: Image.Image, name: str, upright: bool) -> np.ndarray:
    try:
        image = (ImageOps.exif_transpose(image) if upright else image).convert('RGBA')
    except Exception as error:  # as above; convert is what decodes
        raise UnreadableError(name, f'cannot be decoded ({error})') from error
    white = Image.new('RGBA', image.size, 'white')
    return np.asarray(Image.alpha_composite(white, image).convert('RGB'))


_ENORMOUS = f'more than {MAX_PIXELS // 10**6} megapixels, probably damaged'
