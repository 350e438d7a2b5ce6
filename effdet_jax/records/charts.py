"""Charts as inline SVG, drawn by matplotlib and coloured by CSS variables, so one chart fits light and dark themes.

The placeholder colours below are replaced by `var(--ink)`, `var(--series-0)`, ... of templates/report.css.
Text stays text, in the font of the page. A chart is 360 units wide, about the width of a phone in CSS pixels.
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, RULE, FAINT = '#010101', '#010102', '#010103', '#010104'
SERIES = tuple(f'#0102{index:02x}' for index in range(7))  # the classes' colours, in the order of pictures.PALETTE
_VARIABLES = {INK: 'ink', MUTED: 'muted', RULE: 'rule', FAINT: 'faint'} | {
    color: f'series-{index}' for index, color in enumerate(SERIES)
}

WIDTH, HEIGHT = 360, 250  # points, which are the units of the SVG
FONT_SIZE = 11
FEW_POINTS, MAX_POINTS = 12, 400  # lines with few points get markers; more points than the maximum are averaged
_STYLE: dict[Any, Any] = {
    'svg.fonttype': 'none',
    'text.parse_math': False,  # a class may be called $
    'font.family': 'sans-serif',
    'font.size': FONT_SIZE,
    'axes.edgecolor': MUTED,
    'axes.labelcolor': MUTED,
    'axes.linewidth': 0.8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': RULE,
    'grid.linewidth': 0.6,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'xtick.major.size': 3,
    'ytick.major.size': 0,
    'text.color': INK,
    'legend.frameon': False,
    'legend.handlelength': 1.2,
    'legend.labelspacing': 0.25,
    'lines.solid_capstyle': 'round',
}


class Line(NamedTuple):
    """One line of a chart. NaN in `y` leaves a gap; a line without a name gets no label."""

    name: str
    x: Float[np.ndarray, 'P'] | Int[np.ndarray, 'P']
    y: Float[np.ndarray, 'P']
    color: str = SERIES[5]
    width: float = 1.8


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_range: tuple[float, float | None] = (0, None),
    y_range: tuple[float, float | None] = (0, None),
    legend: Literal['', 'best', 'lower left'] = '',
    mark_x: float | None = None,
) -> Markup:
    """A line chart as `<svg>`.

    Args:
        name: prefix of the ids in the SVG, unique within the page.
        x_range, y_range: limits of the axes; None: up to the end of the lines.
        legend: where to put a legend; without one, names are written at the ends of the lines.
        mark_x: where to draw a dotted vertical line.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout='constrained')
        axes = figure.add_subplot()
        for line in lines:
            x, y = _thinned(np.asarray(line.x, float), np.asarray(line.y, float))
            marker = 'o' if len(x) <= FEW_POINTS else None
            axes.plot(
                x, y, color=line.color, linewidth=line.width, label=line.name or '_', marker=marker, markersize=3.5
            )
        if mark_x is not None:
            axes.axvline(mark_x, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.margins(x=0)
        axes.set(xlabel=x_label, xlim=x_range, ylim=y_range)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=x_range[1] is None))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        named = [line for line in lines if line.name and np.isfinite(line.y).any()]
        if legend and named:
            axes.legend(loc=legend)
        else:
            _name_at_the_ends(axes, named)
        return _svg(figure, name)


def calibration_chart(
    name: str,
    edges: Float[np.ndarray, 'edges'],
    counts: Int[np.ndarray, 'B'],
    mean_scores: Float[np.ndarray, 'B'],
    hit_rates: Float[np.ndarray, 'B'],
) -> Markup:
    """Share of hits over score, with the diagonal of perfect calibration; below, the number of detections (log)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout='constrained')
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        middles, width = (edges[1:] + edges[:-1]) / 2, 0.9 * (edges[1] - edges[0])
        axes.bar(middles, np.nan_to_num(hit_rates), width, color=SERIES[5], alpha=0.3)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(mean_scores, hit_rates, color=SERIES[5], linewidth=1.4, marker='o', markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_title('share of hits', loc='left', fontsize=FONT_SIZE, color=MUTED)
        below.bar(middles, counts, width, color=MUTED)
        below.set(xlabel='score', yscale='log' if counts.any() else 'linear', ylim=(0.8, None))
        below.set_title('detections', loc='left', fontsize=FONT_SIZE, color=MUTED)
        below.minorticks_off()
        below.yaxis.set_major_formatter(lambda count, _: f'{count:,.0f}')
        return _svg(figure, name)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points if there are more than `MAX_POINTS`."""
    parts = -(-len(x) // MAX_POINTS)
    if parts <= 1:
        return x, y
    starts = np.arange(0, len(x), parts)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _name_at_the_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Writes names to the right of the last points, moved apart if they would overlap."""
    low, high = axes.get_ylim()
    step = 1.25 * FONT_SIZE / (0.8 * HEIGHT)  # height of a line of text, as a share of the axes
    ends = [(np.asarray(line.y)[np.isfinite(line.y)][-1] - low) / (high - low) for line in lines]
    place = -np.inf
    for index in np.argsort(ends):
        place = max(ends[index], place + step)
        axes.text(
            1.02, place, lines[index].name, color=lines[index].color, transform=axes.transAxes, va='center', ha='left'
        )


def _svg(figure: Figure, name: str) -> Markup:
    text: Any = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context({'svg.hashsalt': name}):
        warnings.filterwarnings('ignore', 'Glyph .* missing from')  # the browser's fonts have it
        FigureCanvasSVG(figure).print_svg(text, metadata={'Date': None})
    svg = text.getvalue()
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>', '', svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-labelledby="{name}-caption">', svg, count=1
    )
    svg = re.sub(r'font-family: [^;"]*;?', '', svg)
    svg = re.sub(r'<path d="[^"]*"\s*style="fill: #ffffff"\s*/>', '', svg)  # the white background
    svg = re.sub(r'xlink:href', 'href', svg)
    # matplotlib uses the same ids in every chart, and these charts share a page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f'var(--{variable})')
    return Markup(svg)
