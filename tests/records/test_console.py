import math
import os
import pty
import re
import subprocess
import sys

from effdet_jax.records import console
from effdet_jax.records.console import Progress, info, table, track

LOOP = """
from functools import partialmethod
from rich.progress import Progress
from effdet_jax.records import console
Progress.update = partialmethod(Progress.update, refresh=True)  # at once, not four times a second
console.SECONDS_BETWEEN_LINES = 0
with console.Progress(3, start=1, description='training') as progress:
    for step in (2, 3):
        progress.update(step, {'loss': 0.5 / step, 'images/s': 85.25, 'waiting': 0.03})
        for image in console.track('ab', 2, 'evaluating'):
            console.info(f'[done] {image}')
"""


def test_without_a_terminal_progress_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(console, 'SECONDS_BETWEEN_LINES', 0)
    with Progress(200, start=100, description='training') as progress:
        progress.update(150, {'loss': 0.43214, 'images/s': 85.25, 'waiting': 0.031})
        progress.update(200)
    first, last = capsys.readouterr().out.splitlines()
    assert first == 'training  step 150/200  loss 0.4321  images/s 85.25  waiting 3%'
    assert last.startswith('training  step 200/200  loss 0.4321  images/s 85.25  waiting 3%  took 0:00:0')


def test_plain_lines_keep_their_distance_but_the_last_one_comes(capsys):
    with Progress(1000) as progress:
        for step in range(1, 1001):
            progress.update(step)
    assert capsys.readouterr().out.splitlines() == ['step 1000/1000  took 0:00:00']


def test_track_passes_everything_on(capsys):
    assert list(track(iter('abc'), 3, 'evaluating')) == ['a', 'b', 'c']
    assert capsys.readouterr().out == 'evaluating  3/3  took 0:00:00\n'


def test_a_stage_says_how_long_it_took():
    with console.terminal.capture() as printed, console.stage('compiling'):
        pass
    assert printed.get() == 'compiling: 0 s\n'


def test_piped_output_has_no_control_characters_even_under_force_color():
    output = run_python(LOOP, FORCE_COLOR='1')
    assert output.splitlines()[0] == 'training  step 2/3  loss 0.25  images/s 85.25  waiting 3%'
    assert '[done] b' in output and 'evaluating  2/2' in output
    assert not {'\r', '\x1b'} & set(output)


def test_a_terminal_gets_a_bar_and_lines_above_it():
    output = run_python(LOOP, terminal=True)
    assert '\x1b[2K' in output and '━' in output
    for text in ('training step 3/3', 'evaluating 1/2', 'loss 0.1667  images/s 85.25  waiting 3%', '[done] b'):
        assert text in without_colors(output)
    assert '\x1b[35m' not in run_python(LOOP, terminal=True, NO_COLOR='1')


def test_table_is_markdown_with_numbers_flush_right():
    text = table(['class', 'AP', 'boxes'], [['RBC [a]', 0.51239, 12345], ['WBC', math.nan, None]], title='AP per class')
    assert text.splitlines() == [
        'AP per class',
        '| class   |    AP |  boxes |',
        '|---------|-------|--------|',
        '| RBC [a] | 0.512 | 12,345 |',
        '| WBC     |     - |      - |',
    ]


def test_table_without_rows_is_its_header():
    assert table(['name'], []).splitlines()[0] == '| name |'


def test_info_prints_lines_as_they_are(capsys):
    line = '[bold] 3:4 :smile: ' + 'x' * 300
    info(line)
    assert capsys.readouterr().out == f'{line}\n'


def run_python(code, terminal=False, **environment):
    variables = {k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'FORCE_COLOR')}
    variables |= {'TERM': 'xterm-256color', 'COLUMNS': '150', 'PYTHONIOENCODING': 'utf-8'} | environment
    command = [sys.executable, '-c', code]
    if not terminal:
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    reader, writer = pty.openpty()
    process = subprocess.Popen(command, env=variables, stdout=writer, stderr=writer, stdin=writer)
    os.close(writer)
    output = b''
    try:
        while chunk := os.read(reader, 65536):
            output += chunk
    except OSError:  # Linux says so when the last writer has gone
        pass
    os.close(reader)
    assert process.wait() == 0, output.decode()
    return output.decode()


def without_colors(text):
    return re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', text)
