"""What the guards cost a training step: python -m experiments.reliability.cost [ROUNDS]

Takes the quickstart's step in three forms in turns, so that whatever else the machine does befalls all alike: without a
guard, as it is (on CPU a branch), and with `where`. Then times what the loop does for the guards on the host.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from effdet_jax import build
from effdet_jax.configs import quickstart
from effdet_jax.records.checkpoint import Checkpoints
from effdet_jax.records.console import table
from effdet_jax.records.metrics import MetricsLog
from effdet_jax.runtime import devices, timing
from effdet_jax.runtime.signals import notices
from effdet_jax.training import incidents, step

FORMS = {
    'no guard': lambda finite, yes, no, *operands: yes(*operands),
    'as it is': step.branch,
    'where': lambda finite, yes, no, *operands: jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), yes(*operands), no(*operands)
    ),
}
LOG_INTERVAL = 20


def main(rounds: int = 60) -> None:
    takes = {name: take_steps(branch) for name, branch in FORMS.items()}
    seconds = {name: [] for name in takes}
    for order in timing.in_turns(list(takes), rounds):
        for name in order:
            seconds[name].append(timing.seconds_of(takes[name]))
    rows = []
    for name, times in seconds.items():
        ratio, median = timing.paired_ratio(times, seconds['no guard']), timing.spread(times).median
        half = f'{ratio.low:.3f} to {ratio.high:.3f}'
        rows.append((name, 1e3 * median, f'{ratio.median:.4f}', f'{ratio.error:.4f}', half))
    print(table(('form', 'ms', 'ratio to no guard', 'standard error', 'middle half'), rows, f'{rounds} rounds'))
    host, bare = host_seconds(takes['as it is']()), timing.spread(seconds['no guard']).median
    print(f'host: {1e6 * host:.0f} us a step, {host / bare:.2%} of a step')


def take_steps(branch: Callable) -> Callable[[], Any]:
    """A function that takes one more step of a run of its own, waits for it and returns its metrics."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(step, 'branch', branch):
        run = build.build_run(quickstart.get_config(), Path(folder))
        state, batch = devices.replicate(run.initial_state()), devices.shard(next(run.data.batches))

        def take() -> Any:
            nonlocal state
            state, metrics = run.train_step(state, batch, False)
            return jax.block_until_ready(metrics)

        take()  # traced and compiled here, in this form
    take()
    return take


def host_seconds(metrics: Any) -> float:
    """Per step, of everything that the loop does for the guards, at the quickstart's log interval."""
    with tempfile.TemporaryDirectory() as folder, notices() as stop_is_asked, MetricsLog(Path(folder)) as log:
        source, _ = build.open_sources(quickstart.get_config())
        watch, checkpoints = incidents.make_watch(source, Path(folder), 20), Checkpoints(Path(folder))
        index_B, repeats = np.arange(8), 20
        start = time.perf_counter()
        for _ in range(repeats):
            pending = []
            for number in range(LOG_INTERVAL):
                pending.append((number, metrics, index_B))
                stop_is_asked(number)
            rows = incidents.fetch(pending)
            incidents.means_of_steps(rows)
            watch(rows, log)
            checkpoints.check()
        return (time.perf_counter() - start) / repeats / LOG_INTERVAL


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
