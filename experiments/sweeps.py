"""A sweep: one training per row of a table and seed, then a table and a plot of them all.

Every run is the public command in a process of its own, in OUT/LABEL/seed_N. Start the sweep again and it goes on:
finished runs are only read, others continue where they were. One that fails is named, and does not stop the others.
"""

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from effdet_jax.records.console import info, table
from effdet_jax.records.files import replacing, write_atomically
from effdet_jax.records.metrics import read_metrics

METRICS = ('AP', 'AP50')
NARROWEST = 0.05  # AP that the plot's axis spans at least: less is no difference, and is not to look like one
AT_THE_END = 'report.html'  # what a run writes last


class Row(NamedTuple):
    """One setting: what it is called, how its config differs, and what else is known of it, {column: value}."""

    label: str
    overrides: Mapping[str, Any]
    facts: Mapping[str, Any] = {}


def main(
    rows: Sequence[Row],
    description: str,
    arguments: Sequence[str] | None = None,
    start: Callable[[list[str]], int] = subprocess.call,
) -> int:
    """Parses OUT and the flags, trains, writes. Returns the exit code: 0 where all runs are finished.

    `start` runs a command and returns its exit code.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog='Other flags, such as --config.train.epochs=10, go to every run.'
    )
    parser.add_argument('out', type=Path, help='folder for the runs, table.md, table.csv and plot.png')
    parser.add_argument('--config', required=True, help='FILE or FILE:PRESET, common to all runs')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each row, with the seeds 0, 1, ...')
    parser.add_argument('--only-table', action='store_true', help='train nothing: tables of what there is')
    flags, common = parser.parse_known_args(arguments)
    workdirs = {row.label: [flags.out / row.label / f'seed_{seed}' for seed in range(flags.seeds)] for row in rows}
    if not flags.only_table:
        train(rows, workdirs, flags.config, common, start)
    write(flags.out, rows, {label: [result(d) for d in ds if is_finished(d)] for label, ds in workdirs.items()})
    return 0 if all(is_finished(workdir) for ds in workdirs.values() for workdir in ds) else 1


def train(
    rows: Sequence[Row],
    workdirs: Mapping[str, Sequence[Path]],
    config: str,
    common: Sequence[str],
    start: Callable[[list[str]], int],
) -> None:
    """Runs what is not finished, all rows with one seed before any with the next: an early end still compares."""
    for seed, column in enumerate(zip(*(workdirs[row.label] for row in rows), strict=True)):
        for row, workdir in zip(rows, column, strict=True):
            if is_finished(workdir):
                info(f'{workdir}: finished')
                continue
            overrides = [f'--config.{key}={value}' for key, value in row.overrides.items()]
            command = [
                sys.executable, '-m', 'effdet_jax.main', f'--config={config}', f'--workdir={workdir}',
                f'--config.seed={seed}', *common, *overrides,
            ]  # fmt: skip
            info(shlex.join(command))
            if code := start(command):
                info(f'{workdir}: failed with exit code {code}')


def is_finished(workdir: Path) -> bool:
    """Whether the training came to its end."""
    return (workdir / AT_THE_END).is_file()


def result(workdir: Path) -> dict[str, float]:
    """The last evaluation, and the median of the images a second while training, of a finished run."""
    lines = read_metrics(workdir / 'metrics.jsonl')
    last = [line for line in lines if 'eval/AP' in line][-1]
    speeds = [line['train/images_per_second'] for line in lines if 'train/images_per_second' in line]
    return {name: last[f'eval/{name}'] for name in METRICS} | {'images/s': statistics.median(speeds)}


def write(out: Path, rows: Sequence[Row], results: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """table.md, table.csv and plot.png: means over finished seeds; the spread is the sample's standard deviation."""
    columns = [*dict.fromkeys(name for row in rows for name in row.facts)]
    header = ('', *columns, 'runs', *(f'{name}{what}' for name in METRICS for what in ('', ' spread')), 'images/s')
    cells = []
    for row in rows:
        runs = results[row.label]
        numbers = [number for name in METRICS for number in mean_and_spread([run[name] for run in runs])]
        speed = statistics.median([run['images/s'] for run in runs]) if runs else None
        cells.append((row.label, *(row.facts.get(name) for name in columns), len(runs), *numbers, speed))
    text = table(header, cells)
    info(text)
    write_atomically(out / 'table.md', f'{text}\n'.encode())
    with replacing(out / 'table.csv') as temporary, temporary.open('w', newline='') as file:
        csv.writer(file).writerows([header, *cells])
    _plot(out / 'plot.png', rows, results)


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """None where there are too few values."""
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def _plot(path: Path, rows: Sequence[Row], results: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Every run a dot, every row's mean a line."""
    figure = Figure(figsize=(7, 0.9 + 0.4 * len(rows)), layout='constrained')
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        values = [run['AP'] for run in results[row.label]]
        axes.plot(values, [y] * len(values), 'o', color='#0072b2', alpha=0.6, markersize=6)
        if values:
            axes.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color='#d55e00', linewidth=2)
    axes.set(
        xlabel='AP', yticks=range(len(rows)), yticklabels=[row.label for row in rows], ylim=(len(rows) - 0.5, -0.5)
    )
    low, high = axes.get_xlim()
    missing = max(0.0, NARROWEST - (high - low)) / 2
    axes.set_xlim(low - missing, high + missing)
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
