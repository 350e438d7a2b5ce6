"""Settings of a command's process, made before jax is imported: memory, garbage collector, compilation cache."""

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
SETTINGS = {  # jax reads them when it is imported
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    'JAX_COMPILATION_CACHE_MAX_SIZE': str(4 * 2**30),  # bytes; beyond it, the least recently used programs go
}
OBJECTS_BEFORE_GARBAGE = 100_000
TUNABLES, HUGE_PAGES = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
KEPT = 64 * 2**20  # bytes: the size of a glibc heap of any thread but the first
KEPT_BY_GLIBC = 32 * 2**20  # the most that glibc's own dynamic threshold reaches
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
WHO_GETS_HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')

CONFIGS = Path(__file__).parents[1] / 'configs'  # a link to ../configs in a checkout, a folder where it is installed
POSIX = ('fcntl', 'resource')  # Python modules that Windows lacks


def prepare() -> None:
    """Must be called before anything imports jax, and before any work: it may start the command again."""
    use_huge_pages()
    # Tracing makes many objects and no garbage: with Python's 700, collecting takes a quarter of its time.
    gc.set_threshold(OBJECTS_BEFORE_GARBAGE)
    keep_programs(os.environ)


def problem() -> str:
    """One line that says why the package cannot run here; '' if it can."""
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
    """Restarts the command so that glibc uses pages of 2 MiB for large allocations. Not under a debugger.

    On CPU, XLA allocates its scratch memory in every call and frees it again, and the system must find and clear all
    its pages: with pages of 4 KiB this is a quarter of a training step. glibc reads the setting only at the start of a
    process, so the process replaces itself by the same command with another environment. (Keeping the memory in one
    arena instead was slower: the compiler's threads waited for each other, and each allocation searched what the
    compiler had left.)
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
    except OSError:  # a kernel without huge pages
        return False


def give_back_memory() -> None:
    """Returns freed memory to the system. Call it once before a loop, or in its first iteration.

    Compiling leaves gigabytes, and reading a compiled program half of one, which glibc would keep. Does nothing with
    other C libraries.
    """
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def keep_scratch_memory(most: int = KEPT) -> None:
    """Lets glibc keep up to `most` freed bytes per thread for the thread's next allocation.

    XLA allocates the scratch memory of every call and frees it again. Finding and clearing that much memory takes
    longer than many layers do. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == 'glibc':
        for parameter in (M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, most)


def keep_programs(environment: MutableMapping[str, str]) -> None:
    """Sets jax's persistent compilation cache to a folder of the user, unless the environment already names one."""
    if FOLDER in environment:
        return
    try:
        folder = default_folder(environment)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, 'Permission denied')
        if _others_can_write(folder):
            raise PermissionError(1, f'other users can write into {folder}, and so run programs in your name')
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        reason = error.strerror if isinstance(error, OSError) else error
        print(
            f'warning: compiled programs are not cached ({reason}): set {FOLDER} to a folder for them', file=sys.stderr
        )
        return
    for name, value in {FOLDER: str(folder), **SETTINGS}.items():
        environment.setdefault(name, value)


def _others_can_write(folder: Path) -> bool:
    found = folder.stat()
    return os.name == 'posix' and (found.st_uid != os.getuid() or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)))


def default_folder(environment: MutableMapping[str, str]) -> Path:
    """A folder below XDG_CACHE_HOME or ~/.cache for each type of CPU: machines may share a home.

    A program compiled for one CPU may crash on another; jax does not document that its key knows the instructions.
    """
    base = Path(environment.get('XDG_CACHE_HOME', ''))
    base = base if base.is_absolute() else Path.home() / '.cache'
    instructions = hashlib.sha256(cpu_instructions().encode()).hexdigest()[:8]
    return base / 'effdet_jax' / f'{platform.machine()}-{instructions}'


def cpu_instructions() -> str:
    """The instruction sets of this CPU, as the system lists them."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(('flags', 'Features'))), '')
