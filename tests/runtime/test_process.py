import platform
import sys
from pathlib import Path

import pytest
from processes import printed_by

from effdet_jax.runtime import process


def test_programs_are_kept_below_the_users_cache(tmp_path):
    environment = {'XDG_CACHE_HOME': str(tmp_path)}
    process.keep_programs(environment)
    folder = Path(environment[process.FOLDER])
    assert folder.parent == tmp_path / 'effdet_jax' and folder.stat().st_mode & 0o777 == 0o700
    assert environment == {'XDG_CACHE_HOME': str(tmp_path), process.FOLDER: str(folder), **process.SETTINGS}


def test_the_environment_has_the_last_word(tmp_path):
    environment = {'XDG_CACHE_HOME': str(tmp_path), process.FOLDER: 'elsewhere'}
    process.keep_programs(environment)
    assert environment[process.FOLDER] == 'elsewhere' and len(environment) == 2 and not list(tmp_path.iterdir())
    environment = {'XDG_CACHE_HOME': str(tmp_path), 'JAX_COMPILATION_CACHE_MAX_SIZE': '1'}
    process.keep_programs(environment)
    assert environment['JAX_COMPILATION_CACHE_MAX_SIZE'] == '1' and process.FOLDER in environment


def test_where_nothing_can_be_kept_there_is_a_warning(tmp_path, capsys):
    (tmp_path / 'file').touch()
    environment = {'XDG_CACHE_HOME': str(tmp_path / 'file')}
    process.keep_programs(environment)
    assert process.FOLDER not in environment
    assert capsys.readouterr().err == (
        'warning: compiled programs are not cached (Not a directory): '
        'set JAX_COMPILATION_CACHE_DIR to a folder for them\n'
    )


def test_a_folder_that_others_can_write_into_is_not_used(tmp_path, capsys):
    environment = {'XDG_CACHE_HOME': str(tmp_path)}
    process.keep_programs(environment)
    folder = Path(environment.pop(process.FOLDER))
    folder.chmod(0o770)
    process.keep_programs(environment)
    assert process.FOLDER not in environment
    assert f'other users can write into {folder}, and so run programs in your name' in capsys.readouterr().err


def test_another_cpu_has_another_folder(monkeypatch, tmp_path):
    environment = {'XDG_CACHE_HOME': str(tmp_path)}
    here = process.default_folder(environment)
    monkeypatch.setattr(process, 'cpu_instructions', lambda: 'flags: fpu')
    assert process.default_folder(environment) != here


def test_a_second_start_compiles_nothing(tmp_path):
    """The training step is mapped and donates its state: so is this."""
    code = """
from effdet_jax.runtime import process
process.prepare()
import jax
import numpy as np
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition('/')[2]))
step = jax.pmap(lambda x: x @ x + 1, axis_name='batch', donate_argnums=0)
step(np.ones((1, 8, 8), np.float32)).block_until_ready()
print(events.count('cache_hits'), events.count('cache_misses'))
"""
    environment = {'XDG_CACHE_HOME': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    environment |= {process.FOLDER: None, 'XLA_FLAGS': None}
    assert [printed_by(code, **environment) for _ in range(2)] == ['0 1\n', '1 0\n']


def test_torch_is_not_loaded():
    """It takes seconds where it is installed, and tensorboardX would."""
    code = 'import sys; from effdet_jax import train; print({"torch", "tensorflow", "matplotlib"} & {*sys.modules})'
    assert printed_by(code) == 'set()\n'


ASKED_FOR = f'{process.HUGE_PAGES}=1'
needs_asking = pytest.mark.skipif(
    not process.WHO_GETS_HUGE_PAGES.exists() or '[madvise]' not in process.WHO_GETS_HUGE_PAGES.read_text(),
    reason='the system gives huge pages to all or to none',
)


def of_a_process(code: str, *arguments: str, tunables: str = '') -> str:
    """What it prints, started with so many tunables of glibc."""
    code = 'import os, sys; from effdet_jax.runtime import process; ' + code
    return printed_by(code, *arguments, **{process.TUNABLES: tunables or None})


@needs_asking
def test_a_command_asks_for_huge_pages_and_stays_the_same_command():
    before = 'os.environ.setdefault("PID", str(os.getpid())); process.use_huge_pages(); '
    code = 'print(os.environ["GLIBC_TUNABLES"], os.environ["PID"] == str(os.getpid()), sys.argv[1:])'
    assert of_a_process(before + code, 'a b', '--c') == f"{ASKED_FOR} True ['a b', '--c']\n"
    others = 'glibc.malloc.arena_max=1'
    assert of_a_process(before + code, tunables=others) == f'{ASKED_FOR}:{others} True []\n'
    refused = 'glibc.malloc.hugetlb=0'  # the user's own choice
    assert of_a_process(before + code, tunables=refused) == f'{refused} True []\n'


@needs_asking
def test_under_a_debugger_a_command_is_not_started_again():
    code = 'sys.settrace(lambda *_: None); process.use_huge_pages(); print("GLIBC_TUNABLES" in os.environ)'
    assert of_a_process(code) == 'False\n'


@needs_asking
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='tunables are glibc')
def test_much_memory_comes_in_huge_pages():
    code = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b'x' * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    small, huge = (int(of_a_process(code, tunables=tunables)) for tunables in ('glibc.malloc.hugetlb=0', ASKED_FOR))
    assert small > 10 * huge


@pytest.mark.skipif(sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc', reason='malloc_trim is glibc')
def test_kept_memory_is_given_back_when_asked_for():
    code = """
from effdet_jax.runtime import timing
blocks = [bytes(100_000) for _ in range(640)]  # too small for a mapping of its own
last = bytes(100_000)  # so that the heap cannot shrink
del blocks
before = timing.resident_bytes()
process.give_back_memory()
print(before - timing.resident_bytes())
"""
    assert int(of_a_process(code)) > 30 << 20


@pytest.mark.skipif(sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc', reason='mallopt is glibc')
def test_a_thread_keeps_its_scratch_memory():
    """Ten times 48 MiB, in a thread that is not the first: as XLA takes them."""
    code = """
import resource, threading
if 'keep' in sys.argv:
    process.keep_scratch_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
def work():
    bytearray(48 << 20)
    before = faults()
    for _ in range(10):
        block = bytearray(48 << 20)
        del block
    print(faults() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    tunables = 'glibc.malloc.hugetlb=0'
    kept, anew = (int(of_a_process(code, argument, tunables=tunables)) for argument in ('keep', 'not'))
    assert anew > 10_000 and kept < anew / 100
