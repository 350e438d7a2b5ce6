"""Where a run was trained: every start adds a line to `sessions.jsonl`, for reports that are written elsewhere."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from effdet_jax.errors import UserError
from effdet_jax.records.files import Appender

FILE = 'sessions.jsonl'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def describe_session(step: int, devices: str) -> dict[str, Any]:
    """The fields `step`, `started` (UTC), `command`, `devices`, `host`, `system`, `versions` and `commit`.

    `step` is where the session starts. `commit` is the git commit of this code, or '' if it is not a git checkout.
    """
    return {
        'step': step,
        'started': datetime.now(UTC).isoformat(timespec='seconds'),
        'command': shlex.join(['python', *sys.orig_argv[1:]]),
        'devices': devices,
        'host': f'{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB',
        'system': f'{platform.system()} {platform.release()}, Python {platform.python_version()}',
        'versions': {name: metadata.version(name) for name in PACKAGES},
        'commit': _commit(),
    }


def record_session(workdir: Path, step: int, devices: str) -> None:
    """Adds a line about this process to the work directory. On a full disk the line is lost; the run goes on."""
    with contextlib.closing(Appender(workdir / FILE)) as lines:
        lines.append((json.dumps(describe_session(step, devices)) + '\n').encode())


def read_sessions(workdir: Path) -> list[dict[str, Any]]:
    """All sessions of a run, oldest first; empty if none was recorded.

    Raises:
        UserError: for a line that is not JSON.
    """
    path = workdir / FILE
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}): remove the broken line') from error


def _processor() -> str:
    """The model name from /proc/cpuinfo on Linux, otherwise what Python knows."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text(encoding='utf-8', errors='replace').splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    except (AttributeError, ValueError, OSError):  # not on this system
        return float('nan')


def _commit() -> str:
    git = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return done.stdout.strip() if done.returncode == 0 else ''
