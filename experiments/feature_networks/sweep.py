r"""Feature networks with equal backbone and heads: AP, its spread, parameters, multiply-adds, beside the paper's.

    python -m experiments.feature_networks.sweep runs/feature_networks --config=configs/quickstart.py --seeds=3
    python -m experiments.feature_networks.sweep runs/feature_networks_bccd --config=configs/bccd.py \
        --config.dataset.source=voc:path/to/bccd
"""

import sys

from effdet_jax.commands.plan import planner
from effdet_jax.configs import default
from experiments import sweeps

# Tan, Pang, Le 2020, comparison of feature networks: COCO AP, parameters and FLOPs relative to FPN.
PAPER = {
    'fpn': (42.29, 1.0, 1.0),
    'panet': (44.08, 1.0, 1.0),
    'nasfpn': (43.16, 0.71, 0.72),
    'fully_connected': (43.06, 1.24, 1.21),
    'bifpn, sum': (43.94, 0.88, 0.67),
    'bifpn': (44.39, 0.88, 0.68),
}


def rows() -> list[sweeps.Row]:
    """Costs are those of the feature network in D0 at 512x512; what is swept may be of another size."""
    made = []
    for label, (ap, parameters, flops) in PAPER.items():
        fusion = 'fast' if label == 'bifpn' else 'sum'
        network = {'feature_network.name': label.split(',')[0], 'feature_network.fusion': fusion}
        config = default.get_config('d0')
        config.model.update_from_flattened_dict(network)
        cost = planner.feature_network_cost(config)
        facts = {
            'parameters in D0': cost.parameters,
            'multiply-adds in D0, millions': round(cost.macs / 1e6),
            "paper's AP": ap,
            "paper's parameters": parameters,
            "paper's FLOPs": flops,
        }
        overrides = {f'model.{key}': value for key, value in network.items()}
        made.append(sweeps.Row(label.replace(', ', '_'), overrides, facts))
    return made


if __name__ == '__main__':
    sys.exit(sweeps.main(rows(), str(__doc__).splitlines()[0]))
