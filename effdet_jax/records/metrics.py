"""The metrics of a run: metrics.jsonl, TensorBoard and, optionally, Weights & Biases."""

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
    """Writes the metrics of a run to `metrics.jsonl` (one JSON object a line, `step` first) and to `tensorboard/`.

    When a run continues from `resume_step`, later entries of the previous session are removed, so every step is logged
    once. NaN and infinity become null in the file, because JSON has no NaN, and are left out of TensorBoard.
    A full disk does not end the run: a warning is printed, and the missing entries are written once there is space.
    If `mirror` fails, a warning is printed and the mirror is dropped.
    """

    def __init__(self, workdir: Path, resume_step: int = 0, mirror: WandbRun | None = None) -> None:
        self._workdir = workdir
        for name in ('metrics.jsonl', 'incidents.jsonl'):
            _remove_after(workdir / name, resume_step)
        self._lines, self._incidents = Appender(workdir / 'metrics.jsonl'), Appender(workdir / 'incidents.jsonl')
        self._board = Board(workdir / 'tensorboard', resume_step)
        self._mirror = mirror
        self._failing = False

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Logs the metrics of a step, by names such as `train/loss`, `train/images_per_second`, `eval/AP`."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._warn(self._lines.append(_json_line({'step': step, **{name: finite.get(name) for name in values}})))
        self._warn(self._board.scalars(step, finite))
        self._send('scalars', step, finite)

    def incident(self, step: int, incident: Mapping[str, Any]) -> None:
        """Adds a line to `incidents.jsonl`; the first incident creates the file. Values must be JSON types."""
        self._warn(self._incidents.append(_json_line({'step': step, **incident})))

    def pictures(self, step: int, pictures: Mapping[str, UInt8[np.ndarray, '_ _ 3']]) -> None:
        """Logs RGB pictures to TensorBoard and as `pictures/<step>/<name>.png`."""
        for name, rgb in pictures.items():
            try:
                write_image(self._workdir / 'pictures' / f'{step:08d}' / f'{name}.png', rgb)
            except OSError as error:
                self._warn(error)
            self._warn(self._board.picture(step, name, rgb))
            self._send('picture', step, name, rgb)

    def hyper_parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Logs one column for each hyperparameter and one for the last value of each of `metrics`, to compare runs."""
        self._warn(self._board.hyper_parameters(values, metrics))
        self._send('hyper_parameters', values)

    def text(self, name: str, text: str) -> None:
        """Logs Markdown, such as the config, to TensorBoard."""
        self._warn(self._board.text(name, text))

    def sync(self) -> None:
        """Returns once everything is on the disk. Call it before a checkpoint, so that the log is never behind."""
        for file in (self._lines, self._incidents, self._board):
            file.sync()

    def _warn(self, error: OSError | None) -> None:
        """Warns once per failure, not for every entry."""
        if error and not self._failing:
            warn(
                f'the log in {self._workdir} cannot be written ({error.strerror}): training goes on, and the missing '
                'entries are written once there is space'
            )
        self._failing = error is not None

    def _send(self, method: str, *arguments: Any) -> None:
        try:
            if self._mirror:
                getattr(self._mirror, method)(*arguments)
        except Exception as error:  # third-party code can raise anything
            self._mirror = None
            warn(f'logging to Weights & Biases failed and is off for this run ({error}): training goes on')

    def close(self) -> None:
        for file in (self._lines, self._incidents, self._board):
            file.close()
        self._send('close')

    def __enter__(self) -> 'MetricsLog':
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` in order, null as NaN, without a last line that a crash has cut off.

    Raises:
        UserError: for a line that is not a JSON object with a step.
    """
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in _rows(path)]


def _json_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + '\n').encode()


def _remove_after(path: Path, step: int) -> None:
    if path.exists():
        write_atomically(path, b''.join(_json_line(row) for row in _rows(path) if row['step'] <= step))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding='utf-8', errors='replace').split('\n')  # a line without \n is incomplete
    return [_row(line, f'{path}: line {number}') for number, line in enumerate(lines, start=1)]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
        raise UserError(f'{where} is not a JSON object with a step: remove that line')
    return row
