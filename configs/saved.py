"""The config that a work directory was made with: --config=configs/saved.py:runs/d0, and overrides as usual."""

from typing import Any

from effdet_jax import config
from effdet_jax.runtime import paths


def get_config(workdir: str) -> Any:
    return config.load(paths.local(workdir))
