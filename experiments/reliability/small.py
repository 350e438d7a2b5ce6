"""`python -m effdet_jax.main` with a network of three convolutions (tests/tiny.py), so that a start takes seconds.

PAUSE: seconds that every step takes longer, so that there is time to be killed in.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'tests'))

import jax
import pytest
import tiny

from effdet_jax import main
from effdet_jax.commands import cli
from effdet_jax.runtime import devices


def shard(batch):
    time.sleep(float(os.environ.get('PAUSE', '0')))
    return real_shard(batch)


if __name__ == '__main__':
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    tiny.use_toy(pytest.MonkeyPatch())
    real_shard, devices.shard = devices.shard, shard
    cli.run(main.main, required=('config', 'workdir'))
