"""A sweep of runs that are made up: what is started, what is skipped, what the tables say."""

import csv
import json
from pathlib import Path

import pytest

from experiments import sweeps
from experiments.sweeps import Row

ROWS = [Row('a', {'model.fpn_cells': 1}, {'size': 7}), Row('b', {'model.fpn_cells': 2}, {'paper': 0.5})]


def finish(workdir, ap):
    workdir.mkdir(parents=True)
    lines = [
        {'step': 1, 'train/images_per_second': 30.0},
        {'step': 2, 'eval/AP': 0.01, 'eval/AP50': 0.02},
        {'step': 3, 'train/images_per_second': 50.0},
        {'step': 4, 'eval/AP': ap, 'eval/AP50': 2 * ap},
    ]
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (workdir / sweeps.AT_THE_END).touch()


class Starts:
    """Starts runs that finish at once, but for row b's with seed 1, which fails."""

    def __init__(self):
        self.commands = []

    def __call__(self, command):
        self.commands.append(command)
        workdir = Path(next(a for a in command if a.startswith('--workdir=')).removeprefix('--workdir='))
        if workdir.parts[-2:] == ('b', 'seed_1'):
            return 1
        finish(workdir, 0.25 + 0.5 * (workdir.name == 'seed_1'))
        return 0


def test_a_sweep_runs_what_is_unfinished_and_writes_tables(tmp_path):
    arguments = [str(tmp_path), '--config=configs/d0.py:shapes', '--seeds=2', '--config.train.epochs=3']
    finish(tmp_path / 'a' / 'seed_0', 0.25)
    assert sweeps.main(ROWS, '', arguments, start := Starts()) == 1
    assert [command[3:] for command in start.commands] == [
        ['--config=configs/d0.py:shapes', f'--workdir={tmp_path / label / f"seed_{seed}"}', f'--config.seed={seed}',
         '--config.train.epochs=3', f'--config.model.fpn_cells={cells}']
        for label, seed, cells in (('b', 0, 2), ('a', 1, 1), ('b', 1, 2))
    ]  # fmt: skip
    with (tmp_path / 'table.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [(row['AP'], row['runs'], row['size'], row['paper']) for row in rows] == [
        ('0.5', '2', '7', ''), ('0.25', '1', '', '0.5')
    ]  # fmt: skip
    assert float(rows[0]['AP spread']) == pytest.approx(0.5 / 2**0.5)  # sample standard deviation of 0.25 and 0.75
    assert rows[1]['AP spread'] == ''
    assert rows[0]['images/s'] == '40.0'
    assert '| a ' in (tmp_path / 'table.md').read_text()
    assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_a_sweep_without_any_run_still_has_a_table(tmp_path):
    assert sweeps.main(ROWS, '', [str(tmp_path), '--config=x', '--only-table'], start := Starts()) == 1
    assert start.commands == []
    assert (tmp_path / 'table.md').exists()


def test_mean_and_spread():
    assert sweeps.mean_and_spread([]) == (None, None)
    assert sweeps.mean_and_spread([0.5]) == (0.5, None)
    assert sweeps.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
