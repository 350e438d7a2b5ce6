"""What of a state leaves the training: to be evaluated, drawn from, exported, started from."""

from collections.abc import Mapping
from typing import Any

AUXILIARY = 'auxiliary'  # what nothing but the training step reads, wherever it lies in the variables


def deployed(state: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """('ema', the moving average) where there is one, else ('variables', those); without what is `AUXILIARY`.

    state: 'variables' and 'ema', trees of dicts whose leaves may be anything.
    """
    name = 'ema' if state.get('ema') else 'variables'
    return name, without_auxiliary(state[name])


def without_auxiliary(tree: Any) -> Any:
    """A tree of dicts without its nodes of that name."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: without_auxiliary(node) for name, node in tree.items() if name != AUXILIARY}
