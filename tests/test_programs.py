"""What was compiled once is found by what it is made of."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from effdet_jax import compiling, programs, startup
from effdet_jax.inference.detector import image_anchors
from effdet_jax.model import build_model
from effdet_jax.training import parallel
from effdet_jax.training.state import TrainState
from effdet_jax.training.step import MappedStep, map_train_step

ARGUMENT = np.arange(8.0, dtype=np.float32)
RESULT = np.cumsum(np.sin(ARGUMENT)) / (1 + ARGUMENT)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Of kept programs, as a command has one."""
    monkeypatch.setattr(startup, 'is_command', True)
    monkeypatch.setenv(startup.FOLDER, str(tmp_path / 'cache'))
    return tmp_path / 'cache' / programs.FOLDER


@pytest.fixture
def compiled(monkeypatch):
    """A list that grows by one with every program that is compiled to be kept."""
    done, compile_past_the_cache = [], programs._compile_past_the_cache

    def compile_and_count(*arguments):
        done.append(1)
        return compile_past_the_cache(*arguments)

    monkeypatch.setattr(programs, '_compile_past_the_cache', compile_and_count)
    return done


def calculate(made_of='a config', factor=1.0):
    """What the program gives, and whether it had to be lowered. Where it is found is what a new process would find."""
    lowered = []

    def lower():
        lowered.append(1)
        return jax.jit(lambda x: jnp.cumsum(jnp.sin(x)) / (1 + x) * factor).lower(ARGUMENT)

    result = programs.Program('test', made_of).get(lower, {})(ARGUMENT)
    np.testing.assert_allclose(result, RESULT * factor, rtol=1e-5)
    return bool(lowered)


def kept(folder):
    return [path for path in folder.iterdir() if not path.is_symlink()]


def test_a_second_start_lowers_nothing(folder, compiled):
    assert calculate()
    assert not calculate()
    assert len(compiled) == len(kept(folder)) == 1


def test_what_is_lowered_to_the_same_is_compiled_once(folder, compiled):
    assert calculate('one config') and calculate('another, with another name')
    assert not calculate('another, with another name')
    assert len(compiled) == len(kept(folder)) == 1
    assert calculate('a third', factor=2.0)
    assert len(compiled) == len(kept(folder)) == 2


def test_options_of_the_compiler_make_another_program(folder, compiled):
    for options in ({}, {'xla_cpu_enable_fast_math': False}):
        program = programs.Program('test', f'with {options}')
        program.get(lambda: jax.jit(jnp.sin).lower(ARGUMENT), options)
    assert len(compiled) == 2


def test_trees_of_other_names_make_another_program(folder, compiled):
    for name in ('kernel', 'weight'):
        program = programs.Program('test', f'with a {name}')
        lowered = jax.jit(lambda tree: sum(tree.values())).lower({name: ARGUMENT})
        np.testing.assert_array_equal(program.get(lambda lowered=lowered: lowered, {})({name: ARGUMENT}), ARGUMENT)
    assert len(compiled) == 2


def test_after_a_change_of_any_file_it_is_lowered_anew(folder, compiled, monkeypatch):
    calculate()
    monkeypatch.setattr(programs, '_sources', lambda: ('train.py 100 1',))
    assert calculate() and not calculate()
    monkeypatch.setattr(programs, '_sources', lambda: ('train.py 100 2',))
    assert calculate()
    assert len(compiled) == 1


def test_files_are_those_of_all_modules_and_of_the_whole_package(monkeypatch, tmp_path):
    module = tmp_path / 'my_own_loss.py'
    module.write_text('WEIGHT = 1')
    monkeypatch.syspath_prepend(tmp_path)
    __import__('my_own_loss')
    found = programs._sources.__wrapped__()
    assert any(str(module) in stamp for stamp in found)
    assert any(jax.__file__ in stamp for stamp in found)
    assert any('effdet_jax/training/adversarial.py' in stamp for stamp in found)
    os.utime(module, (1, 1))
    changed = set(programs._sources.__wrapped__()) ^ set(found)
    assert len(changed) == 2 and all(str(module) in stamp for stamp in changed)


def test_a_damaged_file_is_replaced(folder, compiled):
    calculate()
    (path,) = kept(folder)
    whole = path.read_bytes()
    for damaged in (b'', b'no program', whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert calculate()
        assert not calculate()
    assert len(compiled) == 4


def test_only_commands_keep_programs(folder, monkeypatch):
    monkeypatch.setattr(startup, 'is_command', False)
    assert calculate() and calculate()
    monkeypatch.setattr(startup, 'is_command', True)
    monkeypatch.setenv(startup.FOLDER, 'gs://bucket/cache')
    assert calculate() and calculate()
    monkeypatch.delenv(startup.FOLDER)
    assert calculate() and calculate()
    assert not folder.exists()


def test_without_jaxs_cache_nothing_is_kept(folder):
    jax.config.update('jax_enable_compilation_cache', False)
    try:
        assert calculate() and calculate()
    finally:
        jax.config.update('jax_enable_compilation_cache', True)
    assert not folder.exists()


def test_where_nothing_can_be_written_there_is_a_warning(folder, capsys):
    folder.parent.write_text('a file')
    assert calculate()
    assert 'warning' in (said := capsys.readouterr().err) and 'cannot be kept (Not a directory)' in said
    assert len(said.splitlines()) == 1


def test_the_ones_used_longest_ago_go(folder, monkeypatch):
    for factor in (1.0, 2.0):
        calculate(f'{factor}', factor)
    for path in kept(folder):
        os.utime(path, (1, 1))
    assert not calculate('1.0')  # used now
    monkeypatch.setattr(programs, 'MOST_BYTES', 5 * max(path.stat().st_size for path in kept(folder)) // 2)
    calculate('3.0', 3.0)
    assert not calculate('1.0') and not calculate('3.0', 3.0)
    assert len(kept(folder)) == 2 and len(list(folder.iterdir())) == 4  # each with what points at it
    assert calculate('2.0', 2.0)


def test_another_process_finds_it(tmp_path):
    """Even where jax's own cache had the program before: what comes out of that must not be written once more."""
    code = """
import sys
from effdet_jax import startup
startup.prepare()
startup.is_command = 'command' in sys.argv
import jax, jax.numpy as jnp, numpy as np
from effdet_jax import programs
def step(x):
    print('traced', end=' ')
    return jnp.cumsum(jnp.sin(jnp.sort(x) @ x.T)) * jax.random.normal(jax.random.key(0), (64,))
x = np.arange(64, dtype=np.float32).reshape(8, 8)
print(programs.Program('step', 'nothing').get(lambda: jax.jit(step).lower(x), {})(x).sum())
"""
    environment = {name: value for name, value in os.environ.items() if name not in (startup.FOLDER, 'XLA_FLAGS')}
    environment |= {'XDG_CACHE_HOME': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

    def start(*arguments):
        command = [sys.executable, '-c', code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout

    in_jaxs_cache = start()
    assert in_jaxs_cache.startswith('traced')
    assert start('command') == in_jaxs_cache
    assert start('command') == in_jaxs_cache.removeprefix('traced ')


def test_a_kept_step_runs_on_all_devices_and_takes_the_state_over(folder, compiled):
    def step(state, batch, frozen):
        total = jax.lax.psum(batch['image'].sum(), parallel.AXIS)
        moved = dataclasses.replace(state, variables={'params': state.variables['params'] + total})
        return jax.lax.cond(total > 0, lambda: moved, lambda: state), {'total': total, 'frozen': jnp.array(frozen)}

    batch = parallel.shard({'image': np.arange(8.0, dtype=np.float32).reshape(8, 1)})
    for _ in range(2):
        state = parallel.replicate(TrainState(jnp.int32(3), {'params': jnp.ones(1000)}, {}, ()))
        after, metrics = MappedStep(step, 'a config')(state, batch, False)
        assert after.variables['params'].shape == (jax.device_count(), 1000) and (after.variables['params'] == 29).all()
        assert (metrics['total'] == 28).all() and not metrics['frozen'].any()
        assert state.variables['params'].is_deleted()
    assert len(compiled) == 1
    assert compiling.options(compiling.TRAINING)  # else it would not have been kept


def test_a_step_of_another_config_is_another_one(folder):
    config = tiny.config()
    model = build_model(config.model, 5, parallel.AXIS)

    def link(config, model=model, total=20, frozen=False):
        step, _ = map_train_step(config, model, image_anchors(config), 10, total)
        return step.program(frozen)._link

    first = link(config)
    assert link(config) == first
    others = [link(config, total=30), link(config, frozen=True), link(config, build_model(config.model, 6))]
    with config.unlocked():
        config.loss.gamma += 1
    assert len({first, link(config), *others}) == 5
