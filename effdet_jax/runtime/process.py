"""How a command starts: what it sets for its process before jax is imported."""

import ctypes
import gc
import hashlib
import importlib
import os
import platform
import stat
import sys
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = 'JAX_COMPILATION_CACHE_DIR'
SETTINGS = {  # of jax, which reads them where it is imported
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    'JAX_COMPILATION_CACHE_MAX_SIZE': str(4 * 2**30),  # bytes; then the ones that were used longest ago go
}
OBJECTS_BEFORE_GARBAGE = 100_000
TUNABLES, HUGE_PAGES = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
KEPT = 64 * 2**20  # bytes: all that one of glibc's heaps can hold, other than the first thread's
KEPT_BY_GLIBC = 32 * 2**20  # what it comes to by itself
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
WHO_GETS_HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')

CONFIGS = Path(__file__).parents[1] / 'configs'  # a link to ../configs in a checkout, a folder where it is installed
POSIX = ('fcntl', 'resource')  # modules of Python that Windows lacks


def prepare() -> None:
    """To be called before anything imports jax, and before anything is done: it may start the command once more."""
    use_huge_pages()
    # Tracing makes many objects and no garbage: with Python's 700, a quarter of its time goes into looking for it.
    gc.set_threshold(OBJECTS_BEFORE_GARBAGE)
    keep_programs(os.environ)


def problem() -> str:
    """Why nothing of this package can run here, in one line; empty where it can."""
    try:
        for module in POSIX:
            importlib.import_module(module)
    except ImportError:
        return (
            'effdet_jax runs on Linux and macOS: on Windows, install and start it inside WSL '
            '(https://learn.microsoft.com/windows/wsl)'
        )
    if not CONFIGS.is_dir():
        return (
            f'{CONFIGS} is not a link to the folder configs: git on Windows, zip files and some disks turn links into '
            'text files. Clone the repository again inside WSL or on a disk with links, or pip install it'
        )
    return ''


def use_huge_pages() -> None:
    """Lets glibc ask for pages of 2 MiB where it takes much memory at once, which it can be told only from outside.

    XLA takes its scratch memory anew in every call and gives it back, and the system has to find and clear every page
    of it again: in pages of 4 KiB a quarter of a training step on CPU. So where the system gives larger ones to who
    asks for them, the process becomes the same command with another environment; but not under a debugger, which would
    lose it.
    """
    if _must_ask_for_huge_pages() and not (sys.gettrace() or 'pydevd' in sys.modules):
        others = os.environ.get(TUNABLES)
        os.environ[TUNABLES] = f'{HUGE_PAGES}=1' + (f':{others}' if others else '')
        os.execv(sys.executable, sys.orig_argv)


def _must_ask_for_huge_pages() -> bool:
    if platform.libc_ver()[0] != 'glibc' or HUGE_PAGES in os.environ.get(TUNABLES, ''):
        return False
    try:
        return '[madvise]' in WHO_GETS_HUGE_PAGES.read_text()
    except OSError:  # a kernel without them
        return False


def give_back_memory() -> None:
    """Returns what is free to the system, once. To be called before a loop, or in its first round.

    Compiling leaves gigabytes, reading a program half of one, and glibc would keep them. No effect with another C
    library.
    """
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def keep_scratch_memory(most: int = KEPT) -> None:
    """Lets glibc keep `most` bytes of what each thread frees, for what the same thread takes next.

    XLA's thread takes a call's scratch memory and gives it back whole, and to find and clear so much again takes
    longer than many a layer does. So many bytes at most for each thread that computes. No effect with another C
    library.
    """
    if platform.libc_ver()[0] == 'glibc':
        for parameter in (M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, most)


def keep_programs(environment: MutableMapping[str, str]) -> None:
    """Lets jax keep what it compiles in a folder of the user's, unless the environment names another one."""
    if FOLDER in environment:
        return
    try:
        folder = default_folder(environment)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, 'Permission denied')
        if _others_can_write(folder):
            raise PermissionError(1, f'other users can write into {folder}, and so run programs in your name')
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = error.strerror if isinstance(error, OSError) else error
        print(f'warning: compiled programs are not kept ({reason}): {FOLDER}=FOLDER keeps them there', file=sys.stderr)
        return
    for name, value in {FOLDER: str(folder), **SETTINGS}.items():
        environment.setdefault(name, value)


def _others_can_write(folder: Path) -> bool:
    found = folder.stat()
    return os.name == 'posix' and (found.st_uid != os.getuid() or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)))


def default_folder(environment: MutableMapping[str, str]) -> Path:
    """Below XDG_CACHE_HOME or ~/.cache, one for each type of CPU: what was compiled for one may stop on another.

    (A home may be shared by machines, and of jax's own key it is nowhere said that it knows the CPU's instructions.)
    """
    base = Path(environment.get('XDG_CACHE_HOME', ''))
    base = base if base.is_absolute() else Path.home() / '.cache'
    instructions = hashlib.sha256(cpu_instructions().encode()).hexdigest()[:8]
    return base / 'effdet_jax' / f'{platform.machine()}-{instructions}'


def cpu_instructions() -> str:
    """Those of this CPU that the system lists."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(('flags', 'Features'))), '')
