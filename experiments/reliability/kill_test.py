"""SIGKILL at random instants, and the same command again.

    python -m experiments.reliability.kill_test [KILLS] [SEED]
    python -m experiments.reliability.kill_test first_save [KILLS] [SEED]

The second kills runs that start from another run's weights (train.init_from) while they save for the first time.
Prints a table of the kills, and compares what is left in the end with a run that nobody disturbed. Exits with 1 where
they differ, or where a checkpoint that stood before a kill was not there after it.
"""

import collections
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from effdet_jax.records.board import read_events
from effdet_jax.records.console import table
from effdet_jax.records.metrics import read_metrics

COMMAND = [sys.executable, '-m', 'experiments.reliability.small', '--config=experiments/reliability/config.py']
LONG = ('--config.train.epochs=24',)
STEPS_PER_EPOCH, EVALUATED_EVERY = 32, 16
LONGEST_LIFE = 4.0  # seconds, from the moment that the run goes on
LONGEST_SAVE = 0.15  # seconds, from the moment that the first save has begun
SPEED = {'train/images_per_second', 'train/waiting_for_data'}  # the only numbers that differ from run to run


EQUAL = 'parameters, optimiser, average, metrics.jsonl and TensorBoard equal those of the undisturbed run, bit for bit'


def main(kills: int = 30, seed: int = 0) -> None:
    folder = make_folder()
    undisturbed = folder / 'undisturbed'
    assert start(undisturbed, LONG).wait() == 0
    rng, rows, workdir = random.Random(seed), [], folder / 'killed_0'
    while len(rows) < kills:
        recovered, lived, ended = live_and_die(workdir, rng)
        tell_recovery(rows, recovered)
        if ended:  # alive at the end of the run: on with another one
            assert same(undisturbed, workdir)
            workdir = folder / f'killed_{len(rows)}'
        else:
            rows.append([len(rows) + 1, f'{lived:.2f}', *post_mortem(workdir)])
    last = start(workdir, LONG)
    tell_recovery(rows, recovered_step(last, workdir))
    assert last.wait() == 0
    assert same(undisturbed, workdir)
    lost = sum(recovered < newest for *_, newest, recovered in rows)
    print(table(('kill', 'after s', 'during', 'last logged', 'newest checkpoint', 'recovered'), rows))
    print(dict(collections.Counter(row[2] for row in rows)), f'{lost} checkpoints lost')
    print(EQUAL)
    shutil.rmtree(folder)
    sys.exit(bool(lost))


def first_save(kills: int = 20, seed: int = 0) -> None:
    folder = make_folder()
    other, undisturbed = folder / 'other', folder / 'undisturbed'
    assert start(other, ('--config.train.epochs=1', '--config.seed=1')).wait() == 0
    short = ('--config.train.epochs=1', f'--config.train.init_from={other}')
    assert start(undisturbed, short).wait() == 0
    rng, rows = random.Random(seed), []
    while len(rows) < kills:
        workdir = folder / f'killed_{len(rows)}'
        process = start(workdir, short)
        while not any(workdir.glob('checkpoints/*')):
            assert process.poll() is None, workdir.with_suffix('.log').read_text()
            time.sleep(0.001)
        life = rng.uniform(0, LONGEST_SAVE)
        time.sleep(life)
        process.kill()
        process.wait()
        row = [len(rows) + 1, f'{life:.3f}', *post_mortem(workdir)]
        if row[2] != 'save' or row[-1]:  # the kill came too late, its first checkpoint is there
            shutil.rmtree(workdir)
            continue
        again = start(workdir, short)
        rows.append([*row, recovered_step(again, workdir)])
        print(*rows[-1], sep='\t', flush=True)
        assert again.wait() == 0
        assert same(undisturbed, workdir)
    print(table(('kill', 'after s', 'during', 'last logged', 'newest checkpoint', 'recovered'), rows))
    print(EQUAL)
    shutil.rmtree(folder)


def make_folder() -> Path:
    """For the runs, and for a cache of compiled programs that they share."""
    folder = Path(tempfile.mkdtemp(prefix='kill_test_'))
    os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')}
    return folder


def tell_recovery(rows: list[list], step: int) -> None:
    """Completes the row of the last kill by where the run went on after it."""
    if rows and len(rows[-1]) < 6:
        rows[-1].append(step)
        print(*rows[-1], sep='\t', flush=True)


def start(workdir: Path, flags: Sequence[str], pause: float = 0.0) -> subprocess.Popen:
    log = workdir.with_suffix('.log').open('w')
    command = [*COMMAND, *flags, f'--workdir={workdir}']
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {'PAUSE': str(pause)})


def live_and_die(workdir: Path, rng: random.Random) -> tuple[int, float, bool]:
    """(step from which it went on, seconds from there to the kill, whether the run ended before that)."""
    process = start(workdir, LONG, pause=0.03)
    recovered = recovered_step(process, workdir)
    life = rng.uniform(0, LONGEST_LIFE)
    try:
        assert process.wait(life) == 0
        return recovered, life, True
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return recovered, life, False


def recovered_step(process: subprocess.Popen, workdir: Path) -> int:
    """Waits until the run says from which step it continues, or that it starts; 0 then."""
    log = workdir.with_suffix('.log')
    while not (match := re.search(r'continuing .* from step (\d+) of|compiled in', log.read_text())):
        assert process.poll() in (None, 0), log.read_text()
        time.sleep(0.01)
    return int(match[1] or 0)


def post_mortem(workdir: Path) -> tuple[str, int, int]:
    """(what the run was at, the last step in its log, its newest checkpoint)."""
    rows = read_metrics(workdir / 'metrics.jsonl')
    last = rows[-1] if rows else {'step': 0}
    newest = max((int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit()), default=0)
    if any(workdir.glob('checkpoints/*tmp*')):
        return 'save', last['step'], newest
    evaluating = last['step'] % EVALUATED_EVERY == 0 and last['step'] > 0 and 'eval/AP' not in last
    return 'evaluation' if evaluating else 'step', last['step'], newest


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs left the same behind, and every step once."""
    steps = max(int(path.name) for path in a.glob('checkpoints/*'))
    assert steps % STEPS_PER_EPOCH == 0
    states = [ocp.PyTreeCheckpointer().restore(w.absolute() / f'checkpoints/{steps}/state') for w in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    metrics = [
        [{k: v for k, v in row.items() if k not in SPEED} for row in read_metrics(w / 'metrics.jsonl')] for w in (a, b)
    ]
    np.testing.assert_equal(*metrics)
    assert [row['step'] for row in metrics[1] if 'train/loss' in row] == list(range(1, steps + 1))
    events = [sorted(scalars(w)) for w in (a, b)]
    assert events[0] == events[1]
    assert len(events[1]) == len({(step, name) for step, name, _ in events[1]}) > steps
    assert not (b / 'checkpoints-damaged').exists()
    return True


def scalars(workdir: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every number in TensorBoard's files, those of speed left out."""
    return [
        (event.step, value.tag, value.simple_value)
        for path in workdir.glob('tensorboard/*')
        for _, event in read_events(path)
        for value in event.summary.value
        if value.HasField('simple_value') and value.tag not in SPEED
    ]


if __name__ == '__main__':
    arguments = sys.argv[1:]
    run = first_save if arguments[:1] == ['first_save'] else main
    run(*map(int, arguments[run is first_save :]))
