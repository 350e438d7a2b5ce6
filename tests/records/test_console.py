import math
import re
import sys

from processes import on_a_terminal, printed_by

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
CODE = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')


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
    assert re.fullmatch(r'step 1000/1000  took 0:00:0\d\n', capsys.readouterr().out)


def test_track_passes_everything_on(capsys):
    assert list(track(iter('abc'), 3, 'evaluating')) == ['a', 'b', 'c']
    assert re.fullmatch(r'evaluating  3/3  took 0:00:0\d\n', capsys.readouterr().out)


def test_a_stage_says_how_long_it_took():
    with console.terminal.capture() as printed, console.stage('compiling'):
        pass
    assert printed.get() == 'compiling: 0 s\n'


def test_piped_output_has_no_control_characters_even_under_force_color():
    output = printed_by(LOOP, FORCE_COLOR='1', NO_COLOR=None)
    assert output.splitlines()[0] == 'training  step 2/3  loss 0.25  images/s 85.25  waiting 3%'
    assert '[done] b' in output and 'evaluating  2/2' in output
    assert not {'\r', '\x1b'} & set(output)


def test_a_terminal_gets_a_bar_lines_above_it_and_colours_unless_they_are_unwanted():
    output = on_a_terminal(sys.executable, '-c', LOOP, COLUMNS='150')
    assert '\x1b[2K' in output and '━' in output and '\x1b[36m' in output
    for text in ('training step 3/3', 'evaluating 1/2', 'loss 0.1667  images/s 85.25  waiting 3%', '[done] b'):
        assert text in CODE.sub('', output)
    plain = on_a_terminal(sys.executable, '-c', LOOP, NO_COLOR='1')
    assert 'training' in plain
    codes = [code for style in CODE.findall(plain) if style[-1] == 'm' for code in style[2:-1].split(';')]
    assert all(int(code or 0) < 30 for code in codes)  # bold and such; 30 and above are colours
    assert '\x1b' not in on_a_terminal(sys.executable, '-c', LOOP, TERM='dumb')


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
