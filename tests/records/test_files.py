import os
import signal
import subprocess
import sys

import pytest
from full_disk import full_disk

from effdet_jax.errors import UserError
from effdet_jax.records import files
from effdet_jax.records.files import Appender, locked

HOLD = """
import sys, time
from pathlib import Path
from effdet_jax.records.files import locked
with locked(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(60)
"""


def test_what_a_full_disk_refuses_is_whole_and_in_order_once_there_is_room(tmp_path):
    path = tmp_path / 'folder' / 'lines'
    lines = Appender(path)
    assert lines.append(b'one two\n') is None
    with full_disk(10):
        assert 'too large' in lines.append(b'three four\n').strerror
        assert path.read_bytes() == b'one two\nth'  # half of it fits; a reader ignores what has no end
        assert lines.append(b'five\n') is not None
    assert lines.append(b'six\n') is None
    lines.sync()
    lines.close()
    assert path.read_bytes() == b'one two\nthree four\nfive\nsix\n'


def test_what_waits_for_room_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'MAX_PENDING', 10)
    lines = Appender(tmp_path / 'lines')
    with full_disk(0):
        for number in range(5):
            assert lines.append(b'line %d\n' % number) is not None
    lines.append(b'5\n')
    lines.close()
    assert (tmp_path / 'lines').read_bytes() == b'line 4\n5\n'


def test_a_folder_that_cannot_be_written_does_not_end_the_writer(tmp_path):
    (tmp_path / 'occupied').write_text('a file, no folder')
    lines = Appender(tmp_path / 'occupied' / 'lines')
    assert isinstance(lines.append(b'1\n'), OSError)
    (tmp_path / 'occupied').unlink()
    assert lines.append(b'2\n') is None
    lines.close()
    assert (tmp_path / 'occupied' / 'lines').read_bytes() == b'1\n2\n'


def test_a_second_process_is_refused_until_the_first_one_is_gone_however_it_went(tmp_path):
    first = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == 'held\n'
    message = rf'is in use by process {first.pid} on \S+: wait for it, stop it, or choose another --workdir'
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with locked(tmp_path):
        pass
    with locked(tmp_path), pytest.raises(UserError, match=f'process {os.getpid()} '), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / 'file').touch()
    message = r'file/run cannot be written \(Not a directory\): choose another'
    with pytest.raises(UserError, match=message), locked(tmp_path / 'file' / 'run'):
        pass


def test_the_lock_holds_on_a_full_disk(tmp_path):
    with (
        full_disk(0),
        locked(tmp_path),
        pytest.raises(UserError, match='another process'),
        locked(tmp_path),
    ):
        pass
