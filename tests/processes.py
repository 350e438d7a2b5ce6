"""Programs in processes of their own, as a user starts them."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def effdet(*arguments, cwd=ROOT, **environment):
    """(exit code, stdout, stderr) of `effdet ...`, as a checkout has it."""
    return python('-m', 'effdet_jax', *arguments, cwd=cwd, **environment)


def python(*arguments, cwd=ROOT, **environment):
    """(exit code, stdout, stderr) of `python ...`; a variable that is None is removed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=_variables(environment), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def printed_by(code, *arguments, **environment):
    """What Python code prints that succeeds."""
    status, out, error = python('-c', code, *arguments, **environment)
    assert status == 0, error
    return out


def on_a_terminal(*command, keys=b'', **environment):
    """What a command writes to a terminal where `keys` are pressed."""
    environment = {'NO_COLOR': None, 'FORCE_COLOR': None, 'TERM': 'xterm-256color'} | environment
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        command, cwd=ROOT, env=_variables(environment), stdin=writer, stdout=writer, stderr=writer
    )
    os.close(writer)
    os.write(reader, keys)
    written = b''
    with contextlib.suppress(OSError):  # Linux says so when the last writer has gone
        while chunk := os.read(reader, 65536):
            written += chunk
    os.close(reader)
    assert process.wait() == 0, written.decode()
    return written.decode()


def _variables(changes):
    variables = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)} | changes
    return {name: value for name, value in variables.items() if value is not None}
