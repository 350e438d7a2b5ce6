"""What a run says while it works: numbers into files, progress and tables onto the terminal."""

import contextlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, SupportsFloat, TypeVar

import numpy as np
import rich.box
import rich.progress
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effdet_jax.errors import UserError
from effdet_jax.records.board import Board
from effdet_jax.records.files import Appender, write_atomically
from effdet_jax.records.pictures import write_image
from effdet_jax.records.wandb_run import WandbRun

Item = TypeVar('Item')

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_SPEED = 120.0  # the time left follows the speed of the last two minutes

console = Console()  # the only one: rich stacks nested bars, and prints above them, per console
quiet = False  # cli's --quiet: neither bars nor what `say` says


class MetricsLog:
    """The numbers of a run in `metrics.jsonl` (one JSON object a line, `step` first) and TensorBoard's `tensorboard/`.

    A run that continues from `resume_step` first forgets what an earlier one wrote after that step, so that every step
    stands once. A number that is not finite is null in the file, for JSON knows no nan, and left out of TensorBoard.
    A disk that takes nothing ends no run: a warning is printed, and what it refused is written when it takes again.
    What fails in `mirror` ends no run either: a warning is printed, and it gets no more.
    """

    def __init__(self, workdir: Path, resume_step: int = 0, mirror: WandbRun | None = None) -> None:
        self._workdir = workdir
        for name in ('metrics.jsonl', 'incidents.jsonl'):
            _forget_after(workdir / name, resume_step)
        self._lines, self._incidents = Appender(workdir / 'metrics.jsonl'), Appender(workdir / 'incidents.jsonl')
        self._board = Board(workdir / 'tensorboard', resume_step)
        self._mirror = mirror
        self._refused = False

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """One line; names such as `train/loss`, `train/images_per_second`, `eval/AP`."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._warn(self._lines.append(_line_of({'step': step, **{name: finite.get(name) for name in values}})))
        self._warn(self._board.scalars(step, finite))
        self._reflect('scalars', step, finite)

    def incident(self, step: int, incident: Mapping[str, Any]) -> None:
        """One line in `incidents.jsonl`, which exists only where there was one; `incident` is fit for JSON."""
        self._warn(self._incidents.append(_line_of({'step': step, **incident})))

    def pictures(self, step: int, pictures: Mapping[str, UInt8[np.ndarray, '_ _ 3']]) -> None:
        """RGB pictures, into TensorBoard and as `pictures/<step>/<name>.png`."""
        for name, rgb in pictures.items():
            try:
                write_image(self._workdir / 'pictures' / f'{step:08d}' / f'{name}.png', rgb)
            except OSError as error:
                self._warn(error)
            self._warn(self._board.picture(step, name, rgb))
            self._reflect('picture', step, name, rgb)

    def hyper_parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """What the run is to be compared by: a column each, and one for the last value of each of `metrics`."""
        self._warn(self._board.hyper_parameters(values, metrics))
        self._reflect('hyper_parameters', values)

    def text(self, name: str, text: str) -> None:
        """Markdown in TensorBoard, such as the config."""
        self._warn(self._board.text(name, text))

    def sync(self) -> None:
        """Returns once the disk has all that was written; before a checkpoint, which promises the steps up to it."""
        for file in (self._lines, self._incidents, self._board):
            file.sync()

    def _warn(self, error: OSError | None) -> None:
        """Says so once, until the disk takes something again."""
        if error and not self._refused:
            warn(
                f'{self._workdir} takes no log ({error.strerror}): training goes on, and what is missing is '
                'written as soon as there is room'
            )
        self._refused = error is not None

    def _reflect(self, method: str, *arguments: Any) -> None:
        try:
            if self._mirror:
                getattr(self._mirror, method)(*arguments)
        except Exception as error:  # whatever another's code raises
            self._mirror = None
            warn(f'Weights & Biases gets no more of this run ({error}): training goes on')

    def close(self) -> None:
        for file in (self._lines, self._incidents, self._board):
            file.close()
        self._reflect('close')

    def __enter__(self) -> 'MetricsLog':
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` in order, null as nan, without a last line that a crash has torn.

    Raises:
        UserError: a line that MetricsLog cannot have written.
    """
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in _rows(path)]


def _line_of(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + '\n').encode()


def _forget_after(path: Path, step: int) -> None:
    if path.exists():
        write_atomically(path, b''.join(_line_of(row) for row in _rows(path) if row['step'] <= step))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding='utf-8', errors='replace').split('\n')  # what follows the last \n is torn
    return [_row(line, f'{path}: line {number}') for number, line in enumerate(lines, start=1)]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
        raise UserError(f'{where} is not a JSON object with a step; remove that line')
    return row


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
            console=console,
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
            say(_line(task, self._unit))

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
    with console.status(description) if _has_terminal() else contextlib.nullcontext():
        yield
    say(f'{description}: {perf_counter() - start:.0f} s')


def say(line: str) -> None:
    """Prints what a command is doing, above the bar where there is one. Not with --quiet."""
    if not quiet:
        answer(line)


def warn(line: str) -> None:
    """Prints what must not be missed, also with --quiet."""
    answer(f'WARNING: {line}')


def answer(line: str) -> None:
    """Prints what the command was asked for, also with --quiet."""
    with contextlib.suppress(OSError):  # a full disk that takes the output, a terminal that is gone: no reason to end
        console.out(line, highlight=False)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = '') -> str:
    """A Markdown table, fit for the terminal (`say(table(...))`) and for the README of an experiment.

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


class Waiting:
    """A stopwatch for a training loop: its rate, and the share spent waiting, `with waiting: batch = next(batches)`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._start, self._waited, self._count = perf_counter(), 0.0, 0

    def count(self, things: int) -> None:
        """That so many things are done."""
        self._count += things

    def elapsed(self) -> float:
        """Seconds since the last reset."""
        return perf_counter() - self._start

    def share(self) -> float:
        """The share of the time since the last reset that was spent in the `with` block, in [0, 1]."""
        return self._waited / max(self.elapsed(), 1e-9)

    def per_second(self) -> float:
        """Things counted per second since the last reset."""
        return self._count / max(self.elapsed(), 1e-9)

    def __enter__(self) -> None:
        self._entered = perf_counter()

    def __exit__(self, *_) -> None:
        self._waited += perf_counter() - self._entered


def _has_terminal() -> bool:
    """Whether something that moves may be drawn. FORCE_COLOR makes no pipe a terminal."""
    return console.is_interactive and console.file.isatty() and not quiet


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
