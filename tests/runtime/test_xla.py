import jax
import pytest

from effdet_jax.records import console
from effdet_jax.runtime import xla
from effdet_jax.training.compiled import compile_step

FASTER_MATH = 'xla_cpu_enable_fast_math'


def test_this_version_of_xla_knows_all_our_options():
    for wanted in (xla.INFERENCE, xla.TRAINING, xla.ONCE):
        assert xla.options(wanted) == wanted['cpu']


def test_options_that_xla_does_not_know_are_left_out():
    assert xla.options({'cpu': {FASTER_MATH: False, 'no_such_option': 1, FASTER_MATH + 'er': True}}) == {
        FASTER_MATH: False
    }


def test_other_platforms_are_left_alone():
    assert xla.options({'tpu': {FASTER_MATH: True}}) == {}


def test_flags_that_xla_does_not_know_are_left_out():
    known = '--xla_force_host_platform_device_count=2'
    assert xla.known_flags(known, '--xla_no_such_flag=1', '--xla_nor_this_one') == known
    assert xla.known_flags(known) == known
    assert xla.known_flags() == ''


def test_programs_get_the_options():
    lowered = Lowered()
    compile_step(lowered, {'one': 1})
    assert lowered.options == {**xla.TRAINING['cpu'], 'one': 1}
    assert xla.jit(lambda x: 2 * x)(1.0) == 2
    assert xla.once(lambda x: 2 * x, 1.0) == 2


def test_jit_and_once_ask_for_what_their_tables_say(monkeypatch):
    tables = [xla.options(table) for table in (xla.INFERENCE, xla.ONCE)]
    asked = []
    monkeypatch.setattr(jax, 'jit', lambda function, compiler_options: asked.append(compiler_options) or function)
    xla.jit(abs)
    assert xla.once(abs, -1) == 1
    assert asked == tables


def test_on_a_gpu_training_asks_for_the_same_bits_in_every_run(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    lowered = Lowered()
    compile_step(lowered)
    assert lowered.options == {'xla_gpu_exclude_nondeterministic_ops': True}


def test_where_an_operation_cannot_repeat_its_bits_training_says_so_and_goes_on(monkeypatch):
    class OnlyRandom(Lowered):
        def compile(self, options=None):
            if options.get('xla_gpu_exclude_nondeterministic_ops'):
                raise jax.errors.JaxRuntimeError(
                    'UNIMPLEMENTED: HLO instruction select-and-scatter.401.0 does not have a deterministic '
                    'implementation, but run-to-run determinism is required.'
                )
            return super().compile(options)

    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    lowered = OnlyRandom()
    with console.terminal.capture() as printed:
        compile_step(lowered, {'another': 1})
    assert lowered.options == {'another': 1}
    assert 'repeated steps may differ in rounding' in ' '.join(printed.get().split())


def test_an_option_of_a_caller_is_not_left_out():
    with pytest.raises(jax.errors.JaxRuntimeError, match='no_such_option'):
        compile_step(jax.jit(lambda x: x).lower(1.0), {'no_such_option': 1})


class Lowered(jax.stages.Lowered):
    """Remembers the options that it was compiled with."""

    def __init__(self):
        self.options = None

    def compile(self, options=None):
        self.options = options
        return jax.jit(lambda x: x).lower(1.0).compile()
