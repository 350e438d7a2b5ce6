"""How a kernel takes the place of the plain definition that it equals."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax

Definition = TypeVar('Definition', bound=Callable)

_PLAIN_ONLY = contextvars.ContextVar('_PLAIN_ONLY', default=False)


def runs_as(kernel: Callable) -> Callable[[Definition], Definition]:
    """Decorates a definition: calls run `kernel`, which takes the same arguments by position and returns the same.

    Delete the decorator to run the definition as it is written; tests find it at `__wrapped__`.
    """

    def decorate(definition: Definition) -> Definition:
        signature = inspect.signature(definition)

        @functools.wraps(definition)
        def run(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return kernel(*bound.arguments.values())

        return cast(Definition, run)

    return decorate


def by_platform(*operands: Any, cpu: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> jax.Array:
    """`cpu(*operands)` in a program for a CPU, else `plain(*operands)`. Chosen when the program is lowered."""
    if _PLAIN_ONLY.get():
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=plain)


@contextlib.contextmanager
def plain_everywhere() -> Iterator[None]:
    """`by_platform` traces the plain form alone: for converters, which know no platforms."""
    token = _PLAIN_ONLY.set(True)
    try:
        yield
    finally:
        _PLAIN_ONLY.reset(token)
