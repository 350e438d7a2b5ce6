"""The peak performance of devices: from data sheets if known, otherwise measured on this device."""

from time import perf_counter
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effdet_jax.runtime import timing

SECONDS = 1.0  # for each measurement
MATRIX, VECTOR = 2048, 2**26  # rows and columns; float32 values, far more than any cache holds


class Peak(NamedTuple):
    """The peak performance of one device."""

    flops: float  # floating-point operations per second
    bandwidth: float  # bytes of memory per second
    source: str  # 'data sheet', or how it was measured


# {prefix of `device_kind`: (TFLOP/s in bfloat16, TFLOP/s in float32, GB/s)}, dense, from data sheets; the first match
# counts. float32 is at jax's default precision: bfloat16 passes on TPU, TF32 on Ampere and later GPUs.
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
    """The peak from the data sheets, or None. `dtype`: float32 or bfloat16, as in `config.model.dtype`."""
    # 'NVIDIA L40S' is not an L4: only these separators may follow the prefix.
    rows = [
        row for name, row in DATA_SHEETS.items()
        if device_kind == name or device_kind.startswith((f'{name} ', f'{name}-', f'{name}p', f'{name}e'))
    ]  # fmt: skip
    if not rows:
        return None
    in_bfloat16, in_float32, bandwidth = rows[0]
    flops = in_bfloat16 if dtype == 'bfloat16' else in_float32
    return None if flops is None else Peak(flops * 1e12, bandwidth * 1e9, 'data sheet')


def attainable(dtype: str) -> Peak:
    """The measured peak: a large matrix product, and reading and writing a large vector."""
    a = jnp.ones((MATRIX, MATRIX), dtype)
    x = jnp.ones(VECTOR, 'float32')
    flops = 2 * MATRIX**3 / _seconds(jax.jit(jnp.matmul), a, a)
    bandwidth = 2 * x.nbytes / _seconds(jax.jit(lambda x: x + 1), x)
    return Peak(flops, bandwidth, f'measured: product of {MATRIX}x{MATRIX} matrices; x + 1 of {x.nbytes:,} bytes')


def _seconds(function, *arguments: jax.Array) -> float:
    """The time of the fastest call within `SECONDS`."""
    jax.block_until_ready(function(*arguments))
    start, best = perf_counter(), float('inf')
    while perf_counter() - start < SECONDS:
        best = min(best, timing.seconds_of(lambda: jax.block_until_ready(function(*arguments))))
    return best


def peak(dtype: str) -> Peak:
    """The peak of the first device of this process."""
    return known_peak(jax.devices()[0].device_kind, dtype) or attainable(dtype)
