"""Is a run that was killed and continued the same, bit for bit, as one that was not? On any device; for GPUs above all.

    python -m experiments.reliability.resume --device=cuda --out=resume.json

For each setting there are two runs of one command. One is ended by SIGKILL once its first checkpoint stands, and is
started again; the other is left alone. Then their checkpoints of a later step are compared, and the losses up to there.

A GPU may add in another order each time, and what it computes depends on which kernels were the fastest when XLA tried
them. So the settings are: with and without deterministic operations; with a compilation cache that all processes of a
setting share, as users have it, and without one, so that each process compiles for itself.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ['JAX_PLATFORMS'] = 'cpu'  # of this process, which only compares

import numpy as np
import orbax.checkpoint as ocp

from effdet_jax.errors import UserError
from effdet_jax.records.console import table
from effdet_jax.records.files import write_atomically
from effdet_jax.records.metrics import read_metrics

PLATFORMS = {'cpu': 'cpu', 'cuda': 'cuda,cpu'}
FIRST, LAST = 16, 160  # steps: of the checkpoint before the kill, and of those that are compared
DETECTOR = (
    'effdet_jax.main', '--config=configs/quickstart.py', '--config.model.dtype=bfloat16',
    '--config.dataset.train_split=0:128', '--config.dataset.eval_split=1000000:1000008',
)  # fmt: skip
THREE_CONVOLUTIONS = (
    'experiments.reliability.small', '--config=experiments/reliability/config.py', '--config.dataset.train_split=0:64',
)  # fmt: skip
ENDLESS = (
    '--config.train.epochs=1000.0', '--config.eval.every_epochs=1000.0', '--config.checkpoint.every_epochs=1.0',
    '--config.checkpoint.keep=1000', '--config.log.every_steps=1', '--quiet',
)  # fmt: skip


class Setting(NamedTuple):
    title: str
    xla_flags: str
    shares_cache: bool


DETERMINISTIC = '--xla_gpu_deterministic_ops=true'
SETTINGS = (
    Setting('as it is', '', True),
    Setting('deterministic operations', DETERMINISTIC, True),
    Setting('as it is, each process compiles', '', False),
    Setting('deterministic operations, each process compiles', DETERMINISTIC, False),
)


def main(device: str, toy: bool, at_once: int, limit: float, out: str) -> None:
    places, ends = threading.Semaphore(at_once), time.monotonic() + limit
    command = [sys.executable, '-m', *(THREE_CONVOLUTIONS if toy else DETECTOR), *ENDLESS]
    base = os.environ | {'JAX_PLATFORMS': PLATFORMS[device], 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(SETTINGS)) as pool:

        def attempt(number: int, setting: Setting) -> dict[str, Any]:
            own = Path(folder) / str(number)
            environment = base | {
                'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {setting.xla_flags}'.strip(),
                'JAX_COMPILATION_CACHE_DIR': str(own / 'cache') if setting.shares_cache else '',
            }

            def run(name: str, step: int) -> None:
                with places:
                    run_to(step, command, own / name, environment, ends)

            try:
                return kill_and_continue(own, run)
            except UserError as error:
                return {'failed': str(error)}

        attempts = [pool.submit(attempt, number, setting) for number, setting in enumerate(SETTINGS)]
        for setting, future in zip(SETTINGS, attempts, strict=True):
            found[setting.title] = future.result()
            print(setting.title, found[setting.title], file=sys.stderr)
            if out:
                write_atomically(Path(out), (json.dumps(found, indent=1) + '\n').encode())
    print(summary(found))
    if failed := [title for title, result in found.items() if 'failed' in result]:
        sys.exit(f'error: not compared: {"; ".join(failed)}')


def kill_and_continue(folder: Path, run: Callable[[str, int], None]) -> dict[str, Any]:
    """`run(name, step)` runs folder/name to a step. Raises UserError where it does, or where the kill came too late."""
    folder.mkdir()
    run('killed', FIRST)
    killed_at, newest = _last_step(folder / 'killed'), _newest(folder / 'killed')
    if newest >= LAST:
        raise UserError(f'the run was at step {newest} before the kill came')
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run, name, LAST) for name in ('killed', 'undisturbed')]:
            future.result()
    differences = compare(folder / 'undisturbed', folder / 'killed', LAST)
    return {'killed at': killed_at, 'continued from': newest, **differences}


def run_to(step: int, command: list[str], workdir: Path, environment: Mapping[str, str], ends: float) -> None:
    """Starts the training, or continues it, and kills it once its checkpoint of this step stands.

    Raises:
      UserError: where it ends before, or `time.monotonic()` comes to `ends`.
    """
    with workdir.with_suffix('.log').open('a') as log:
        process = subprocess.Popen([*command, f'--workdir={workdir}'], stdout=log, stderr=log, env=environment)
    try:
        while not (workdir / f'checkpoints/{step}').exists():
            if process.poll() is not None:
                *_, last = ['', *workdir.with_suffix('.log').read_text().splitlines()]
                raise UserError(f'{workdir.name} ended with code {process.returncode}: {last[:300]}')
            if time.monotonic() > ends:
                raise UserError(f'{workdir.name} had no checkpoint of step {step} in time')
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _last_step(workdir: Path) -> int:
    return max((row['step'] for row in read_metrics(workdir / 'metrics.jsonl')), default=0)


def _newest(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def compare(a: Path, b: Path, step: int) -> dict[str, Any]:
    """What differs between two runs in the state after this step, and from which step on in the loss."""
    states = [ocp.PyTreeCheckpointer().restore((w / f'checkpoints/{step}/state').absolute()) for w in (a, b)]
    leaves = [[np.asarray(x) for x in _leaves(state)] for state in states]
    differing = [(x, y) for x, y in zip(*leaves, strict=True) if x.tobytes() != y.tobytes()]
    losses = [
        {row['step']: row['train/loss'] for row in read_metrics(w / 'metrics.jsonl') if 'train/loss' in row}
        for w in (a, b)
    ]
    steps = range(1, step + 1)
    return {
        'arrays': len(leaves[0]),
        'arrays that differ': len(differing),
        'largest difference': max((float(abs(x - y).max()) for x, y in differing), default=0.0),
        'first loss that differs': next((n for n in steps if losses[0].get(n) != losses[1].get(n)), None),
        'losses': [losses[0].get(step), losses[1].get(step)],
    }


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _leaves(item)]
    return [] if tree is None else [tree]


COLUMNS = (
    'killed at', 'continued from', 'arrays', 'arrays that differ', 'largest difference', 'first loss that differs'
)  # fmt: skip


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table."""
    rows = [
        (title, result.get('failed') or ('yes' if not result['arrays that differ'] else 'no'),
         *(_shown(result.get(column)) for column in COLUMNS))
        for title, result in found.items()
    ]  # fmt: skip
    return table(('setting', 'equal bits', *COLUMNS), rows, f'Killed and continued beside undisturbed, step {LAST}\n')


def _shown(value: Any) -> str:
    return '-' if value is None else f'{value:.3g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=list(PLATFORMS), help='on which the runs train')
    parser.add_argument('--toy', action='store_true', help='three convolutions, not a small detector in bfloat16')
    parser.add_argument('--at_once', type=int, default=1, help='processes that may run at the same time')
    parser.add_argument('--limit', type=float, default=1800, help='seconds after which the runs are given up')
    parser.add_argument('--out', default='', help='JSON file for what was found')
    main(**vars(parser.parse_args()))
