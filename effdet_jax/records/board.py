"""TensorBoard's event file, written as the loop goes: what was added is in the file, and an error is ours to handle.

(tensorboardX's own writer keeps up to two minutes of events behind a thread: a killed run loses them, and on a full
disk the thread dies and the run waits for it for ever. Its encoders of summaries are used here.)
"""

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import UInt8

from effdet_jax.records.files import Appender


@contextlib.contextmanager
def _as_if_absent(module: str) -> Iterator[None]:
    """What is imported inside finds no such module, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # so does one tell Python that there is none
    try:
        yield
    finally:
        del sys.modules[module]


with _as_if_absent('torch'):  # tensorboardX loads it where it is installed: seconds, and nothing here needs it
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # protobuf makes them
    from tensorboardX.record_writer import masked_crc32c

HEADER = struct.Struct('<QI')  # length of the event, checksum of the length; a checksum of the event follows it
FOOTER_BYTES = 4


class Board:
    """Appends to a new event file in `folder`, after earlier ones have been cut behind `resume_step`."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        for path in folder.glob('events.out.tfevents.*'):
            _forget_after(path, resume_step)
        name = f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}'
        self._file = Appender(folder / name)
        self._first_step = resume_step + 1
        self._add(Event(file_version='brain.Event:2'))
        # A TensorBoard that has been watching drops the steps from here on, too.
        self._add(Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> OSError | None:
        parts = [part for name, value in values.items() for part in summary.scalar(name, value).value]
        return self._add(Event(step=step, summary=summary.Summary(value=parts)))

    def picture(self, step: int, name: str, rgb: UInt8[np.ndarray, '_ _ 3']) -> OSError | None:
        return self._add(Event(step=step, summary=summary.image(name, rgb, dataformats='HWC')))

    def text(self, name: str, text: str) -> OSError | None:
        """Markdown, at the first step of this part of the run."""
        return self._add(Event(step=self._first_step, summary=summary.text(name, text)))

    def hyper_parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> OSError | None:
        """A row of the HPARAMS tab, with the last value of `metrics` beside; a run that continues has one already."""
        if self._first_step > 1:
            return None
        known = {
            name: value if isinstance(value, (str, bool, int, float)) else str(value) for name, value in values.items()
        }
        experiment, session, _ = summary.hparams(known, dict.fromkeys(metrics))
        return self._add(
            Event(step=self._first_step, summary=summary.Summary(value=[*experiment.value, *session.value]))
        )

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> OSError | None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack('<Q', len(data))
        record = length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data))
        return self._file.append(record)


def read_events(path: Path) -> list[tuple[int, Event]]:
    """(offset behind it, event) of every whole event; what a crash has torn ends the list."""
    content, events, offset = path.read_bytes(), [], 0
    while offset + HEADER.size <= len(content):
        start = offset + HEADER.size
        end = start + HEADER.unpack_from(content, offset)[0]
        offset = end + FOOTER_BYTES
        if offset > len(content):
            break
        try:
            events.append((offset, Event.FromString(content[start:end])))
        except DecodeError:
            break
    return events


def _forget_after(path: Path, step: int) -> None:
    """Cuts the file before the first event behind `step`. Steps only grow within a file."""
    kept = 0
    for end, event in read_events(path):
        if event.step > step:
            break
        kept = end if event.HasField('summary') else kept
    if kept:
        os.truncate(path, kept)
    else:
        path.unlink()
