"""Safe files: replaced atomically, appended to by whole records, or locked by one process."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from effdet_jax.errors import UserError, explaining_write_errors
from effdet_jax.runtime import process

try:
    import fcntl
except ImportError as error:  # commands print this as one line before they import anything (commands/cli.py)
    raise ImportError(process.problem()) from error

MAX_PENDING = 1 << 26  # bytes of records kept in memory while the disk refuses them


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path`: readers and crashes see either the old file or the new one. Creates parent folders.

    Returns once the content is on the disk, so a power cut neither undoes it nor leaves an empty file.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        sync(temporary)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns once the content of a file, or the list of names in a folder, is on the disk."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:  # some file systems, and Windows, cannot sync a folder
            raise


def sync_tree(folder: Path) -> None:
    """Returns once `folder` and everything below it is on the disk."""
    for path in (*folder.rglob('*'), folder, folder.parent):
        sync(path)


@contextlib.contextmanager
def json_list(path: Path) -> Iterator[Callable[[Iterable[Any]], None]]:
    """Writes one JSON list piece by piece: `with json_list(path) as write: write([1, 2]); write([3])`."""
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
    """Yields a temporary path with the same suffix beside `path`, and renames it to `path` if the block succeeds.

    Works for files and folders, but a folder that is not empty cannot be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{os.getpid()}.tmp.{path.name}')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # must not hide the error of the block
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)


class Appender:
    """Appends whole records to a file, and survives a disk that refuses them for a while.

    Refused records are kept in memory and written first when the disk accepts data again. Beyond 64 MiB the oldest are
    dropped. The first record creates the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._pending = path, list[bytes]()
        self._descriptor, self._size = -1, 0  # _size: bytes of whole records in the file

    def append(self, record: bytes) -> OSError | None:
        """Once this returns None, the record survives the end of the process; after `sync` also a power cut."""
        self._pending.append(record)
        try:
            if self._descriptor < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                self._size = os.fstat(self._descriptor).st_size
            while self._pending:
                os.ftruncate(self._descriptor, self._size)  # cuts off a record that was written in part
                rest = memoryview(self._pending[0])
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                self._size += len(self._pending.pop(0))
        except OSError as error:
            while sum(map(len, self._pending)) > MAX_PENDING:
                self._pending.pop(0)
            return error
        return None

    def sync(self) -> None:
        """Returns once everything appended is on the disk. If that fails, the next `append` returns the error."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process, and creates it if needed. The kernel unlocks it when the process ends.

    Uses flock because a plain lock file would outlive a killed process and would have to be removed by hand.

    Raises:
      UserError: if another process has locked the folder, or it cannot be written.
    """
    with explaining_write_errors(folder, 'choose another --workdir'):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / '.lock').open('a+b', buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode() or 'another process'
            raise UserError(
                f'{folder} is in use by {holder}: wait for it, stop it, or choose another --workdir'
            ) from error
        except OSError:
            pass  # a file system without locks (some FUSE mounts): we cannot protect the folder there
        with contextlib.suppress(OSError):  # on a full disk the lock works; only its owner's name is missing
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
        yield
