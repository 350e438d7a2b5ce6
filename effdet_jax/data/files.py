"""Files on the disk: read with care, and found by the names that annotation files give them."""

import codecs
import os
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from effdet_jax.errors import UnreadableError
from effdet_jax.runtime.paths import IMAGE_SUFFIXES

MAX_BYTES = 2**31 - 1  # of a file; OpenCV's decoders take no more

# Longer marks first: UTF-32's little-endian one begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}


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


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, which is left out.

    Raises UnreadableError where it cannot be read or is in another encoding.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), 'utf-8')
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        raise UnreadableError(f'{path}:{line}', f'not text in UTF-8 ({error.reason})', 'save it as UTF-8') from error


def leaves_folder(name: str) -> bool:
    """Whether a file name from an annotation file leads out of the folder that it is relative to."""
    # '.': the folder itself, and no file in it
    return os.path.isabs(name) or os.path.normpath(name).partition(os.sep)[0] in (os.pardir, os.curdir)  # noqa: PTH117


def files_below(folder: Path, suffix: str) -> Iterator[Path]:
    """The files in a folder and in those below it, links to folders included, whose names end in `suffix`.

    Upper and lower case are the same. Hidden files and folders, which tools and systems leave behind, are left out.
    """
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith('.'))
        if real not in seen:  # a link may lead back
            yield from (
                Path(where, name)
                for name in sorted(names)
                if name.lower().endswith(suffix) and not name.startswith('.')
            )
        seen.add(real)


class Found(NamedTuple):
    """path: of the file, or where it was looked for. fault: '' or a kind of `checks.KINDS`; detail: what is wrong."""

    path: str
    fault: str = ''
    detail: str = ''


class Folder:
    """The files below a folder, found by the names that annotation files give them.

    A name is taken as it stands where there is such a file. Where there is none, it may differ from the file's in what
    another system or program changes: blanks around it, backslashes as separators, upper and lower case, the Unicode
    form (macOS writes accents as characters of their own), and an absolute path that lies inside the folder. Two files
    that fit equally well are a fault. No name leads out of the folder. Each folder is listed once: asking for every
    single file is slow on a network disk.
    """

    def __init__(self, root: Path):
        self._root = root
        self._listed: dict[str, dict[str, list[str]]] = {}  # folder: {key of a name: names}
        self._images: dict[str, dict[str, list[str]]] = {}  # folder: {key of a stem: names of images}

    def find(self, name: str) -> Found:
        """The file of this name. Its fault may be missing_image or unsafe_path."""
        if not isinstance(name, str):
            raise TypeError('a file name is text')
        for spelling in dict.fromkeys((name, name.strip(), name.strip().replace('\\', '/'))):
            relative = self._relative(spelling)
            if relative is None:
                rule = ': an absolute path must lie inside it' if _is_absolute(spelling) else ''
                return Found(str(self._root), 'unsafe_path', f'the file name {name[:80]!r} leaves {self._root}{rule}')
            folder, _, last = relative.rpartition('/')
            where = self._folder(folder)
            same = self._names(where).get(name_key(last), [])
            fitting = [last] if last in same else same
            if len(fitting) == 1:
                return Found(_join(where, fitting[0]))
            if fitting:
                detail = f'there is no such file, and more than one that is called so but for its case: {fitting}'
                return Found(_join(where, last), 'missing_image', detail)
        return Found(str(self._root / name), 'missing_image', 'there is no such file')

    def images(self, stem: str) -> tuple[list[str], list[str]]:
        """(paths of the images, names of the other files) that are called `stem` but for their suffix."""
        relative = self._relative(stem.replace('\\', '/'))
        if relative is None:
            return [], []
        folder, _, last = relative.rpartition('/')
        where = self._folder(folder)
        if where not in self._images:
            by_stem = defaultdict(list)
            for name in sorted(name for names in self._names(where).values() for name in names):
                by_stem[name_key(os.path.splitext(name)[0])].append(name)  # noqa: PTH122
            self._images[where] = by_stem
        names = self._images[where].get(name_key(last), [])
        names = [name for name in names if os.path.splitext(name)[0] == last] or names  # noqa: PTH122
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        return [_join(where, name) for name in images], [name for name in names if name not in images]

    def _relative(self, name: str) -> str | None:
        """The name relative to the folder, or None where it leads out of it."""
        if os.path.isabs(name):  # noqa: PTH117
            folder, last = os.path.split(os.path.normpath(name))
            for resolve in (os.path.abspath, os.path.realpath):
                root = resolve(self._root)
                inside = os.path.relpath(resolve(folder), root)
                if last and inside.partition(os.sep)[0] != os.pardir:
                    return os.path.normpath(_join(inside, last))
            return None
        return None if leaves_folder(name) or _is_absolute(name) else os.path.normpath(name)

    def _folder(self, name: str) -> str:
        """The path of a folder below the root, each part found as a file is; as named where there is none."""
        path = str(self._root)
        for part in filter(None, name.split('/')):
            same = self._names(path).get(name_key(part), [])
            path = _join(path, part if part in same or len(same) != 1 else same[0])
        return path

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._listed:
            names = defaultdict(list)
            for name in _contents(folder):
                names[name_key(name)].append(name)
            self._listed[folder] = names
        return self._listed[folder]


def _contents(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  # of a hundred thousand names, not as many paths
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return []


def _is_absolute(name: str) -> bool:
    """Here or on Windows."""
    return os.path.isabs(name) or re.match(r'[A-Za-z]:[\\/]|\\\\', name) is not None  # noqa: PTH117


def name_key(name: str) -> str:
    """The same for names that differ only in case or in Unicode's form."""
    return unicodedata.normalize('NFC', name).casefold()


def _join(folder: str, name: str) -> str:
    return name if folder == os.curdir else os.path.join(folder, name)  # noqa: PTH118
