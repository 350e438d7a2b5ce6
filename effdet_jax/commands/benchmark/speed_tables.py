"""The results of a benchmark as Markdown tables."""

import datetime
import platform
from collections.abc import Sequence
from typing import Any

import jax

from effdet_jax.records.console import table
from effdet_jax.runtime import devices

Row = dict[str, Any]
MIB = 2**20


def settings(config: Any, what: str) -> dict[str, Any]:
    """The conditions of the measurement."""
    height, width = config.image.size
    return {
        'what': what,
        'config': config.name,
        'image': f'{height}x{width}',
        'dtype': config.model.dtype,
        'devices': devices.describe_devices(),
        'jax': jax.__version__,
        'python': platform.python_version(),
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes'),
    }


def to_markdown(settings: dict[str, Any], rows: Sequence[Row]) -> str:
    """The settings, a table of the rows, and an explanation of its columns."""
    title = ', '.join(map(str, settings.values())) + '\n'
    if 'flops/s' in rows[0]:
        return _speeds(title, rows)
    if 'cache' in rows[0]:
        return _starts(title, rows)
    return table(('stage', 'images/s'), [(row['what'], f'{row["images/s"]:.1f}') for row in rows], title)


def _speeds(title: str, rows: Sequence[Row]) -> str:
    cells = [
        (
            row['what'], row['batch'], *_milliseconds(row['seconds']), f'{row["images/s"]:.1f}',
            f'{row["flops/s"] / 1e9:.1f}', f'{row["share of peak flops"]:.1%}',
            _or_dash(row['bytes moved'], lambda x: f'{x / MIB:,.0f}'),
            _or_dash(row['share of peak bandwidth'], lambda x: f'{x:.1%}'),
            round(row['peak memory'] / MIB), f'{row["compile_s"]:.1f}',
        )
        for row in rows
    ]  # fmt: skip
    header = (
        'what', 'batch', 'ms', '± error', 'middle half', 'images/s', 'GFLOP/s', 'of the peak', 'MiB moved',
        'of the peak', 'peak MiB', 'compile s',
    )  # fmt: skip
    best = rows[0]['peak']
    return (
        f'{table(header, cells, title)}\n\nms: median of {rows[0]["seconds"]["count"]} blocks. GFLOP/s: convolutions '
        'only, per device; a multiply-accumulate counts as two operations, a training step as three forward passes. '
        'MiB moved: between kernels and memory, as counted by the compiler. Peak: '
        f'{best["flops"] / 1e9:,.0f} GFLOP/s and {best["bandwidth"] / 1e9:,.0f} GB/s ({best["source"]}). '
        'Peak MiB: of the device; on a CPU, of the whole process, including memory left by the compiler.'
    )


def _starts(title: str, rows: Sequence[Row]) -> str:
    cells = [
        (row['what'], row['cache'], f'{s["median"]:.2f}', f'{s["low"]:.2f} to {s["high"]:.2f}')
        for row in rows
        for s in [row['seconds']]
    ]
    text = table(('phase', 'cache', 's', 'middle half'), cells, title)
    return f'{text}\n\ns: median of {rows[0]["seconds"]["count"]} starts, each a process of its own.'


def _milliseconds(seconds: dict[str, Any]) -> tuple[str, str, str]:
    """(median, its error, quartiles)."""
    error = _or_dash(seconds['error'], lambda x: f'{1e3 * x:.2f}')
    return f'{1e3 * seconds["median"]:.2f}', error, f'{1e3 * seconds["low"]:.2f} to {1e3 * seconds["high"]:.2f}'


def _or_dash(value: float | None, shown: Any) -> str:
    return '-' if value is None else shown(value)
