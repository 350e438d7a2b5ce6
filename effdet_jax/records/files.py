"""Files that are either old or new and never half written, that grow by whole records, that belong to one process."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from effdet_jax.errors import UserError
from effdet_jax.runtime import process

try:
    import fcntl
except ImportError as error:  # commands have said it before, in one line
    raise ImportError(process.problem()) from error

MAX_WAITING = 1 << 26  # bytes of records that wait for a disk to take them


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that a reader or a crash sees the old file or the new one. Makes folders.

    Returns once the disk has it: a power cut does not undo it, and never leaves an empty file.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        sync(temporary)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns once the disk has what a file holds, or which names a folder has."""
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
    """Returns once the disk has everything below `folder`, and `folder` itself."""
    for path in (*folder.rglob('*'), folder, folder.parent):
        sync(path)


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
    """A path beside `path`, of the same ending, for a file or folder; it takes that one's place if the block ends well.

    A folder does not take the place of one that holds something.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{os.getpid()}.tmp.{path.name}')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written has an error of its own to tell
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)


class Appender:
    """Adds records to a file, which holds whole ones only, and outlives a disk that takes none for a while.

    What the disk refuses waits in memory and goes first when it takes records again. Beyond 64 MiB the oldest go.
    The file is made by the first record.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, list[bytes]()
        self._descriptor, self._whole = -1, 0  # _whole: bytes of whole records in the file

    def append(self, record: bytes) -> OSError | None:
        """Once this returns None, the record outlives the process (and `sync` makes it outlive the machine)."""
        self._waiting.append(record)
        try:
            if self._descriptor < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                self._whole = os.fstat(self._descriptor).st_size
            while self._waiting:
                os.ftruncate(self._descriptor, self._whole)  # what an earlier attempt has left of a record
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                self._whole += len(self._waiting.pop(0))
        except OSError as error:
            while sum(map(len, self._waiting)) > MAX_WAITING:
                self._waiting.pop(0)
            return error
        return None

    def sync(self) -> None:
        """Returns once the disk itself has what was appended. A disk that cannot is told of by the next record."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Holds `folder` (made where missing) for this process. The kernel lets go when the process ends, however it ends.

    flock rather than a file that exists: such a file outlives a killed process and then has to be removed by hand.

    Raises:
      UserError: where another process holds the folder, or nothing can be written there.
    """
    path = folder / '.lock'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open('a+b', buffering=0)
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error.strerror}): choose another --workdir') from error
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
            pass  # a file system without locks (some FUSE mounts): then it is up to the user
        with contextlib.suppress(OSError):  # the lock holds on a full disk too; only its name is missing then
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
        yield
