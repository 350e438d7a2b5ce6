"""The numbers of a run: metrics.jsonl, TensorBoard and, where asked for, Weights & Biases."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import UInt8

from effdet_jax.errors import UserError
from effdet_jax.records.board import Board
from effdet_jax.records.console import warn
from effdet_jax.records.files import Appender, write_atomically
from effdet_jax.records.pictures import write_image
from effdet_jax.records.wandb_run import WandbRun


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
