"""All feature networks in one picture, and what they cost in D0: python -m experiments.feature_networks.picture OUT.png

P3-P8 instead of P3-P7: python -m experiments.feature_networks.picture OUT.png 8
"""

import sys

import matplotlib.pyplot as plt

from effdet_jax.commands.plan import planner
from effdet_jax.configs import default
from effdet_jax.model.feature_network import FEATURE_NETWORKS
from effdet_jax.records import network_drawing
from effdet_jax.records.console import info, table

ROWS = (('fpn', 'panet', 'bifpn', 'fully_connected'), ('nasfpn', 'qufpn'))  # of about the same width


def main(out: str, max_level: str = '7') -> None:
    config = default.get_config('d0')
    config.model.max_level = int(max_level)
    figure = plt.figure(figsize=(11.6, 8.4 + 1.3 * (config.model.max_level - 7)), layout='constrained')
    costs = {}
    for row, names in zip(figure.subfigures(len(ROWS), 1), ROWS, strict=True):
        tables = [FEATURE_NETWORKS[name](3, config.model.max_level) for name in names]
        widths = [network_drawing.extent(nodes, 3)[0] for nodes in tables]
        for axes, name, nodes in zip(row.subplots(1, len(names), width_ratios=widths), names, tables, strict=True):
            config.model.feature_network.name = name
            costs[name] = planner.feature_network_cost(config)
            title = f'{name}\n{costs[name].parameters:,} parameters, {costs[name].macs / 1e9:.3f} G'
            network_drawing.draw_network(axes, nodes, 3, title, legend=False)
    network_drawing.add_legend(figure, attention=True)
    figure.savefig(out, dpi=110)
    fpn = costs['fpn']
    rows = [
        (name, cost.parameters, cost.macs / 1e9, cost.parameters / fpn.parameters, cost.macs / fpn.macs)
        for name, cost in costs.items()
    ]
    header = ('feature network', 'parameters', 'multiply-adds, billions', 'parameters / fpn', 'multiply-adds / fpn')
    info(table(header, rows))


if __name__ == '__main__':
    main(*sys.argv[1:])
