"""EfficientDet-D1."""

from effdet_jax.configs import default


def get_config(presets: str = 'shapes') -> default.ConfigDict:
    return default.get_config('d1', presets)
