"""XLA's compiler options for inference, for training and for programs that run once: {platform: {option: value}}.

They are measured in experiments/benchmarks. On other platforms XLA's defaults are used. XLA does not promise to keep
its options, so those that its version does not know are left out.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from effdet_jax.runtime import process

Options = Mapping[str, Mapping[str, Any]]

INFERENCE: Options = {
    'cpu': {
        # The full registers of AVX-512; LLVM's default uses half of them. No effect on CPUs without AVX-512.
        'xla_cpu_prefer_vector_width': 512,
        # YNNPACK for reductions, as by default, but Eigen for matrix products, where it is faster.
        'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
    }
}
TRAINING: Options = {
    # Fewer optimization passes: a step of D0 takes 1.03 to 1.07 of the time, compiling takes 0.8.
    'cpu': {**INFERENCE['cpu'], 'xla_cpu_opt_preset': 'CPU_OPT_PRESET_FAST_COMPILE'},
    # Bit-identical repetitions: otherwise the order of some sums depends on the timing of threads. It refuses the
    # gradient of XLA's pooling (NAS-FPN, unusual sizes): `compile_step` then compiles without it and warns.
    'gpu': {'xla_gpu_exclude_nondeterministic_ops': True},
}
# No LLVM optimization: initializing weights runs four times as long (0.2 s) but compiles in 0.6 of the time (8 s).
ONCE: Options = {'cpu': {'xla_cpu_opt_preset': 'CPU_OPT_PRESET_FAST_COMPILE', 'xla_backend_optimization_level': 0}}


def jit(function: Callable) -> Callable:
    """`jax.jit` for inference. Also lets the allocator keep scratch memory (`process.keep_scratch_memory`)."""
    process.keep_scratch_memory()
    return jax.jit(function, compiler_options=options(INFERENCE) or None)


def once(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, compiled for this one call."""
    return jax.jit(function, compiler_options=options(ONCE) or None)(*arguments)


def options(wanted: Options) -> dict[str, Any]:
    """The options for the default platform that its compiler knows."""
    return {name: value for name, value in wanted.get(jax.default_backend(), {}).items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda x: x).lower(0.0).compile({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def known_flags(*flags: str) -> str:
    """A value for XLA_FLAGS: those of `flags` ('--xla_name=value') that this version of XLA knows.

    XLA aborts the process on an unknown flag, so another process tries them.
    """
    environment = os.environ | {'XLA_FLAGS': ' '.join(flags), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', 'import jax; jax.devices()']
    tried = subprocess.run(command, env=environment, capture_output=True, text=True)
    unknown = re.search(r'Unknown flags? in XLA_FLAGS: (.*)', tried.stderr)
    return ' '.join(flag for flag in flags if not unknown or flag not in unknown[1].split())
