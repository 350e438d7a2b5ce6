"""Safe reading of files, and lookup of files by the names in annotation files."""

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

MAX_BYTES = 2**31 - 1  # per file, the limit of OpenCV's decoders

# Longest first: the little-endian mark of UTF-32 starts with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}


def read_bytes(path: str | Path) -> bytes:
    """Reads a regular file of at most MAX_BYTES. Raises UnreadableError if that fails."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a device or a pipe may never end
            raise UnreadableError(path, 'not a regular file')
        if status.st_size > MAX_BYTES:
            raise UnreadableError(path, f'{status.st_size:,} bytes, more than the limit of {MAX_BYTES:,}')
        return path.read_bytes()
    except OSError as error:
        reason = f'cannot be read ({error.strerror})'
        raise UnreadableError(path, reason, 'check the path and its permissions') from error
    except ValueError as error:  # a NUL byte or a lone surrogate
        raise UnreadableError(repr(str(path)), f'not a valid file name ({error})', 'fix the name') from error


def read_text(path: str | Path) -> str:
    """Reads text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, which is removed.

    Raises UnreadableError if the file cannot be read or has another encoding.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), 'utf-8')
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        raise UnreadableError(f'{path}:{line}', f'not UTF-8 text ({error.reason})', 'save it as UTF-8') from error


def leaves_folder(name: str) -> bool:
    """Whether a file name from an annotation file points outside the folder that it is relative to."""
    # '.' is the folder itself, not a file in it.
    return os.path.isabs(name) or os.path.normpath(name).partition(os.sep)[0] in (os.pardir, os.curdir)  # noqa: PTH117


def files_below(folder: Path, suffix: str) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders whose names end in `suffix`, ignoring case.

    Follows links to folders. Skips hidden files and folders, which tools and operating systems leave behind.
    """
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith('.'))
        if real not in seen:  # links may form a cycle
            yield from (
                Path(where, name)
                for name in sorted(names)
                if name.lower().endswith(suffix) and not name.startswith('.')
            )
        seen.add(real)


class Lookup(NamedTuple):
    """path: the file, or where it was expected. fault: '' or a kind in `checks.KINDS`; detail: what is wrong."""

    path: str
    fault: str = ''
    detail: str = ''


class Folder:
    """Finds the files below a folder by the names in annotation files.

    An exact match wins. Otherwise a name may differ from the file's in what other systems change: surrounding spaces,
    backslashes as separators, upper and lower case, the Unicode form (macOS decomposes accents), or an absolute path
    inside the folder. Two equally good matches are a fault, as is a name outside the folder. Each folder is listed
    only once, because checking every file is slow on a network disk.
    """

    def __init__(self, root: Path):
        self._root = root
        self._names_in: dict[str, dict[str, list[str]]] = {}  # folder: {name_key: names}
        self._stems_in: dict[str, dict[str, list[str]]] = {}  # folder: {name_key of a stem: names}

    def find(self, name: str) -> Lookup:
        """Looks up a file. The fault is '', 'missing_image' or 'unsafe_path'."""
        if not isinstance(name, str):
            raise TypeError('a file name must be a string')
        for spelling in dict.fromkeys((name, name.strip(), name.strip().replace('\\', '/'))):
            relative = self._relative(spelling)
            if relative is None:
                detail = f'the file name {name[:80]!r} points outside {self._root}'
                return Lookup(str(self._root), 'unsafe_path', detail)
            folder, _, last = relative.rpartition('/')
            where = self._folder(folder)
            similar = self._names(where).get(name_key(last), [])
            matches = [last] if last in similar else similar
            if len(matches) == 1:
                return Lookup(_join(where, matches[0]))
            if matches:
                detail = f'no such file, and several names differ only in case: {matches}'
                return Lookup(_join(where, last), 'missing_image', detail)
        return Lookup(str(self._root / name), 'missing_image', 'no such file')

    def images(self, stem: str) -> tuple[list[str], list[str]]:
        """(paths of the images, names of the other files) with this stem."""
        relative = self._relative(stem.replace('\\', '/'))
        if relative is None:
            return [], []
        folder, _, last = relative.rpartition('/')
        where = self._folder(folder)
        if where not in self._stems_in:
            by_stem = defaultdict(list)
            for name in sorted(name for names in self._names(where).values() for name in names):
                by_stem[name_key(os.path.splitext(name)[0])].append(name)  # noqa: PTH122
            self._stems_in[where] = by_stem
        names = self._stems_in[where].get(name_key(last), [])
        names = [name for name in names if os.path.splitext(name)[0] == last] or names  # noqa: PTH122
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        return [_join(where, name) for name in images], [name for name in names if name not in images]

    def _relative(self, name: str) -> str | None:
        """The name relative to the folder, or None if it points outside."""
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
        """The path of a subfolder, whose parts are looked up like file names; unchanged if there is none."""
        path = str(self._root)
        for part in filter(None, name.split('/')):
            similar = self._names(path).get(name_key(part), [])
            path = _join(path, part if part in similar or len(similar) != 1 else similar[0])
        return path

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names_in:
            names = defaultdict(list)
            for name in _contents(folder):
                names[name_key(name)].append(name)
            self._names_in[folder] = names
        return self._names_in[folder]


def _contents(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  # cheaper than a hundred thousand Path objects
    except (OSError, ValueError):  # ValueError: an invalid file name
        return []


def _is_absolute(name: str) -> bool:
    """Whether a path is absolute on this system or on Windows."""
    return os.path.isabs(name) or re.match(r'[A-Za-z]:[\\/]|\\\\', name) is not None  # noqa: PTH117


def name_key(name: str) -> str:
    """A key shared by names that differ only in case or Unicode form."""
    return unicodedata.normalize('NFC', name).casefold()


def _join(folder: str, name: str) -> str:
    return name if folder == os.curdir else os.path.join(folder, name)  # noqa: PTH118
