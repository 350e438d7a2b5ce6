"""EfficientDet-D2."""

from effdet_jax.configs import default


def get_config(presets: str = 'shapes') -> default.ConfigDict:
    return default.get_config('d2', presets)
