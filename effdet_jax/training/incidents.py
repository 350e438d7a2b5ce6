"""Metrics of steps: means for the log, and incidents that a mean would hide (skipped steps, spikes of the loss)."""

import collections
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from effdet_jax import data
from effdet_jax.errors import UserError
from effdet_jax.records.console import warn
from effdet_jax.records.metrics import MetricsLog
from effdet_jax.runtime import devices

WINDOW, ENOUGH = 200, 20  # a loss is compared with at most, and at least, so many earlier ones
TIMES_MEDIAN = 2.0
TIMES_SPREAD = 10.0


Row = tuple[int, dict[str, float], np.ndarray]  # step, its metrics, indices of this host's images


def fetch(pending: list[tuple[int, dict[str, jax.Array], np.ndarray]]) -> list[Row]:
    """Fetches the metrics of steps; all devices hold the same values."""
    return [
        (step, {name: float(value.flat[0]) for name, value in values.items()}, index_B)
        for step, values, index_B in jax.device_get(pending)
    ]


def means_of_steps(rows: list[Row]) -> dict[str, float]:
    """The means over the steps that were not skipped, and the number of skipped ones."""
    done = [values for _, values, _ in rows if not values['skipped_steps']]
    means = {name: float(np.mean([values[name] for values in done])) if done else math.nan for name in rows[0][1]}
    return means | {'skipped_steps': len(rows) - len(done)}


def make_watch(source: data.Source, workdir: Path, max_skipped: int) -> Callable[[list[Row], MetricsLog], None]:
    """Returns `watch(rows, log)`, which logs incidents with their images on all hosts. It must see every step.

    It raises UserError after `max_skipped` skipped steps in a row.
    """
    incidents, path = Incidents(), workdir / 'incidents.jsonl'

    def describe(index: int) -> dict[str, Any]:
        image = source.annotations(index)
        return {'index': index, 'id': image.image_id, 'file': image.file_name}

    def watch(rows: list[Row], log: MetricsLog) -> None:
        for step, values, index_B in rows:
            if incident := incidents.see(step, values):
                # All hosts see the same numbers, so all of them arrive here.
                indices = [int(index) for part in devices.gather_objects(index_B) for index in part]
                log.incident(step, incident.as_json() | {'images': [describe(index) for index in indices]})
                skipped = incident.kind == 'skipped'
                effect = 'the step is skipped' if skipped else f'the median was {incident.usual_loss:.4g}'
                warn(
                    f'step {step}: loss {values["loss"]:.4g}, gradient norm {values["gradient_norm"]:.4g}, '
                    f'{effect}; its images are in {path}'
                )
            if incidents.skipped_in_a_row >= max_skipped:
                raise UserError(
                    f'{max_skipped} steps in a row, up to step {step}, had no finite loss and gradient; {path} names '
                    'their images. If the images are fine, lower config.schedule.learning_rate or set '
                    'config.model.dtype=float32, in another --workdir'
                )

    return watch


class Incident(NamedTuple):
    """kind: 'skipped' or 'spike'. usual_loss: the median of the losses before it, nan if there are too few."""

    step: int
    kind: str
    values: Mapping[str, float]
    usual_loss: float

    def as_json(self) -> dict[str, Any]:
        """Numbers that JSON lacks become the strings 'nan', 'inf' and '-inf'."""
        numbers = {'usual_loss': self.usual_loss, **self.values}
        return {'kind': self.kind} | {
            name: value if math.isfinite(value) else str(value) for name, value in numbers.items()
        }


class Incidents:
    """Detects skipped steps and spikes of the loss.

    A loss is a spike if it is more than twice the median of the last 200 finite losses, and lies more than 10 spreads
    above it. The spread is 1.4826 times the median distance from the median, which for normal noise is one standard
    deviation. A few earlier spikes move neither. The first 20 steps after a start only fill the window.
    """

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self._losses = collections.deque[float](maxlen=WINDOW)

    def see(self, step: int, values: Mapping[str, float]) -> Incident | None:
        """Must be called for every step in order. `values` holds at least `loss` and `skipped_steps`."""
        enough = len(self._losses) >= ENOUGH
        median = statistics.median(self._losses) if enough else math.nan
        if values['skipped_steps']:
            self.skipped_in_a_row += 1
            return Incident(step, 'skipped', values, median)
        self.skipped_in_a_row = 0
        loss = values['loss']
        spread = 1.4826 * statistics.median(abs(x - median) for x in self._losses) if enough else math.nan
        self._losses.append(loss)
        is_spike = loss > max(TIMES_MEDIAN * median, median + TIMES_SPREAD * spread)  # False for nan
        return Incident(step, 'spike', values, median) if is_spike else None
