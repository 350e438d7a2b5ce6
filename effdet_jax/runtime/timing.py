"""Measuring time and memory: blocks of calls, medians and their standard errors. Imports neither jax nor torch.

Two systems are compared in alternating blocks. Whatever else the machine does affects neighbouring blocks alike, so the
ratio of neighbours is steadier than the ratio of two medians.
"""

import gc
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from effdet_jax.runtime import process

_NORMAL_MAD = 1.4826  # standard deviation / median absolute deviation of a normal distribution
_NORMAL_MEDIAN = math.sqrt(math.pi / 2)  # standard error of its median / that of its mean
_RESET_PEAK = '5'  # proc(5): clear_refs


class Spread(NamedTuple):
    """Statistics of repeated measurements. `error`: one standard error of the median; nan for a single measurement."""

    median: float
    error: float
    low: float  # lower and upper quartile
    high: float
    count: int

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: nan becomes None."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles, and the median's standard error from the median absolute deviation (robust to outliers).

    Raises ValueError if there are no values.
    """
    if not len(values):
        raise ValueError('no measurements')
    low, middle, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    deviation = _NORMAL_MAD * statistics.median(abs(value - middle) for value in values)
    error = _NORMAL_MEDIAN * deviation / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Spread(middle, error, low, high, len(values))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], theirs_more: float = 0.0) -> Spread:
    """The spread of ours / (theirs + theirs_more), round by round."""
    return spread([a / (b + theirs_more) for a, b in zip(ours, theirs, strict=True)])


def seconds_per_call(call: Callable[[], Any], wait: Callable[[Any], Any], calls: int, ahead: int = 0) -> float:
    """The mean over one block of `calls`, after one warm-up call.

    `call` starts work and returns what `wait` waits for. `ahead` calls may be running when the next one starts: 0 to
    measure each by itself, 1 as in the training loop on accelerators.
    """
    wait(call())
    under_way: deque[Any] = deque()
    start = perf_counter()
    for _ in range(calls):
        under_way.append(call())
        if len(under_way) > ahead:
            wait(under_way.popleft())
    while under_way:
        wait(under_way.popleft())
    return (perf_counter() - start) / calls


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of one call of `work`, which returns when it is done."""
    start = perf_counter()
    work()
    return perf_counter() - start


def calls_in(seconds: float, seconds_of_one: float) -> int:
    """How many calls fill a block of about `seconds`; at least one."""
    return max(1, round(seconds / seconds_of_one))


def in_turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of the systems in each round. It rotates, so that none is always first."""
    return [[names[(number + place) % len(names)] for place in range(len(names))] for number in range(rounds)]


def settle() -> None:
    """Returns freed memory to the system and resets `peak_bytes` to what is then resident. Linux only."""
    gc.collect()
    process.give_back_memory()
    Path('/proc/self/clear_refs').write_text(_RESET_PEAK)


def resident_bytes() -> int:
    """Resident memory of this process. Linux only."""
    return _status('VmRSS')


def peak_bytes() -> int:
    """Peak resident memory of this process since its start or since `settle`. Linux only."""
    return _status('VmHWM')


def _status(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{key}:'))
