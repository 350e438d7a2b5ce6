"""Time of D0 with each feature network and fusion: python -m experiments.feature_networks.times [SIZE [ROUNDS]]

One image, nothing but the network, batch norm folded; all in turns, in one process.
"""

import functools
import sys

import jax
import jax.numpy as jnp

from effdet_jax.configs import default
from effdet_jax.model import build_model
from effdet_jax.model.batch_norm import fold
from effdet_jax.records.console import info, table, track
from effdet_jax.runtime import process, timing
from effdet_jax.runtime.devices import describe_devices
from effdet_jax.weights.names import shapes_of

NETWORKS = (
    ('bifpn', 'fast'), ('bifpn', 'softmax'), ('bifpn', 'sum'), ('fpn', 'sum'), ('panet', 'sum'), ('nasfpn', 'sum'),
    ('fully_connected', 'sum'), ('qufpn', 'fast'),
)  # fmt: skip
SECONDS_OF_A_BLOCK = 0.5


def main(size: int = 512, rounds: int = 12) -> None:
    images = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    calls = {f'{name}, {fusion}': network(name, fusion, images) for name, fusion in NETWORKS}
    blocks = {label: [] for label in calls}
    counts = {}
    for label, call in calls.items():
        jax.block_until_ready(call())
        seconds = timing.seconds_of(lambda call=call: jax.block_until_ready(call()))
        counts[label] = timing.calls_in(SECONDS_OF_A_BLOCK, seconds)
    for order in track(timing.in_turns(list(calls), rounds), rounds, 'rounds'):
        for label in order:
            blocks[label].append(timing.seconds_per_call(calls[label], jax.block_until_ready, counts[label]))
    first = next(iter(blocks))
    rows = []
    for label, seconds in blocks.items():
        ratio = timing.paired_ratio(seconds, blocks[first])
        rows.append((label, 1e3 * timing.spread(seconds).median, ratio.median, ratio.error))
    info(f'D0, {size}x{size}, one image, {describe_devices()}, jax {jax.__version__}, {rounds} rounds\n')
    info(table(('network, fusion', 'ms', f'/ {first}', '± error'), rows))


def network(name: str, fusion: str, images: jax.Array) -> functools.partial:
    config = default.get_config('d0')
    config.model.feature_network.update(name=name, fusion=fusion)
    model = build_model(config.model, 90)
    # The time does not depend on their values.
    variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes_of(model))
    return functools.partial(jax.jit(model.apply), fold(variables), images)


if __name__ == '__main__':
    process.use_huge_pages()
    main(*map(int, sys.argv[1:]))
