"""Image transforms on the host: decode, scale, crop, pad. Pure functions.

Flips, colour augmentation and normalisation follow on the device. It sets the padding to zero again after normalising,
so that padding has the mean colour (docs/reference.md, Data pipeline).
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

# Larger images are refused before decoding, against decompression bombs: 537 MB as RGB, far beyond any camera.
MAX_PIXELS = 178_956_970

# Formats that both OpenCV and Pillow read. Pillow reads the size from the header; decoders that only one of them has
# are less tested.
FORMATS = tuple(paths.IMAGE_FORMATS)

# Both libraries print lines about damaged images without the name of the file. Our own message has it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings('ignore', module=r'PIL\.')


def decode(encoded: bytes, name: str, *, reduction: int = 1, quiet: bool = False) -> UInt8[np.ndarray, 'H W 3']:
    """Encoded image -> RGB, rotated upright by its EXIF orientation, as viewers and labelling tools show it.

    Grey images become three equal channels, 16 bits become 8, transparent pixels are blended with white.

    `reduction`: 2, 4 or 8 decode a JPEG at that fraction of its size, rounded up; averages pixels and saves time.
    `quiet`: prints nothing about a damaged JPEG, at nearly twice the cost; ignores `reduction`.

    Raises UnreadableError, with `name` in the message, if the image is empty, too large or cannot be decoded.
    """
    header = _open_header(encoded, name)
    orientation = _orientation(header)
    # OpenCV decodes a JPEG to the same pixels as Pillow, without holding the GIL. But its libpng and libjpeg print
    # messages about damaged images that do not name the file; Pillow prints none.
    image_HW3 = _decode_jpeg(encoded, reduction) if is_jpeg(encoded) and not quiet else None
    if image_HW3 is None:
        image_HW3 = _decode_other(header, name)
    # Pillow rotates TIFF images itself.
    return image_HW3 if header.format == 'TIFF' else _TURNS[orientation](image_HW3)


def read_image(path: str | Path) -> UInt8[np.ndarray, 'H W 3']:
    """Image file -> RGB, as in `decode`."""
    return decode(read_bytes(path), str(path))


def image_size(encoded: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright image, from its header. Raises UnreadableError as in `decode`."""
    header = _open_header(encoded, name)
    is_rotated = _orientation(header) >= 5 and header.format != 'TIFF'  # Pillow gives the upright size of a TIFF
    return (header.width, header.height) if is_rotated else (header.height, header.width)


def exif_orientation(encoded: bytes, name: str) -> int:
    """1 to 8: 1 if the image is stored upright, 5 to 8 if rows and columns are swapped."""
    return _orientation(_open_header(encoded, name))


def is_deep(encoded: bytes, name: str) -> bool:
    """Whether a channel has more than 8 bits."""
    header = _open_header(encoded, name)
    return header.mode[0] in 'IF' or ';16' in str(getattr(header, 'tile', ''))


def is_jpeg(encoded: bytes) -> bool:
    """Whether the image is a JPEG, which `decode` can reduce while decoding."""
    return encoded.startswith(b'\xff\xd8\xff')


def scaled_size(height: int, width: int, target_hw: tuple[int, int]) -> tuple[tuple[int, int], np.float32]:
    """((height, width) that fits into `target_hw` with the same aspect ratio, scale).

    Truncates in float32 as the official code does: 141 pixels scaled by 128 / 141 become 127 pixels
    (docs/reference.md, Data pipeline).
    """
    scale = min(np.float32(target_hw[0]) / np.float32(height), np.float32(target_hw[1]) / np.float32(width))
    # a very long image keeps at least one row
    return (max(1, int(np.float32(height) * scale)), max(1, int(np.float32(width) * scale))), scale


def resize_and_pad(
    image: UInt8[np.ndarray, 'h w 3'], image_size: tuple[int, int], out: UInt8[np.ndarray, 'H W 3'] | None = None
) -> tuple[UInt8[np.ndarray, 'H W 3'], tuple[int, int], float]:
    """Scales an image to fit `image_size` (H, W) and zero-pads it at the bottom and right; for evaluation.

    Returns (image, written to `out` if given; valid_size, the (height, width) without padding; image_scale, the factor
    from network pixels to original pixels).
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
    """Resizes the image to `scaled`, crops it from `corner` on, writes it to `out` and zero-pads the rest.

    Bilinear with half-pixel centres, without antialiasing (docs/reference.md, Data pipeline). Returns the (height,
    width) without padding.
    """
    (top, left), size = corner, scaled[::-1]
    height, width = (min(s - c, side) for s, c, side in zip(scaled, corner, out.shape, strict=False))
    if (height, width) == scaled:  # nothing to crop: resize in place
        cv2.resize(image, size, dst=out[:height, :width], interpolation=cv2.INTER_LINEAR)
    else:
        resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        out[:height, :width] = resized[top : top + height, left : left + width]
    out[height:], out[:height, width:] = 0, 0
    return height, width


def _open_header(encoded: bytes, name: str) -> Image.Image:
    """Opens an image without decoding it, and checks its format and size."""
    if not encoded:
        raise UnreadableError(name, 'the file is empty')
    try:
        header = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableError(name, _TOO_LARGE, 'scale it down or remove it') from error
    except Exception as error:  # Pillow raises many kinds of errors for damaged headers
        raise UnreadableError(name, f'not a readable image ({", ".join(FORMATS)})') from error
    if header.height * header.width > MAX_PIXELS:
        raise UnreadableError(name, _TOO_LARGE, 'scale it down or remove it')
    return header


def _orientation(header: Image.Image) -> int:
    try:
        # PngImageFile overrides getexif and decodes the whole image, so call the base class.
        orientation = Image.Image.getexif(header).get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF data, which viewers ignore too
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def _decode_jpeg(encoded: bytes, reduction: int) -> np.ndarray | None:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCTIONS[reduction]
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        return None


def _decode_other(image: Image.Image, name: str) -> np.ndarray:
    """Decodes with Pillow, which also reports what is wrong with a damaged image."""
    try:
        if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
            rgba = image.convert('RGBA')
            return np.array(Image.alpha_composite(Image.new('RGBA', image.size, 'white'), rgba).convert('RGB'))
        if image.mode[0] in 'IF':  # 16 or 32 bits, which Pillow would clip at 255
            return _to_8_bits(np.asarray(image))
        return np.array(image.convert('RGB'))
    except Exception as error:  # as in _open_header
        if 'truncated' in str(error).lower():
            advice = 'open it in an image editor and save it again, or replace it'
            raise UnreadableError(name, 'the file is truncated', advice) from error
        raise UnreadableError(name, f'cannot be decoded ({error})') from error


def _to_8_bits(values_HW: np.ndarray) -> np.ndarray:
    """Keeps the upper 8 of 16 bits; floating-point values are used as grey levels."""
    levels_HW = values_HW if values_HW.dtype.kind == 'f' else values_HW >> 8
    grey_HW = np.clip(np.nan_to_num(levels_HW), 0, 255).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)


# Single bits: the COLOR variants also set the bit for BGR, which excludes RGB.
_REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> function that rotates the stored image upright
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

_TOO_LARGE = f'more than {MAX_PIXELS // 10**6} megapixels, probably damaged'
