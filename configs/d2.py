"""EfficientDet-D2."""

from effdet_jax.configs import default


def get_config(dataset: str = 'shapes') -> default.ConfigDict:
    return default.get_config('d2', dataset)
