"""The metrics of steps: a line of the log, and what that line would hide, losses that are not finite or that jump."""

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

WINDOW, ENOUGH = 200, 20  # losses that the next one is compared with: at most, at least
TIMES_MEDIAN = 2.0
TIMES_SPREAD = 10.0


Row = tuple[int, dict[str, float], np.ndarray]  # step, its metrics, indices of this host's images


def fetch(pending: list[tuple[int, dict[str, jax.Array], np.ndarray]]) -> list[Row]:
    """The metrics of steps, from the devices, which all have the same."""
    return [
        (step, {name: float(value.flat[0]) for name, value in values.items()}, index_B)
        for step, values, index_B in jax.device_get(pending)
    ]


def means_of_steps(rows: list[Row]) -> dict[str, float]:
    """Over the steps that were not skipped, and how many were."""
    done = [values for _, values, _ in rows if not values['skipped_steps']]
    means = {name: float(np.mean([values[name] for values in done])) if done else math.nan for name in rows[0][1]}
    return means | {'skipped_steps': len(rows) - len(done)}


def make_watch(source: data.Source, workdir: Path, max_skipped: int) -> Callable[[list[Row], MetricsLog], None]:
    """`watch(rows, log)` writes down incidents with their images on all hosts. To be given every step, in order.

    It raises UserError where `max_skipped` steps in a row were skipped.
    """
    incidents, path = Incidents(), workdir / 'incidents.jsonl'

    def describe(index: int) -> dict[str, Any]:
        image = source.annotations(index)
        return {'index': index, 'id': image.image_id, 'file': image.file_name}

    def watch(rows: list[Row], log: MetricsLog) -> None:
        for step, values, index_B in rows:
            if incident := incidents.see(step, values):
                # Every host has seen the same numbers, so all of them come by here.
                indices = [int(index) for part in devices.gather_objects(index_B) for index in part]
                log.incident(step, incident.as_json() | {'images': [describe(index) for index in indices]})
                skipped = incident.kind == 'skipped'
                effect = 'the step is skipped' if skipped else f'{incident.usual_loss:.4g} was usual'
                warn(
                    f'step {step}: loss {values["loss"]:.4g}, gradient norm {values["gradient_norm"]:.4g}, '
                    f'{effect}; its images are in {path}'
                )
            if incidents.skipped_in_a_row >= max_skipped:
                raise UserError(
                    f'{max_skipped} steps in a row, up to step {step}, had no finite loss and gradient; {path} names '
                    'their images. Where those are in order, lower config.schedule.learning_rate or compute with '
                    'config.model.dtype=float32, in another --workdir'
                )

    return watch


class Incident(NamedTuple):
    """kind: 'skipped' or 'spike'. usual_loss: the median of the steps before it, nan where there are too few."""

    step: int
    kind: str
    values: Mapping[str, float]
    usual_loss: float

    def as_json(self) -> dict[str, Any]:
        """JSON has no nan and no infinity, and here it matters which: they are the strings 'nan', 'inf', '-inf'."""
        numbers = {'usual_loss': self.usual_loss, **self.values}
        return {'kind': self.kind} | {
            name: value if math.isfinite(value) else str(value) for name, value in numbers.items()
        }


class Incidents:
    """Watches the values of single steps.

    A loss is a spike where it is more than twice the median of the last 200 finite losses, and further above it than
    10 times their spread (1.4826 times the median distance from the median, which for normal noise is one standard
    deviation). Neither is moved by a few earlier spikes. The first 20 steps after a start only fill the window.
    """

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self._losses = collections.deque[float](maxlen=WINDOW)

    def see(self, step: int, values: Mapping[str, float]) -> Incident | None:
        """To be called for every step in order; `values` hold at least `loss` and `skipped_steps`."""
        enough = len(self._losses) >= ENOUGH
        median = statistics.median(self._losses) if enough else math.nan
        if values['skipped_steps']:
            self.skipped_in_a_row += 1
            return Incident(step, 'skipped', values, median)
        self.skipped_in_a_row = 0
        loss = values['loss']
        spread = 1.4826 * statistics.median(abs(x - median) for x in self._losses) if enough else math.nan
        self._losses.append(loss)
        is_spike = loss > max(TIMES_MEDIAN * median, median + TIMES_SPREAD * spread)  # nan: is not
        return Incident(step, 'spike', values, median) if is_spike else None
