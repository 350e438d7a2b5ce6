"""Pixels on their way to the network: decode, scale, crop, pad. Pure functions.

Flips, colour and normalisation happen on the device, after these; the padding is zeroed there once more, because a
pad is the mean colour only after normalising (spec 9).
"""

import io
import stat
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
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


def decode(encoded: bytes, name: str, *, upright: bool = False, reduction: int = 1) -> UInt8[np.ndarray, 'H W 3']:
    """Encoded image -> RGB.

    `reduction`: 2, 4 or 8 make a JPEG that many times smaller, odd sides rounded up, as averages and at less cost.

    Grey becomes three equal channels, 16 bits become 8, transparent pixels are laid on white, as viewers show them.
    The orientation in a photograph's EXIF data is ignored, because annotations refer to the stored pixels, unless
    `upright`. `name` is for the message of the UnreadableError that an undecodable, empty or enormous image raises.
    """
    header = _open_header(encoded, name)
    if header.mode in ('RGBA', 'LA', 'PA') or 'transparency' in header.info:
        return _on_white(header, name, upright)
    flags = cv2.IMREAD_COLOR_RGB if upright else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    if is_jpeg(encoded):
        flags |= _REDUCTIONS[reduction]
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


def is_jpeg(encoded: bytes) -> bool:
    """Whether `decode` can make it smaller as it decodes."""
    return encoded.startswith(b'\xff\xd8\xff')


def scaled_size(height: int, width: int, target_hw: tuple[int, int]) -> tuple[tuple[int, int], np.float32]:
    """((height, width) that fits into `target_hw` with the same aspect ratio, scale).

    In float32 with truncation, as the official code: 141 pixels scaled by 128 / 141 are 127 pixels (spec 9).
    """
    scale = min(np.float32(target_hw[0]) / np.float32(height), np.float32(target_hw[1]) / np.float32(width))
    # a very long image must keep one row
    return (max(1, int(np.float32(height) * scale)), max(1, int(np.float32(width) * scale))), scale


def resize_and_pad(
    image: UInt8[np.ndarray, 'h w 3'], image_size: tuple[int, int], out: UInt8[np.ndarray, 'H W 3'] | None = None
) -> tuple[UInt8[np.ndarray, 'H W 3'], tuple[int, int], float]:
    """For evaluation and prediction: scales the image to fit into `image_size` (H, W), zeros at bottom and right.

    Returns (image, in `out` where that is given, valid_size: the (height, width) of the part that is image,
    image_scale: multiply a box in network pixels by it to return to the original image).
    """
    out = np.empty((*image_size, 3), np.uint8) if out is None else out
    scaled, scale = scaled_size(image.shape[0], image.shape[1], image_size)
    return out, fill(out, image, scaled), float(np.float32(1) / scale)


def fill(
    out: UInt8[np.ndarray, 'H W 3'],
    image: UInt8[np.ndarray, 'h w 3'],
    scaled: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
) -> tuple[int, int]:
    """Writes the image, resized to `scaled`, from its pixel `corner` on into `out`, and zeros at bottom and right.

    Bilinear with half-pixel centres and without antialiasing (spec 9). Returns the (height, width) that is image.
    """
    (top, left), size = corner, scaled[::-1]
    height, width = (min(s - c, side) for s, c, side in zip(scaled, corner, out.shape, strict=False))
    if (height, width) == scaled:  # nothing is cut off: straight into its place
        cv2.resize(image, size, dst=out[:height, :width], interpolation=cv2.INTER_LINEAR)
    else:
        resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        out[:height, :width] = resized[top : top + height, left : left + width]
    out[height:], out[:height, width:] = 0, 0
    return height, width


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


# One bit each. In their names that say colour the bit for BGR is set as well, which excludes the one for RGB.
_REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

_ENORMOUS = f'more than {MAX_PIXELS // 10**6} megapixels, probably damaged'
