"""How a command starts: what it sets for its process before jax is imported."""

import ctypes
import gc
import hashlib
import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = 'JAX_COMPILATION_CACHE_DIR'
SETTINGS = {  # of jax, which reads them where it is imported
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    'JAX_COMPILATION_CACHE_MAX_SIZE': str(4 * 2**30),  # bytes; then the ones that were used longest ago go
}
OBJECTS_BEFORE_GARBAGE = 100_000
MALLOPT = {  # malloc.h
    -4: 0,  # M_MMAP_MAX: no blocks of their own, which are unmapped when they are freed
    -1: -1,  # M_TRIM_THRESHOLD: the heap never shrinks
    -8: 1,  # M_ARENA_MAX: one heap for all threads
}


def prepare() -> None:
    """To be called before anything imports jax."""
    # Tracing makes many objects and no garbage: with Python's 700, a quarter of its time goes into looking for it.
    gc.set_threshold(OBJECTS_BEFORE_GARBAGE)
    keep_memory()
    keep_programs(os.environ)


def keep_memory() -> None:
    """Lets glibc keep what is freed. No effect with another C library.

    XLA takes its scratch memory anew in every call and gives it back. glibc passes large blocks on to the system, which
    has to find and clear every page again: on CPU a tenth of a training step and of a detection.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)


def give_back_memory() -> None:
    """Returns what is free, once. To be called when a loop has come round for the first time.

    Compiling leaves gigabytes; and the results of the first step lie behind its scratch memory, in which that of the
    second, by a few bytes too large, finds no place. All further steps find the place of the second.
    """
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def keep_programs(environment: MutableMapping[str, str]) -> None:
    """Lets jax keep what it compiles in a folder of the user's, unless the environment names another one."""
    if FOLDER in environment:
        return
    try:
        folder = default_folder(environment)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write into it can run programs in our name
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, 'Permission denied')
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = error.strerror if isinstance(error, OSError) else error
        print(f'warning: compiled programs are not kept ({reason}): {FOLDER}=FOLDER keeps them there', file=sys.stderr)
        return
    for name, value in {FOLDER: str(folder), **SETTINGS}.items():
        environment.setdefault(name, value)


def default_folder(environment: MutableMapping[str, str]) -> Path:
    """Below XDG_CACHE_HOME or ~/.cache, one for each type of CPU: what was compiled for one may stop on another.

    (A home may be shared by machines, and of jax's own key it is nowhere said that it knows the CPU's instructions.)
    """
    base = Path(environment.get('XDG_CACHE_HOME', ''))
    base = base if base.is_absolute() else Path.home() / '.cache'
    instructions = hashlib.sha256(_instructions().encode()).hexdigest()[:8]
    return base / 'effdet_jax' / f'{platform.machine()}-{instructions}'


def _instructions() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(('flags', 'Features'))), '')
