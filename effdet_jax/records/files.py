"""Files that are either old or new, never half written."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that a reader or a crash sees the old file or the new one. Makes folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
