"""Whether a checkpoint still holds what was saved: shapes, checksums, and what a failed read means."""

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from effdet_jax.errors import UserError
from effdet_jax.records.console import warn

Contents = dict[str, list[Any]]  # path in the tree -> [shape, CRC-32]


class DamagedError(Exception):
    """The files of a checkpoint differ from what was saved."""


def contents_of(tree: Any) -> Contents:
    """The shape and checksum of every array of a tree with NumPy leaves."""
    return {name: [list(leaf.shape), zlib.crc32(leaf.tobytes())] for name, leaf in _leaves(tree)}


def check_sums(tree: Any, contents: Contents) -> None:
    """Raises DamagedError if an array of `tree` differs from the one that was saved."""
    changed = [name for name, leaf in _leaves(tree) if zlib.crc32(leaf.tobytes()) != contents[name][1]]
    if changed:
        raise DamagedError(f'{changed[0]} is not what was saved')


def first_difference(contents: Contents, state_like: Any) -> str:
    """The first array whose shape differs between a checkpoint and the expected state, or '' if all agree."""
    saved = {name: shape for name, (shape, _) in contents.items()}
    expected = {name: list(np.shape(leaf)) for name, leaf in _leaves(state_like)}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            return f'{name}: saved {saved.get(name, "nothing")}, expected {expected.get(name, "nothing")}'
    return ''


def read_all_files(folder: Path) -> None:
    """Reads the array files one by one. Orbax reads them concurrently and prints a traceback for each bad one.

    Raises:
      DamagedError, UserError: as `reading`.
    """
    with reading(folder):
        store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': f'file://{folder}/state/'}).result()
        for key in store.list().result():
            store.read(key).result()


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Separates damaged files (DamagedError) from files that the system did not let us read (UserError)."""
    try:
        yield
    except Exception as error:  # parsers and decoders raise anything on damaged files
        if reason := _system_error(error):
            raise UserError(
                f'{folder} cannot be read ({reason}): nothing was changed; fix the cause and start again'
            ) from error
        raise DamagedError(one_line(error)) from error


def move_away(folder: Path, damage: DamagedError) -> Path:
    """Moves a damaged checkpoint to `checkpoints-damaged/`, where it is never read again."""
    target = folder.parents[1] / 'checkpoints-damaged' / folder.name
    while target.exists():
        target = target.with_name(target.name + '-again')
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    warn(f'the checkpoint of step {folder.name} is damaged ({damage}): moved to {target}')
    return target


def one_line(error: Exception) -> str:
    """The message of an error without line breaks and without TensorStore's details."""
    text = ' '.join(str(error).split()) or type(error).__name__
    system = re.search(r'([^:]+) \[os_error_code', text)
    return system[1].strip() if system else text[:200]


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf): .variables['params'] and ['variables']['params'] both have the path 'variables/params'."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _system_error(error: BaseException | None) -> str:
    """Why the system refused to read: too many open files, no memory, a stale handle, no permission.

    Returns '' if it did not refuse; the files are then missing or damaged.
    """
    while error:
        reported = re.search(r"os_error_code='?(\d+)", str(error))  # TensorStore puts it into a ValueError
        number = int(reported[1]) if reported else getattr(error, 'errno', None)
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number:
            return '' if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR) else os.strerror(number)
        error = error.__cause__ or error.__context__
    return ''
