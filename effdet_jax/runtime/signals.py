"""SIGTERM and SIGINT: the run finishes its step, saves and stops. A second signal ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from effdet_jax.runtime import devices


@contextlib.contextmanager
def notices() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`, to be called after every step: whether to stop here. All hosts get the same answer.

    On several hosts jax handles SIGTERM: it tells the other hosts and takes about a second to agree on a step. Until
    then a second SIGTERM has no effect.
    """
    several = devices.host()[1] > 1
    signals = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    received = False

    def first(number: int, _: Any) -> None:
        nonlocal received
        received = True
        for each in signals:
            signal.signal(each, signal.SIG_DFL)  # the system's handler works even if a step hangs
        name = signal.Signals(number).name
        # os.write, because the signal may have come in the middle of a print
        os.write(2, f'\n{name}: finishing this step and saving; send it again to stop at once\n'.encode())
        if several:
            signal.raise_signal(signal.SIGTERM)  # jax tells the other hosts

    def asked(step: int) -> bool:
        if not several:
            return received
        if stop := devices.notice_for_all(step):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return stop

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield lambda step: False
        return
    before = {number: signal.getsignal(number) for number in signals}
    try:
        for number in signals:
            signal.signal(number, first)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
