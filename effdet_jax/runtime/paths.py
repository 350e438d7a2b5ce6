"""Paths as users write them, and which files are images or videos."""

import re
from pathlib import Path

from effdet_jax.errors import UserError

# Pillow's names of the formats that are read, and the endings of their files in lower case. OpenCV knows all of them.
IMAGE_FORMATS = {
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif'),
    'PNG': ('.png', '.apng'),
    'WEBP': ('.webp',),
    'BMP': ('.bmp',),
    'DIB': ('.dib',),
    'TIFF': ('.tif', '.tiff'),
    'GIF': ('.gif',),
    'AVIF': ('.avif', '.avifs'),
    'JPEG2000': ('.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx'),
    'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    'SUN': ('.ras', '.sr'),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
VIDEO_SUFFIXES = (
    '.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv', '.3gp', '.mts', '.m2ts', '.flv', '.ogv',
)  # fmt: skip

# Two letters or more before the colon: C:/ is a drive. One slash, because Path('gs://bucket') is 'gs:/bucket'.
_ADDRESS = re.compile(r'[a-z][a-z0-9+.-]+:/', re.IGNORECASE)
_ADDRESS_WITHIN = re.compile(r'(?<![a-z0-9])[a-z][a-z0-9+.-]+://[^\s,]*', re.IGNORECASE)


def local(text: str | Path) -> Path:
    """The path of a file or folder on this machine, with `~` expanded.

    Raises:
      UserError: for an address such as gs://bucket/run, and for the home of an unknown user.
    """
    if _ADDRESS.match(str(text)):
        raise _is_address(str(text))
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f'{text}: there is no such home folder: write the whole path') from error


def refuse_addresses(text: str) -> None:
    """Raises UserError where a text that contains paths, such as `voc:gs://bucket/voc`, contains an address."""
    if found := _ADDRESS_WITHIN.search(text):
        raise _is_address(found[0])


def is_image(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _is_address(text: str) -> UserError:
    return UserError(
        f'{text} is an address, and only local files and folders work: mount or download it, and give that path'
    )
