"""Everything that is printed: messages, progress bars, tables.

`info` says what a command is doing, `result` prints its result, and `warn` warns. --quiet silences only `info`.
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
SECONDS_OF_SPEED = 120.0  # the time left is estimated from the last two minutes

terminal = Console()  # the only one: rich can nest bars and print above them only within one console
quiet = False  # the flag --quiet: no bars and no `info`


class Progress:
    """Shows the progress of long work: a bar in a terminal, otherwise a line at most every ten seconds and at the end.

        with Progress(total, start, description='training') as progress:
            for step in range(start + 1, total + 1):
                progress.update(step, {'loss': 0.43, 'images/s': 85.0, 'waiting': 0.03})

    Can be nested: an evaluation within a training. Respects NO_COLOR.
    """

    def __init__(
        self, total: int, start: int = 0, unit: str = 'step', description: str = '', keep: bool = True
    ) -> None:
        """`total` and `start` count `unit`s. `keep`: the finished bar stays on the screen."""
        count = f'{unit} {{task.completed}}/{{task.total}}'.strip()
        # rich counts and estimates the time left in both modes; without a terminal we never start its display.
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
        """Sets how much is completed. Cheap enough for every step; `values` are shown until the next ones."""
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
    """Yields the items and shows how many are done."""
    with Progress(total, unit='', description=description, keep=False) as progress:
        for count, item in enumerate(items, start=1):
            yield item
            progress.update(count)


@contextlib.contextmanager
def stage(description: str) -> Iterator[None]:
    """Shows a spinner beside `description` in a terminal, and at the end a line with the time it took."""
    start = perf_counter()
    with terminal.status(description) if _has_terminal() else contextlib.nullcontext():
        yield
    info(f'{description}: {perf_counter() - start:.0f} s')


def info(line: str) -> None:
    """Prints what a command is doing, above the progress bar if there is one. Silent with --quiet."""
    if not quiet:
        result(line)


def warn(line: str) -> None:
    """Prints a warning, even with --quiet."""
    result(f'WARNING: {line}')


def result(line: str) -> None:
    """Prints the result of a command, even with --quiet."""
    with contextlib.suppress(OSError):  # output to a full disk or a closed terminal must not end a run
        terminal.out(line, highlight=False)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = '') -> str:
    """A Markdown table, for the terminal (`info(table(...))`) and for README files.

    Floats get three decimals (pass a string for another format), integers thousands separators, None and NaN a dash.
    Columns of numbers are right-aligned.
    """
    rows = [list(row) for row in rows]
    grid = Table(box=rich.box.MARKDOWN)
    for column, name in enumerate(header):
        is_text = any(isinstance(row[column], str) for row in rows)
        grid.add_column(Text(name), justify='left' if is_text else 'right')
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(grid)
    lines = [line.strip() for line in text.getvalue().strip().splitlines()]
    return '\n'.join([title, *lines] if title else lines)


def _has_terminal() -> bool:
    """Whether bars can be drawn. With FORCE_COLOR rich would take a pipe for a terminal, hence isatty."""
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
