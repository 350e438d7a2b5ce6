"""Which weights of a training state are deployed: evaluated, exported, used for detection or to start another run."""

from collections.abc import Mapping
from typing import Any

AUXILIARY = 'auxiliary'  # nodes of this name, anywhere in the variables, are read only by the training step


def deployed(state: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """('ema', the moving average) if there is one, else ('variables', the variables), both without `AUXILIARY` nodes.

    `state` has the trees 'variables' and 'ema': dicts with any leaves.
    """
    name = 'ema' if state.get('ema') else 'variables'
    return name, without_auxiliary(state[name])


def without_auxiliary(tree: Any) -> Any:
    """A tree of dicts without its nodes called `AUXILIARY`."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: without_auxiliary(node) for name, node in tree.items() if name != AUXILIARY}
