"""Measures the time from the command to the first training step, by phases, with a new process for every start.

Each process runs `python -m effdet_jax.commands.benchmark.start_times FOLDER PHASES` and prints its times as one line
of JSON.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from effdet_jax import config as run_config
from effdet_jax.errors import UserError
from effdet_jax.records.console import track
from effdet_jax.runtime import process, timing

Row = dict[str, Any]

MODULE = 'effdet_jax.commands.benchmark.start_times'
CACHE_SETTINGS = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}  # a start compiles many small programs


def measure(config: Any, repeats: int, compiles: bool = True) -> Iterator[Row]:
    """A row for each phase, cold (empty compilation cache) and warm (cache filled by an earlier start).

    With `compiles` False, a start ends after tracing and lowering, which takes long enough for the largest networks.

    Raises:
      UserError: if a start fails; its own error is printed above.
    """
    for temperature in ('cold', 'warm') if compiles else ('cold',):
        with tempfile.TemporaryDirectory() as warm_cache:
            runs = []
            if temperature == 'warm':
                _start(config, warm_cache, compiles)
            for _ in track(range(repeats), repeats, f'{temperature} starts'):
                with tempfile.TemporaryDirectory() as fresh_cache:
                    runs.append(_start(config, fresh_cache if temperature == 'cold' else warm_cache, compiles))
        for phase in runs[0]:
            seconds = timing.spread([run[phase] for run in runs])
            yield {'what': phase, 'cache': temperature, 'seconds': seconds.as_dict()}


def _start(config: Any, cache: str, compiles: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run_config.save(config, Path(folder))
        environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': cache} | CACHE_SETTINGS
        command = [sys.executable, '-m', MODULE, folder, 'all' if compiles else 'lower']
        begun = time.time()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f'a start of the training failed with exit code {done.returncode}: see its error above')
    marks = [('', begun), *json.loads(done.stdout.splitlines()[-1])]
    seconds = {name: after - before for (_, before), (name, after) in itertools.pairwise(marks)}
    return seconds | {'all': marks[-1][1] - begun}


def _start_here(folder: Path, compiles: bool, over: Callable[[str], None]) -> None:
    """Starts a training as `main` does, and calls `over` with the name of each phase at its end."""
    import jax

    from effdet_jax.build import build_run
    from effdet_jax.runtime import devices
    from effdet_jax.training.compiled import compile_step

    over('Python and imports')
    config = run_config.load(folder)
    over('config')
    run = build_run(config, folder / 'run')
    over('data, optimizer')
    state, batch = devices.replicate(run.initial_state()), devices.shard(next(run.data.batches))
    over('weights, state onto the devices, first batch')
    frozen = run.timetable.unfreeze_step > 0

    def lower() -> jax.stages.Lowered:
        lowered = run.train_step.lower(state, batch, frozen)
        over('trace and lower')
        return lowered

    if not compiles:
        lower()
        return
    compiled = compile_step(lower())
    over('compile, or read from the cache')
    jax.block_until_ready(compiled(state, batch))
    over('first step')


def main(folder: str, phases: str) -> None:
    process.prepare()
    marks: list[tuple[str, float]] = []
    _start_here(Path(folder), phases == 'all', lambda phase: marks.append((phase, time.time())))
    print(json.dumps(marks), flush=True)
    os._exit(0)  # Grain's threads are still reading ahead


if __name__ == '__main__':
    main(*sys.argv[1:])
