r"""Learned edge weights over training, as shares of each node: python -m experiments.fusion.weights OUT.png WORKDIR...

The runs must have kept their checkpoints: --config.checkpoint.keep=100 --config.checkpoint.every_epochs=0.05. Solid is
the first run, dashed the second. The paper draws the same of three nodes (Tan, Pang, Le 2020, figure 5).
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from effdet_jax import config as run_config
from effdet_jax.model.feature_network import FEATURE_NETWORKS, FUSIONS
from effdet_jax.records.checkpoint import Checkpoints
from experiments.curves import names

STYLES = '-', '--', ':'
MIN_LEVEL = 3


def main(out: str, *workdirs: str) -> None:
    paths = [Path(workdir) for workdir in workdirs]
    config: Any = run_config.load(paths[0])
    model = config.model
    nodes = FEATURE_NETWORKS[model.feature_network.name](MIN_LEVEL, model.max_level)
    figure, grid = plt.subplots(
        model.fpn_cells, len(nodes), figsize=(2.1 * len(nodes), 2.2 * model.fpn_cells), layout='constrained',
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for style, workdir, run in zip(STYLES, paths, names(paths), strict=False):
        steps, shares = learned_shares(workdir)
        for (cell, node), shares_TE in shares.items():
            for edge, source in enumerate(nodes[node].inputs):
                label = f'{map_name(source, nodes, model.max_level)}, {run}'
                grid[cell, node].plot(steps, shares_TE[:, edge], style, color=f'C{edge}', label=label)
    for cell, row in enumerate(grid):
        for k, axes in enumerate(row):
            axes.set(title=f'cell {cell}, node {k}: P{nodes[k].level}', ylim=(0, 1))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=6)
    figure.supxlabel('step')
    figure.supylabel('share of the input')
    figure.savefig(out, dpi=110)


def learned_shares(workdir: Path) -> tuple[list[int], dict[tuple[int, int], np.ndarray]]:
    """(steps [T], {(cell, node): shares [T, E], which add up to 1}) of a run's averaged weights."""
    fusion = run_config.load(workdir).model.feature_network.fusion
    checkpoints = Checkpoints(workdir)
    steps = sorted(int(folder.name) for folder in checkpoints.folder.iterdir() if folder.name.isdigit())
    shares: dict[tuple[int, int], list[np.ndarray]] = {}
    for step in steps:
        for cell, its_nodes in checkpoints.variables(step)['params']['fpn'].items():
            for node, params in its_nodes.items():
                if 'edge_weights' in params:
                    place = int(cell.removeprefix('cell_')), int(node.removeprefix('node_'))
                    shares.setdefault(place, []).append(np.asarray(FUSIONS[fusion](params['edge_weights'])))
    checkpoints.close()
    return steps, {place: np.stack(of_steps) for place, of_steps in shares.items()}


def map_name(source: int, nodes: Any, max_level: int) -> str:
    """'P4' for an input of the cell, 'node 2' for what a node made."""
    inputs = max_level - MIN_LEVEL + 1
    return f'P{MIN_LEVEL + source}' if source < inputs else f'node {source - inputs}'


if __name__ == '__main__':
    main(*sys.argv[1:])
