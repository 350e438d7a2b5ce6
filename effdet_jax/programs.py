"""Compiled programs, found by what they are made of: not traced, not lowered, and read while other things are done.

jax's own cache finds a program by what was lowered; to come so far takes as long as to read it. Here a program has two
keys. The first is all that tracing may read: the files of every module that is loaded, with their sizes and times (the
test that Python makes before it runs a .pyc), the settings and devices of jax, the machine, and what the caller tells,
such as a config. Where that leads nowhere, because a comment was changed or a key that does not matter, the function
is traced and lowered, and the text of that is the second.

Only commands keep programs so, because there nothing but files says what a function does: in a notebook it may have
been replaced. And only on CPU and one host, where it has been tried.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from effdet_jax import startup

FOLDER = 'programs'  # in that of jax's cache
MOST_BYTES = 2**30  # then the ones that were used longest ago go
SETTINGS = ('JAX_', 'XLA_', 'LIBTPU_', 'CUDA_', 'NVIDIA_', 'TF_')  # variables of the environment that XLA reads

_readers = ThreadPoolExecutor(2, 'programs')


class Program:
    """A program that a thread looks for as soon as this is made, and that is made when it is first needed."""

    def __init__(self, name: str, made_of: str) -> None:
        """`made_of`: in words, all that the program depends on and no file says; its arguments' shapes follow from it.

        `name` is for people who look into the folder.
        """
        folder = _folder()
        self._name = name
        self._link = _path(folder, name, made_of, *_sources()) if folder else None
        self._found = _readers.submit(_read, self._link) if self._link else None
        self._program: jax.stages.Compiled | None = None

    def get(self, lower: Callable[[], jax.stages.Lowered], options: Mapping[str, Any]) -> jax.stages.Compiled:
        """What was found, or what XLA compiles with these options, which is kept."""
        if self._program is None:
            self._program = (self._found and self._found.result()) or self._make(lower(), dict(options))
            startup.give_back_memory()
        return self._program

    def _make(self, lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
        if not self._link:
            return lowered.compile(options or None)
        trees = repr((lowered.in_tree, lowered.out_tree))  # which the text does not name
        path = _path(self._link.parent, self._name, lowered.as_text(), trees, repr(options))
        program = _read(path)
        if not program:
            program = _compile_past_the_cache(lowered, options)
            _write(path, program)
        _point(self._link, path)
        return program


def _folder() -> Path | None:
    folder = os.environ.get(startup.FOLDER, '')
    wanted = startup.is_command and jax.config.values['jax_enable_compilation_cache']
    possible = jax.default_backend() == 'cpu' and jax.process_count() == 1 and '://' not in folder  # jax knows buckets
    return Path(folder) / FOLDER if folder and wanted and possible else None


def _path(folder: Path, name: str, *key: str) -> Path:
    digest = hashlib.sha256('\0'.join([*key, *_surroundings()]).encode()).hexdigest()
    return folder / f'{name}-{digest}'


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """All that tracing and compiling read but what they are given."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    devices = [(str(device), device.device_kind, device.client.platform_version) for device in jax.devices()]
    machine = (platform.platform(), startup.cpu_instructions(), str(os.cpu_count()), sys.version)
    return (jax.__version__, repr(sorted(settings.items())), repr(jax.config.values), repr(devices), *machine)


@functools.cache  # as they are at first: threads load modules later, in any order
def _sources() -> tuple[str, ...]:
    """Path, size and time of the file of every module: those that are loaded, and all of this package."""
    loaded = {getattr(module, '__file__', None) for module in list(sys.modules.values())}
    stamps = []
    for path in sorted({*filter(None, loaded), *map(str, Path(__file__).parent.rglob('*.py'))}):
        with contextlib.suppress(OSError):  # it is in an archive
            found = Path(path).stat()
            stamps.append(f'{path} {found.st_size} {found.st_mtime_ns}')
    return tuple(stamps)


def _read(path: Path) -> jax.stages.Compiled | None:
    try:
        content = path.read_bytes()
        os.utime(path)
        devices, serialized, *trees = pickle.loads(content)
        by_id = {device.id: device for device in jax.local_devices()}
        return serialize_executable.deserialize_and_load(
            serialized, *trees, execution_devices=[by_id[device] for device in devices]
        )
    except Exception:  # missing, damaged, of a jax that thought otherwise: it is compiled and takes that one's place
        return None


def _compile_past_the_cache(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    """Not out of jax's cache: XLA loses functions of a program that is written, read and written again."""
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()
    try:
        return lowered.compile(options or None)
    finally:
        jax.config.update('jax_enable_compilation_cache', True)
        compilation_cache.reset_cache()


def _write(path: Path, program: jax.stages.Compiled) -> None:
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        executable: Any = program.runtime_executable()
        devices = [device.id for device in executable.local_devices()]
        content = pickle.dumps((devices, *serialize_executable.serialize(program)))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        print(f'warning: {path} cannot be kept ({reason}): the next start will take longer', file=sys.stderr)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _point(link: Path, path: Path) -> None:
    with contextlib.suppress(OSError):  # then the program could not be written either
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        _make_room(link.parent)


def _make_room(folder: Path) -> None:
    """Removes the programs that were used longest ago, and what points nowhere."""
    kept = [(path.stat(), path) for path in folder.iterdir() if not path.is_symlink()]
    room = MOST_BYTES
    for found, path in sorted(kept, key=lambda pair: pair[0].st_mtime, reverse=True):
        room -= found.st_size
        if room < 0:
            path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if not path.exists():
            path.unlink(missing_ok=True)
