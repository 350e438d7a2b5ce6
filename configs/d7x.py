"""EfficientDet-D7x."""

from effdet_jax.configs import default


def get_config(dataset: str = 'shapes') -> default.ConfigDict:
    config = default.get_config('d7x', dataset)
    config.train.epochs = 600.0
    return config
