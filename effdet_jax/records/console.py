"""Everything that is printed: messages, progress bars, tables.

`info` tells what a command is doing and is silenced by --quiet; `result` is what it was asked for; `warn` must not be
missed.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from time import monotonic, perf_counter
from typing import Any, SupportsFloat, TypeVar

import numpy as np
import rich.box
import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

Item = TypeVar('Item')

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_SPEED = 120.0  # the time left follows the speed of the last two minutes

terminal = Console()  # the only one: rich stacks nested bars, and prints above them, per console
quiet = False  # the flag --quiet: neither bars nor `info`


class Progress:
    """The progress of long work: a bar in a terminal, elsewhere a line at most every ten seconds and one at the end.

        with Progress(total, start, description='training') as progress:
            for step in range(start + 1, total + 1):
                progress.update(step, {'loss': 0.43, 'images/s': 85.0, 'waiting': 0.03})

    May be nested, an evaluation inside of a training. Respects NO_COLOR.
    """

    def __init__(
        self, total: int, start: int = 0, unit: str = 'step', description: str = '', keep: bool = True
    ) -> None:
        """`total` and `start` are counted in `unit`s; `keep`: whether the finished bar stays on the screen."""
        count = f'{unit} {{task.completed}}/{{task.total}}'.strip()
        # rich counts and estimates the time left in both modes; without a terminal its display is just never started.
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn('{task.description}', markup=False),
            rich.progress.TextColumn(count, markup=False),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn('{task.fields[values]}', markup=False),
            rich.progress.TimeRemainingColumn(),
            console=terminal,
            speed_estimate_period=SECONDS_OF_SPEED,
            refresh_per_second=4,
            transient=not keep,
        )
        self._bar.add_task(description, total=total, completed=start, values='')
        self._unit = unit
        self._has_terminal = _has_terminal()
        self._next_line = monotonic() + SECONDS_BETWEEN_LINES

    def update(self, completed: int, values: Mapping[str, SupportsFloat] | None = None) -> None:
        """Says how far the work is. Cheap, so call it every step; `values` stay until the next ones."""
        task = self._bar.tasks[0]
        shown = task.fields['values'] if values is None else '  '.join(map(_shown, values, values.values()))
        self._bar.update(task.id, completed=completed, values=shown)
        if not self._has_terminal and (task.finished or monotonic() >= self._next_line):
            self._next_line = monotonic() + SECONDS_BETWEEN_LINES
            info(_line(task, self._unit))

    def __enter__(self) -> 'Progress':
        if self._has_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._has_terminal:
            self._bar.stop()


def track(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Passes the items on and shows how many of them are done, for loops such as evaluation and prediction."""
    with Progress(total, unit='', description=description, keep=False) as progress:
        for count, item in enumerate(items, start=1):
            yield item
            progress.update(count)


@contextlib.contextmanager
def stage(description: str) -> Iterator[None]:
    """A spinner beside `description` on a terminal; when it is done, a line that says how long it took."""
    start = perf_counter()
    with terminal.status(description) if _has_terminal() else contextlib.nullcontext():
        yield
    info(f'{description}: {perf_counter() - start:.0f} s')


def info(line: str) -> None:
    """Prints what a command is doing, above the bar where there is one. Not with --quiet."""
    if not quiet:
        result(line)


def warn(line: str) -> None:
    """Prints what must not be missed, also with --quiet."""
    result(f'WARNING: {line}')


def result(line: str) -> None:
    """Prints what the command was asked for, also with --quiet."""
    with contextlib.suppress(OSError):  # a full disk that takes the output, a terminal that is gone: no reason to end
        terminal.out(line, highlight=False)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = '') -> str:
    """A Markdown table, fit for the terminal (`info(table(...))`) and for the README of an experiment.

    Floats get three decimals (format them yourself for others), whole numbers thousands separators, None and nan a
    dash; columns of numbers are set flush right.
    """
    rows = [list(row) for row in rows]
    grid = Table(box=rich.box.MARKDOWN)
    for column, name in enumerate(header):
        is_text = any(isinstance(row[column], str) for row in rows)
        grid.add_column(Text(name), justify='left' if is_text else 'right')
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    paper = io.StringIO()
    Console(file=paper, width=10_000, color_system=None).print(grid)
    lines = [line.strip() for line in paper.getvalue().strip().splitlines()]
    return '\n'.join([title, *lines] if title else lines)


def _has_terminal() -> bool:
    """Whether something that moves may be drawn. FORCE_COLOR makes no pipe a terminal."""
    return terminal.is_interactive and terminal.file.isatty() and not quiet


def _line(task: rich.progress.Task, unit: str) -> str:
    if task.finished:
        time = f'took {_duration(task.elapsed)}'
    else:
        time = f'{_duration(task.time_remaining)} left' if task.time_remaining is not None else ''
    count = f'{unit} {task.completed}/{task.total}'.strip()
    return '  '.join(part for part in (task.description, count, task.fields['values'], time) if part)


def _shown(name: str, value: SupportsFloat) -> str:
    return f'{name} {float(value):.0%}' if name == 'waiting' else f'{name} {float(value):.4g}'


def _duration(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds or 0)))


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return '-' if np.isnan(value) else f'{value:.3f}'
    if value is None:
        return '-'
    return f'{value:,}' if isinstance(value, int) else str(value)
