"""EfficientDet-D0."""

from effdet_jax.configs import default


def get_config(dataset: str = 'shapes') -> default.ConfigDict:
    return default.get_config('d0', dataset)
