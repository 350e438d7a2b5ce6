"""What XLA is asked for where it compiles, {platform: {option: value}}; elsewhere its defaults are best.

Measured in experiments/benchmarks. Options are no promise of XLA's: those that it does not know are left out.
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
        # AVX-512's full registers, of which LLVM uses half unless it is told to. A CPU without them does not mind.
        'xla_cpu_prefer_vector_width': 512,
        # YNNPACK for sums over an image, as ever, but not for matrix products, in which Eigen is quicker.
        'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
    }
}
TRAINING: Options = {
    # And fewer passes over what is compiled: a step of D0 takes 1.03 to 1.07 of the time, and compiling 0.8.
    'cpu': {**INFERENCE['cpu'], 'xla_cpu_opt_preset': 'CPU_OPT_PRESET_FAST_COMPILE'},
    # The same bits from the same inputs: otherwise some kernels add up in the order in which their threads come.
    'gpu': {'xla_gpu_exclude_nondeterministic_ops': True},
}
# No optimisation by LLVM: weights are drawn in four times the time, 0.2 s, by a program compiled in 0.6 of it, 8 s.
ONCE: Options = {'cpu': {'xla_cpu_opt_preset': 'CPU_OPT_PRESET_FAST_COMPILE', 'xla_backend_optimization_level': 0}}


def jit(function: Callable) -> Callable:
    """`jax.jit` for inference. Tells the process's allocator to keep what a call needs (`keep_scratch_memory`)."""
    process.keep_scratch_memory()
    return jax.jit(function, compiler_options=options(INFERENCE) or None)


def once(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, compiled for this one call."""
    return jax.jit(function, compiler_options=options(ONCE) or None)(*arguments)


def options(wanted: Options) -> dict[str, Any]:
    """Those for the default platform that its compiler knows."""
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

    XLA aborts the process on a flag that it does not know, so another process tries them.
    """
    environment = os.environ | {'XLA_FLAGS': ' '.join(flags), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', 'import jax; jax.devices()']
    tried = subprocess.run(command, env=environment, capture_output=True, text=True)
    unknown = re.search(r'Unknown flags? in XLA_FLAGS: (.*)', tried.stderr)
    return ' '.join(flag for flag in flags if not unknown or flag not in unknown[1].split())
