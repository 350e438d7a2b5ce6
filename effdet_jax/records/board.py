"""TensorBoard's event file, written without a background thread: an added event is in the file, or an error returned.

We use only the encoders of tensorboardX. Its writer holds up to two minutes of events in a thread: a killed run loses
them, and on a full disk the thread dies and the run waits for it forever.
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
    """Within the block, importing `module` fails, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # makes Python raise ImportError
    try:
        yield
    finally:
        del sys.modules[module]


with _as_if_absent('torch'):  # tensorboardX imports torch if it can, which takes seconds and is not needed here
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # created by protobuf
    from tensorboardX.record_writer import masked_crc32c

HEADER = struct.Struct('<QI')  # length of the event and checksum of the length; then the event and its checksum
FOOTER_BYTES = 4


class Board:
    """Writes a new event file in `folder`, and removes events after `resume_step` from the earlier files."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        for path in folder.glob('events.out.tfevents.*'):
            _remove_after(path, resume_step)
        name = f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}'
        self._file = Appender(folder / name)
        self._first_step = resume_step + 1
        self._add(Event(file_version='brain.Event:2'))
        # Makes a TensorBoard that is already open drop the steps from here on, too.
        self._add(Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> OSError | None:
        parts = [part for name, value in values.items() for part in summary.scalar(name, value).value]
        return self._add(Event(step=step, summary=summary.Summary(value=parts)))

    def picture(self, step: int, name: str, rgb: UInt8[np.ndarray, '_ _ 3']) -> OSError | None:
        return self._add(Event(step=step, summary=summary.image(name, rgb, dataformats='HWC')))

    def text(self, name: str, text: str) -> OSError | None:
        """Adds Markdown at the first step of this session."""
        return self._add(Event(step=self._first_step, summary=summary.text(name, text)))

    def hyper_parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> OSError | None:
        """Adds a row to the HPARAMS tab, with the last values of `metrics`. A continued run has its row already."""
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
    """(offset of its end, event) for every complete event, up to the first that a crash has cut off."""
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


def _remove_after(path: Path, step: int) -> None:
    """Truncates the file before the first event after `step`. Steps only grow within a file."""
    kept = 0
    for end, event in read_events(path):
        if event.step > step:
            break
        kept = end if event.HasField('summary') else kept
    if kept:
        os.truncate(path, kept)
    else:
        path.unlink()
