"""Pixels on their way to the network: decode, scale, crop, pad. Pure functions.

Flips, colour and normalisation happen on the device, after these; the padding is zeroed there once more, because a
pad is the mean colour only after normalising (docs/reference.md, Data pipeline).
"""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from effdet_jax.data.files import read_bytes
from effdet_jax.errors import UnreadableError
from effdet_jax.runtime import paths

# What an image may claim to be before any of it is decoded: 537 MB as RGB. Far above any camera; a bomb claims more.
MAX_PIXELS = 178_956_970

# Read by OpenCV, and by Pillow, which tells their size from the header. A format of which only one of them knows is
# refused: either its size is unknown until it is decoded, or its decoder is one that few have tested.
FORMATS = tuple(paths.IMAGE_FORMATS)

# Of a damaged image both libraries print lines that do not name the file; ours is one, and does.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings('ignore', module=r'PIL\.')


def decode(encoded: bytes, name: str, *, reduction: int = 1, quiet: bool = False) -> UInt8[np.ndarray, 'H W 3']:
    """Encoded image -> RGB, turned upright by its EXIF orientation, as viewers and labelling tools show it.

    `reduction`: 2, 4 or 8 make a JPEG that many times smaller, odd sides rounded up, as averages and at less cost.
    `quiet`: nothing is printed of a JPEG whose damage can be decoded, at nearly twice the cost; `reduction` is then 1.

    Grey becomes three equal channels, 16 bits become 8, transparent pixels are laid on white. `name` is for the message
    of the UnreadableError that an undecodable, empty or enormous image raises.
    """
    header = _open_header(encoded, name)
    orientation = _orientation(header)
    # OpenCV for JPEG: the same pixels as Pillow's, without a copy that holds the GIL. Both OpenCV's libpng and libjpeg
    # print lines of damaged images that do not name the file. Pillow's are silent.
    image_HW3 = _decode_jpeg(encoded, reduction) if is_jpeg(encoded) and not quiet else None
    if image_HW3 is None:
        image_HW3 = _decode_other(header, name)
    # Pillow turns TIFF by itself
    return image_HW3 if header.format == 'TIFF' else _TURNS[orientation](image_HW3)


def read_image(path: str | Path) -> UInt8[np.ndarray, 'H W 3']:
    """An image file -> RGB, as `decode`."""
    return decode(read_bytes(path), str(path))


def image_size(encoded: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone. Raises UnreadableError as `decode`."""
    header = _open_header(encoded, name)
    turned = _orientation(header) >= 5 and header.format != 'TIFF'  # whose size Pillow tells as it is upright
    return (header.width, header.height) if turned else (header.height, header.width)


def exif_orientation(encoded: bytes, name: str) -> int:
    """1 to 8; 1 where the image is stored as it is shown, 5 to 8 where its rows are stored as columns."""
    return _orientation(_open_header(encoded, name))


def is_deep(encoded: bytes, name: str) -> bool:
    """Whether a channel has more than 8 bits."""
    header = _open_header(encoded, name)
    return header.mode[0] in 'IF' or ';16' in str(getattr(header, 'tile', ''))


def is_jpeg(encoded: bytes) -> bool:
    """Whether `decode` can make it smaller as it decodes."""
    return encoded.startswith(b'\xff\xd8\xff')


def scaled_size(height: int, width: int, target_hw: tuple[int, int]) -> tuple[tuple[int, int], np.float32]:
    """((height, width) that fits into `target_hw` with the same aspect ratio, scale).

    In float32 with truncation, as the official code: 141 pixels scaled by 128 / 141 are 127 pixels
    (docs/reference.md, Data pipeline).
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

    Bilinear with half-pixel centres and without antialiasing (docs/reference.md, Data pipeline). Returns the (height,
    width) that is image.
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


def _orientation(header: Image.Image) -> int:
    try:
        # Not PngImageFile's own getexif, which decodes the image to look behind it.
        orientation = Image.Image.getexif(header).get(_ORIENTATION_TAG)
    except Exception:  # of damaged EXIF data, whatever Pillow raises: viewers show the image as it is stored
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def _decode_jpeg(encoded: bytes, reduction: int) -> np.ndarray | None:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCTIONS[reduction]
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        return None


def _decode_other(image: Image.Image, name: str) -> np.ndarray:
    """By Pillow, which also knows why an image that OpenCV cannot decode is damaged."""
    try:
        if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
            rgba = image.convert('RGBA')
            return np.array(Image.alpha_composite(Image.new('RGBA', image.size, 'white'), rgba).convert('RGB'))
        if image.mode[0] in 'IF':  # 16 or 32 bits; Pillow would cut off what is above 255
            return _grey_of_8_bits(np.asarray(image))
        return np.array(image.convert('RGB'))
    except Exception as error:  # as above
        if 'truncated' in str(error).lower():
            advice = 'open it in an image editor and save it again, or replace it'
            raise UnreadableError(name, 'the file ends too early', advice) from error
        raise UnreadableError(name, f'cannot be decoded ({error})') from error


def _grey_of_8_bits(values_HW: np.ndarray) -> np.ndarray:
    """Of 16 bits the upper 8; floating-point numbers are grey levels as they stand."""
    levels_HW = values_HW if values_HW.dtype.kind == 'f' else values_HW >> 8
    grey_HW = np.clip(np.nan_to_num(levels_HW), 0, 255).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)


# One bit each. In their names that say colour the bit for BGR is set as well, which excludes the one for RGB.
_REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what makes the stored image upright
_TURNS = {
    1: lambda image: image,
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: lambda image: cv2.transpose(image),
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}

_ENORMOUS = f'more than {MAX_PIXELS // 10**6} megapixels, probably damaged'
