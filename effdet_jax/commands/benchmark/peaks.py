"""What devices can do at most: from their makers' tables where known, otherwise what this one was seen to do."""

from time import perf_counter
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effdet_jax.runtime import timing

SECONDS = 1.0  # of measuring each, where nothing is known
MATRIX, VECTOR = 2048, 2**26  # rows and columns; float32 numbers, far more than any cache holds


class Peak(NamedTuple):
    """Of one device. `flops`: floating-point operations per second; `bandwidth`: bytes of memory per second."""

    flops: float
    bandwidth: float
    source: str  # 'data sheet', or how it was measured


# By the beginning of `device_kind`, the first that fits: (TFLOP/s in bfloat16, in float32, GB/s), dense, from the
# data sheets. float32 is what jax's default precision makes of it: bfloat16 passes on TPU, TF32 from Ampere on.
DATA_SHEETS: dict[str, tuple[float | None, float, float]] = {
    'TPU v4': (275, 275, 1228),
    'TPU v5 lite': (197, 197, 819),
    'TPU v5e': (197, 197, 819),
    'TPU v5': (459, 459, 2765),
    'TPU v6': (918, 918, 1640),
    'NVIDIA A100-SXM4-40GB': (312, 156, 1555),
    'NVIDIA A100': (312, 156, 2039),
    'NVIDIA H100 PCIe': (756, 378, 2000),
    'NVIDIA H100': (989, 494, 3350),
    'NVIDIA H200': (989, 494, 4800),
    'NVIDIA L4': (121, 60, 300),
    'Tesla V100': (None, 15.7, 900),
    'Tesla T4': (None, 8.1, 320),
}


def known_peak(device_kind: str, dtype: str) -> Peak | None:
    """`dtype`: float32 or bfloat16, as in `config.model.dtype`. None where no table says."""
    # 'NVIDIA L40S' is no L4: the name must end there, or go on with a space or a dash.
    found = [
        row for name, row in DATA_SHEETS.items()
        if device_kind == name or device_kind.startswith((f'{name} ', f'{name}-', f'{name}p', f'{name}e'))
    ]  # fmt: skip
    if not found:
        return None
    in_bfloat16, in_float32, bandwidth = found[0]
    flops = in_bfloat16 if dtype == 'bfloat16' else in_float32
    return None if flops is None else Peak(flops * 1e12, bandwidth * 1e9, 'data sheet')


def attainable(dtype: str) -> Peak:
    """What this device was seen to do: a large matrix product, and reading and writing a large vector."""
    a = jnp.ones((MATRIX, MATRIX), dtype)
    x = jnp.ones(VECTOR, 'float32')
    flops = 2 * MATRIX**3 / _seconds(jax.jit(jnp.matmul), a, a)
    bandwidth = 2 * x.nbytes / _seconds(jax.jit(lambda x: x + 1), x)
    return Peak(
        flops, bandwidth, f'attainable here: product of {MATRIX}x{MATRIX} matrices; x + 1 of {x.nbytes:,} bytes'
    )


def _seconds(function, *arguments: jax.Array) -> float:
    """The quickest of `SECONDS` of calls."""
    jax.block_until_ready(function(*arguments))
    start, best = perf_counter(), float('inf')
    while perf_counter() - start < SECONDS:
        best = min(best, timing.seconds_of(lambda: jax.block_until_ready(function(*arguments))))
    return best


def peak(dtype: str) -> Peak:
    """Of this process's first device."""
    return known_peak(jax.devices()[0].device_kind, dtype) or attainable(dtype)
