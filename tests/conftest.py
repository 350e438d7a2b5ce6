import functools

import pytest

from configs import default
from effdet_jax.model import build_model
from effdet_jax.weights import names


@pytest.fixture(scope='session')
def shapes():
    """`shapes('d3')`: the variables of a model with 90 classes as shapes; each network is traced once per session."""
    of_model = functools.cache(names.shapes_of)  # by model, since d6 and d7 are one network
    return lambda name: of_model(build_model(default.get_config(name).model, num_classes=90))
