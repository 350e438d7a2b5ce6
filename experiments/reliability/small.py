"""`python -m effdet_jax.main` with a network of three convolutions (tests/tiny.py), so that a start takes seconds.

PAUSE: seconds that every step takes longer, so that there is time to be killed in.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'tests'))

import jax
import tiny

from effdet_jax import build, main
from effdet_jax.commands import cli
from effdet_jax.configs import rules
from effdet_jax.runtime import devices


def build_model(config, num_classes, axis_name=None):
    real_build_model(config, num_classes, axis_name)  # it reads the keys, and a key that nothing reads is refused
    return tiny.toy(num_classes, axis_name)


def shard(batch):
    time.sleep(float(os.environ.get('PAUSE', '0')))
    return real_shard(batch)


if __name__ == '__main__':
    rules.RULES['model.max_level'] = rules.whole(3)  # the only level that this network has
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    real_build_model, build.build_model = build.build_model, build_model
    real_shard, devices.shard = devices.shard, shard
    cli.run(main.main, required=('config', 'workdir'))
