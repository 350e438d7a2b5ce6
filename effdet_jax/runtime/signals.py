"""SIGTERM and SIGINT ask a run to stop: the step is finished and saved. A second one ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from effdet_jax.runtime import devices


@contextlib.contextmanager
def notices() -> Iterator[Callable[[int], bool]]:
    """`asked(step)`, to be called after every step: whether to stop here. The same on all hosts of a run.

    On several hosts SIGTERM belongs to jax, which passes it on to the others and takes about a second to agree on a
    step; until then a second SIGTERM does nothing.
    """
    several = devices.host()[1] > 1
    signals = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    received = False

    def first(number: int, _: Any) -> None:
        nonlocal received
        received = True
        for each in signals:
            signal.signal(each, signal.SIG_DFL)  # the kernel's, which needs no Python: a step may hang
        name = signal.Signals(number).name
        # os.write, because the signal may have come in the middle of a print
        os.write(2, f'\n{name}: finishing this step and saving; once more to leave at once\n'.encode())
        if several:
            signal.raise_signal(signal.SIGTERM)  # jax tells the other hosts

    def asked(step: int) -> bool:
        if not several:
            return received
        if stop := devices.notice_for_all(step):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return stop

    if threading.current_thread() is not threading.main_thread():  # which alone can listen to signals
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
