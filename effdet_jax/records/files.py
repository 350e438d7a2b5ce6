"""Files that are either old or new, never half written; the endings of those that hold pictures."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv')


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that a reader or a crash sees the old file or the new one. Makes folders."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def json_list(path: Path) -> Iterator[Callable[[Iterable[Any]], None]]:
    """A file that becomes one JSON list, by the items: `with json_list(path) as write: write([1, 2]); write([3])`."""
    with replacing(path) as temporary, temporary.open('w', encoding='utf-8') as file:
        before = '['

        def write(items: Iterable[Any]) -> None:
            nonlocal before
            for item in items:
                file.write(before + json.dumps(item))
                before = ',\n'

        yield write
        file.write(']\n' if before != '[' else '[]\n')


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same ending, to write to; it takes that one's place if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{os.getpid()}.tmp.{path.name}')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
