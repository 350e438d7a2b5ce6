"""The errors that a command shows as a single line, and what turns other errors into them."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """An error the user can fix. The message is one line that says what, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableError(UserError):
    """A file that cannot be used. Training replaces an unreadable image by another one and goes on."""

    def __init__(self, file: object, reason: str, advice: str = 'replace or remove the file') -> None:
        super().__init__(f'{file}: {reason}: {advice}')
        self.reason, self.advice = reason, advice


def import_optional(name: str, install: str) -> Any:
    """Imports a package that not every installation has. `install`: what to pass to `pip install`.

    Raises:
      UserError: if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{name} cannot be imported ({error}): pip install {install}') from error


@contextlib.contextmanager
def explaining_write_errors(path: object, advice: str) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that says that `path` cannot be written, and gives `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror or error}): {advice}') from error


def printable(text: str) -> str:
    """Escapes line breaks and control sequences, which text from a file may contain, for a line in a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
