import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from effdet_jax import startup


def test_programs_are_kept_below_the_users_cache(tmp_path):
    environment = {'XDG_CACHE_HOME': str(tmp_path)}
    startup.keep_programs(environment)
    folder = Path(environment[startup.FOLDER])
    assert folder.parent == tmp_path / 'effdet_jax' and folder.stat().st_mode & 0o777 == 0o700
    assert environment == {'XDG_CACHE_HOME': str(tmp_path), startup.FOLDER: str(folder), **startup.SETTINGS}


def test_the_environment_has_the_last_word(tmp_path):
    environment = {'XDG_CACHE_HOME': str(tmp_path), startup.FOLDER: 'elsewhere'}
    startup.keep_programs(environment)
    assert environment[startup.FOLDER] == 'elsewhere' and len(environment) == 2 and not list(tmp_path.iterdir())
    environment = {'XDG_CACHE_HOME': str(tmp_path), 'JAX_COMPILATION_CACHE_MAX_SIZE': '1'}
    startup.keep_programs(environment)
    assert environment['JAX_COMPILATION_CACHE_MAX_SIZE'] == '1' and startup.FOLDER in environment


def test_where_nothing_can_be_kept_there_is_a_warning(tmp_path, capsys):
    (tmp_path / 'file').touch()
    environment = {'XDG_CACHE_HOME': str(tmp_path / 'file')}
    startup.keep_programs(environment)
    assert startup.FOLDER not in environment
    assert capsys.readouterr().err == (
        'warning: compiled programs are not kept (Not a directory): JAX_COMPILATION_CACHE_DIR=FOLDER keeps them there\n'
    )


def test_another_cpu_has_another_folder(monkeypatch, tmp_path):
    environment = {'XDG_CACHE_HOME': str(tmp_path)}
    here = startup.default_folder(environment)
    monkeypatch.setattr(startup, '_instructions', lambda: 'flags: fpu')
    assert startup.default_folder(environment) != here


def test_a_second_start_compiles_nothing(tmp_path):
    """The training step is mapped and donates its state: so is this."""
    code = """
from effdet_jax import startup
startup.prepare()
import jax
import numpy as np
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition('/')[2]))
step = jax.pmap(lambda x: x @ x + 1, axis_name='batch', donate_argnums=0)
step(np.ones((1, 8, 8), np.float32)).block_until_ready()
print(events.count('cache_hits'), events.count('cache_misses'))
"""
    environment = {name: value for name, value in os.environ.items() if name not in (startup.FOLDER, 'XLA_FLAGS')}
    environment |= {'XDG_CACHE_HOME': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    first, second = (
        subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True) for _ in range(2)
    )
    assert first.stdout == '0 1\n', first.stderr
    assert second.stdout == '1 0\n', second.stderr


def test_torch_is_not_loaded():
    """It takes seconds where it is installed, and tensorboardX would."""
    code = 'import sys; from effdet_jax import train; print({"torch", "tensorflow", "matplotlib"} & {*sys.modules})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr


def page_faults_of_a_second_block(first: str) -> int:
    return of_two_blocks(first, 'resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before')


def of_two_blocks(first: str, answer: str) -> int:
    """What `answer` says in a process that took and freed 64 MiB twice, after it did `first`."""
    code = f"""
import ctypes, resource
from effdet_jax import measuring, startup
{first}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.free.argtypes = (ctypes.c_void_p,)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
print({answer})
"""
    return int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is glibc')
def test_freed_memory_is_kept_and_not_cleared_again_by_the_system():
    assert page_faults_of_a_second_block('') > 10 * page_faults_of_a_second_block('startup.keep_memory()') + 20


@pytest.mark.skipif(sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc', reason='malloc_trim is glibc')
def test_kept_memory_is_given_back_when_asked_for():
    kept, given_back = (
        of_two_blocks('startup.keep_memory()', answer)
        for answer in ('measuring.resident_bytes()', 'startup.give_back_memory() or measuring.resident_bytes()')
    )
    assert kept - given_back > 50 << 20
