"""EfficientDet in JAX and Flax: train, study and use object detectors."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effdet_jax.inference import Detector
    from effdet_jax.train import train_and_evaluate

__version__ = '0.1.0'
__all__ = ['Detector', 'train_and_evaluate']

_MODULES = {'Detector': 'effdet_jax.inference', 'train_and_evaluate': 'effdet_jax.train'}


def __getattr__(name: str) -> Any:
    """Imports on first use: `effdet --help` must not wait for jax."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
