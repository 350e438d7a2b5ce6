"""Your own data: --config=configs/own_data.py --config.dataset.source=voc:path/to/mine (docs/data.md, Your own data).

D0 and the recipe `short`, or another member and other words: configs/own_data.py:lite0,official.
"""

from typing import Any

from effdet_jax.configs import default


def get_config(presets: str = 'd0') -> Any:  # as `default.get_config`
    name, *words = presets.split(',')
    return default.get_config(name, ','.join(['own', 'short', *words]))
