"""Where nodes are drawn, and that every edge is; how it looks, experiments/feature_networks shows."""

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch

from effdet_jax.errors import UserError
from effdet_jax.records import network_drawing

# Levels 3 to 5: down, then up; the output of level 3 is in the walk down.
TABLE = [
    (4, (1, 2), False), (3, (0, 3), False), (4, (1, 3, 4), True), (5, (2, 5), False),
]  # fmt: skip
LAYER = [(level, (0, 1, 2), False) for level in (3, 4, 5)]


def test_a_walk_has_a_column_and_so_have_nodes_that_do_not_read_each_other():
    assert network_drawing.columns_of(TABLE, 3) == [0, 0, 0, 1, 1, 2, 2]
    assert network_drawing.columns_of(LAYER, 3) == [0, 0, 0, 1, 1, 1]
    assert network_drawing.columns_of([*TABLE, (5, (6, 2), False), (4, (5, 1), False)], 3)[-2:] == [3, 3]


@pytest.mark.parametrize('table', [TABLE, LAYER])
def test_every_node_every_edge_and_every_output_is_drawn(table):
    axes = Figure().add_subplot()
    network_drawing.draw_network(axes, table, 3, 'small', cells=4)
    circles = [patch for patch in axes.patches if isinstance(patch, Circle)]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len({circle.center for circle in circles}) == len(circles) == 3 + len(table)  # none hides another
    assert len(arrows) == sum(len(inputs) for _, inputs, _ in table) + 3
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == sorted(['P3', 'P4', 'P5'] * 2 + list(map(str, range(len(circles)))) + ['x 4'])


@pytest.mark.parametrize('name', ['network.svg', 'network.PNG'])
def test_the_same_table_gives_the_same_file(name, tmp_path):
    for folder in ('a', 'b'):
        network_drawing.save_drawing(tmp_path / folder / name, TABLE, 3, 'small')
    a, b = ((tmp_path / folder / name).read_bytes() for folder in ('a', 'b'))
    assert a == b and len(a) > 1000


def test_another_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'network\.pdf is neither SVG nor PNG'):
        network_drawing.save_drawing(tmp_path / 'network.pdf', TABLE, 3, 'small')
