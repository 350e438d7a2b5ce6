"""One self-contained HTML page: a Jinja template filled with numbers, charts and pictures. It loads nothing else."""

import base64
import math
from collections.abc import Mapping
from typing import Any

import cv2
import jinja2
import numpy as np
from jaxtyping import UInt8

JPEG_QUALITY = 82


def render(content: Mapping[str, Any]) -> str:
    """The page. `content` has every name used in `templates/report.html.jinja`. All text is escaped; charts are not.

    Raises:
        jinja2.UndefinedError: if a name is missing from `content`.
    """
    loader = jinja2.PackageLoader('effdet_jax.records', 'templates')
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {'number': _number, 'count': _count, 'share': _share}
    return environment.get_template('report.html.jinja').render(content)


def jpeg_data_uri(rgb: UInt8[np.ndarray, 'H W 3']) -> str:
    """An RGB picture as the `src` of an `<img>`."""
    _, content = cv2.imencode('.jpg', cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return 'data:image/jpeg;base64,' + base64.b64encode(content.tobytes()).decode()


def _number(value: float | None, digits: int = 3) -> str:
    return '–' if value is None or math.isnan(value) else f'{value:.{digits}f}'  # noqa: RUF001, a dash for readers


def _count(value: int) -> str:
    return f'{value:,}'.replace(',', '\N{NARROW NO-BREAK SPACE}')


def _share(value: float | None) -> str:
    """A number in [0, 1] for CSS."""
    return '0' if value is None or math.isnan(value) else f'{min(max(value, 0.0), 1.0):.4f}'
