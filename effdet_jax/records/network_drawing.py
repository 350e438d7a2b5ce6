"""Draws a feature network from its table of nodes: one row per level, P3 at the bottom, computed from left to right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from effdet_jax.errors import UserError
from effdet_jax.records.files import replacing
from effdet_jax.records.pictures import PALETTE

# Lengths in units: rows are 1 apart.
RADIUS = 0.21  # of a node
GAP = 1.25  # between columns
STEEPEST = 1.9  # rows that an edge may climb per unit to the right; steeper edges move the columns apart
LEFT, MARGIN = 0.8, 1.05  # space left of the nodes, for the level names, and right of them, for the arrows
INCHES = 0.62  # per unit
SUFFIXES = ('.png', '.svg')
INK, MUTED, CELL = '#222222', '#767676', '#f3f4f6'
EDGES = {1: ('#d55e00', 'from below'), 0: (MUTED, 'same level'), -1: ('#0072b2', 'from above')}
STYLE: dict[Any, Any] = {'svg.fonttype': 'none', 'svg.hashsalt': 'network', 'font.family': 'sans-serif'}

Table = Sequence[tuple[int, tuple[int, ...], bool]]  # level, ids of the inputs, whether it pools the first of them
Place = tuple[float, float]


def save_drawing(path: Path, table: Table, min_level: int, title: str, cells: int = 1) -> None:
    """Writes the picture of `draw_network` as SVG or PNG, by the suffix of `path`.

    Raises:
      UserError: for another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'{path} is neither SVG nor PNG: choose a name that ends in .svg or .png')
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size_in_inches(table, min_level), layout='constrained')
        draw_network(figure.add_subplot(), table, min_level, title, cells)
        metadata: dict[str, Any] = {'Date': None} if path.suffix.lower() == '.svg' else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=160, metadata=metadata)


def draw_network(axes: Axes, table: Table, min_level: int, title: str, cells: int = 1, legend: bool = True) -> None:
    """Draws one cell and the number of its repeats.

    Args:
      table: a table of `model.feature_network`, nodes in the order of computation. Inputs have the ids 0..L-1, node k
        has the id L + k, and the last node of each level is its output.
      min_level: the level of input 0.
      legend: whether to explain the colours.
    """
    places = _places(table, min_level)
    count, right = len(places) - len(table), max(x for x, _ in places)
    last = {level: count + k for k, (level, _, _) in enumerate(table)}
    rows = [y for _, y in places]
    left_of_cell, right_of_cell = min(x for x, _ in places[count:]) - 0.62, right + 0.55
    axes.add_patch(
        FancyBboxPatch(
            (left_of_cell, min(rows) - 0.45), right_of_cell - left_of_cell, max(rows) - min(rows) + 0.9,
            boxstyle='round,pad=0,rounding_size=0.2', facecolor=CELL, edgecolor='none', zorder=0,
        )
    )  # fmt: skip
    if cells > 1:
        axes.text(right_of_cell, min(rows) - 0.5, f'x {cells}', ha='right', va='top', color=MUTED, fontsize=9)
    nodes = [
        _node(axes, place, str(i), pooled=i >= count and table[i - count][2], is_input=i < count)
        for i, place in enumerate(places)
    ]
    for k, (level, inputs, _) in enumerate(table):
        target = nodes[count + k]
        for source in inputs:
            _edge(axes, nodes, source, count + k)
        if last[level] == count + k:
            _arrow(axes, target, (right + MARGIN, target.center[1]), INK)
    for i, (x, y) in enumerate(places[:count]):
        axes.text(x - 0.35, y, f'P{min_level + i}', ha='right', va='center', color=INK, fontsize=9)
        axes.text(right + MARGIN + 0.08, y, f'P{min_level + i}', ha='left', va='center', color=INK, fontsize=9)
    axes.set_title(title, fontsize=9.5, color=INK, linespacing=1.35)
    axes.set(xlim=(-LEFT, right + MARGIN + 0.6), ylim=(min(rows) - 0.75, max(rows) + 0.5), aspect='equal')
    axes.axis('off')
    if legend:
        add_legend(axes, any(pooled for _, _, pooled in table))


def add_legend(axes: Any, attention: bool) -> None:
    """Explains the colours, below `axes` or below a whole figure."""
    lines = [Line2D([], [], color=color, label=name) for color, name in EDGES.values()]
    if attention:
        ring = {'marker': 'o', 'markersize': 8, 'markerfacecolor': 'white', 'markeredgewidth': 2.4}
        lines.append(Line2D([], [], color=INK, linestyle='', label='global attention', **ring))
    place = {'bbox_to_anchor': (0.5, 0.0)} if isinstance(axes, Axes) else {}
    axes.legend(
        handles=lines, loc='upper center' if place else 'outside lower center', ncols=len(lines), fontsize=7.5,
        frameon=False, handlelength=1.4, columnspacing=1.2, labelcolor=INK, **place,
    )  # fmt: skip


def size_in_inches(table: Table, min_level: int) -> tuple[float, float]:
    """Width and height of a picture with title and legend."""
    width, height = extent(table, min_level)
    return max(4.6, INCHES * width), INCHES * height + 0.85


def extent(table: Table, min_level: int) -> tuple[float, float]:
    """(width, height) of a network without title, in units."""
    places = _places(table, min_level)
    return max(x for x, _ in places) + LEFT + MARGIN + 0.6, len(places) - len(table) + 0.25


def columns_of(table: Table, min_level: int) -> list[int]:
    """The column of every input, which is 0, and of every node.

    A column is either a walk, in which every node reads its neighbour one level above or below, or a set of nodes that
    do not read each other. A node joins the current column if its level is free there and the column stays of one
    kind; otherwise it begins the next column.
    """
    count = len({level for level, _, _ in table})
    levels = [*range(min_level, min_level + count), *(level for level, _, _ in table)]
    columns, current, is_walk = [0] * count, 1, None
    for k, (level, inputs, _) in enumerate(table):
        members = [i for i in range(count, count + k) if columns[i] == current]
        read = [levels[i] for i in inputs if i in members]
        fits = level not in [levels[i] for i in members] and all(abs(level - other) == 1 for other in read)
        if members and not (fits and (len(members) == 1 or bool(read) == is_walk)):
            current, members = current + 1, []
        if len(members) == 1:
            is_walk = bool(read)
        columns.append(current)
    return columns


def _places(table: Table, min_level: int) -> list[Place]:
    """(x, y) of the inputs and the nodes."""
    columns = columns_of(table, min_level)
    count = len(columns) - len(table)
    levels = [*range(min_level, min_level + count), *(level for level, _, _ in table)]
    gaps = dict.fromkeys(range(1, max(columns) + 1), GAP)
    for k, (level, inputs, _) in enumerate(table):
        for source in inputs:
            if span := columns[count + k] - columns[source]:
                needed = abs(level - levels[source]) / STEEPEST / span
                gaps[columns[count + k]] = max(gaps[columns[count + k]], needed)
    x_of = {column: sum(gaps[c] for c in range(1, column + 1)) for column in range(max(columns) + 1)}
    return [(x_of[column], float(level)) for column, level in zip(columns, levels, strict=True)]


def _edge(axes: Axes, nodes: Sequence[Circle], source: int, target: int) -> None:
    """Draws a straight arrow, or an arc over the nodes between two nodes of the same level."""
    (x1, y1), (x2, y2) = nodes[source].center, nodes[target].center
    between = sum(y == y1 == y2 and x1 < x < x2 for x, y in (node.center for node in nodes))
    color, _ = EDGES[(y2 > y1) - (y2 < y1)]
    bend = (0.3 + 0.08 * between) / (x2 - x1) if between else 0.0
    _arrow(axes, nodes[source], nodes[target], color, bend)


def _arrow(axes: Axes, start: Circle, end: Circle | Place, color: str, bend: float = 0.0) -> None:
    """Draws an arrow. `bend`: how far it bends upwards, as a share of its length."""
    to_node = isinstance(end, Circle)
    axes.add_patch(
        FancyArrowPatch(
            start.center, end.center if to_node else end, patchA=start, patchB=end if to_node else None,
            arrowstyle='-|>,head_length=3.4,head_width=1.7', connectionstyle=f'arc3,rad={-2 * bend:.4f}',
            shrinkA=0, shrinkB=1 if to_node else 0, color=color, linewidth=1.1, joinstyle='miter', zorder=1,
        )
    )  # fmt: skip


def _node(axes: Axes, place: Place, name: str, pooled: bool, is_input: bool) -> Circle:
    tint = [0.55 + 0.45 * channel / 255 for channel in PALETTE[int(place[1]) % len(PALETTE)]]
    color = 'white' if is_input else tint
    circle = Circle(place, RADIUS, linewidth=2.4 if pooled else 0.9, zorder=2, facecolor=color, edgecolor=INK)
    axes.add_patch(circle)
    axes.text(*place, name, ha='center', va='center_baseline', fontsize=7, color=INK, zorder=3)
    return circle
