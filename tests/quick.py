"""Which cases of a long table `pytest -m 'not slow'` keeps."""

import pytest


def slow_but(names, *quick):
    """`names` as cases; all but those of `quick` are marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
