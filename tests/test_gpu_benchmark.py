"""The GPU benchmark without a GPU: its parts, what it writes, the packages it brings along."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.benchmarks import depthwise, gpu, peer_systems, wheels
from experiments.benchmarks.depthwise import Layer
from experiments.reliability import resume

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MACHINE = {'GPU': 'none'}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """`script(name, text)`: a part whose command is a module of this text."""
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))

    def write(name, text, share=1.0):
        (tmp_path / f'{name}.py').write_text(text)
        return gpu.Part(name, f'the part {name}', share, (name, '--limit={limit}'), ('--tiny',))

    return write


GOOD = """
import os, sys
(out,) = (a.partition('=')[2] for a in sys.argv if a.startswith('--out='))
open(out, 'w').write('{"figure": 1}')
print('| a table |', sys.argv[1:3], os.environ['JAX_PLATFORMS'])
print('noise', file=sys.stderr)
"""


def test_a_part_that_fails_or_takes_too_long_ends_alone(script, tmp_path):
    hangs = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    parts = [
        script('hangs', hangs + "print('half a table', flush=True); time.sleep(60)"),
        script('breaks', "raise ValueError('out of memory')", 2.0),
        script('works', GOOD, 2.0),
    ]
    failed = gpu.run_parts(parts, tmp_path / 'out', MACHINE, limit=20.0, tiny=True)
    assert failed == ['hangs', 'breaks']
    report = json.loads((tmp_path / 'out' / 'gpu.json').read_text())
    assert {name: end['state'] for name, end in report['parts'].items()} == {
        'hangs': 'out of time', 'breaks': 'failed', 'works': 'done',
    }  # fmt: skip
    assert 3.9 < report['parts']['hangs']['seconds'] < 40  # a fifth of the time, and what it had started is gone too
    assert report['parts']['breaks']['last lines'][-1] == 'ValueError: out of memory'
    page = (tmp_path / 'out' / 'gpu.md').read_text()
    assert 'half a table' in page and 'ValueError: out of memory' in page
    assert "| a table | ['--limit=" in page and "'--tiny'] cpu" in page
    assert json.loads((tmp_path / 'out' / 'works.json').read_text()) == {'figure': 1}
    assert 'noise' in (tmp_path / 'out' / gpu.LOG).read_text() and 'noise' not in page


def test_after_each_part_all_is_written_that_is_known(script, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(gpu, 'write_atomically', lambda path, content: written.append((path.name, content.decode())))
    gpu.run_parts([script('a', GOOD), script('b', GOOD)], tmp_path / 'out', MACHINE, limit=60.0, tiny=False)
    assert [name for name, _ in written] == ['gpu.json', 'gpu.md'] * 2
    assert [list(json.loads(text)['parts']) for name, text in written if name == 'gpu.json'] == [['a'], ['a', 'b']]
    assert "'] cuda,cpu" in written[-1][1]  # jax then fails where there is no GPU, and does not fall back


@pytest.mark.parametrize('part', gpu.PARTS, ids=gpu.NAMES)
def test_the_flags_of_every_part_exist(part):
    """And those of the rehearsal: an unknown one would be refused when the GPU is there."""
    source = (ROOT / f'{part.command[0].replace(".", "/")}.py').read_text()
    for flag in (*part.command[1:], *part.tiny):
        name, _, value = flag.removeprefix('--').partition('=')
        defined = f"'{name.partition('.')[0]}'", f"'--{name}'"
        assert name == 'quiet' or any(text in source for text in defined), flag
        if name == 'case':
            assert [peer_systems.parse_case(text) for text in value.split(',')]
        elif name == 'systems':
            assert set(value.split(',')) <= set(peer_systems.SYSTEMS)


def test_the_largest_batch_of_d7x_is_asked_of_d7x_with_remat():
    command = next(part.command for part in gpu.PARTS if part.name == 'memory')
    assert {'--largest', '--config=configs/d7x.py', '--config.model.remat=True'} <= set(command)


# Depthwise convolutions.


def test_the_layers_of_d0_are_those_of_the_paper():
    layers = depthwise.layers_of('d0', 512)
    assert layers[Layer(256, 256, 32, 3, 1)] == 1  # the first block
    assert layers[Layer(256, 256, 96, 3, 2)] == 1
    assert layers[Layer(16, 16, 1152, 5, 1)] == 3
    assert layers[Layer(64, 64, 64, 3, 1)] == 3 + 2 * (3 + 1)  # P3: a node in each of 3 cells, then two heads
    assert sum(layers.values()) == 16 + 3 * 8 + 2 * (3 + 1) * 5


def test_what_a_call_moves_at_least():
    assert Layer(8, 6, 10, 3, 1).bytes(batch=2, item=2) == 2 * 2 * 10 * (48 + 48)
    assert Layer(7, 6, 10, 3, 2).bytes(batch=1, item=4) == 4 * 10 * (42 + 4 * 3)


@pytest.mark.parametrize(('kernel', 'stride', 'size'), [(3, 1, 7), (3, 2, 8), (5, 2, 7)])
def test_both_forms_are_one_function(kernel, stride, size):
    keys = jax.random.split(jax.random.key(0), 2)
    x, k = jax.random.normal(keys[0], (2, size, size, 4)), jax.random.normal(keys[1], (kernel, kernel, 1, 4))

    def gradients(form):
        return jax.grad(lambda x, k: jnp.sum(form(x, k, stride) ** 2), (0, 1))(x, k)

    for ours, theirs in zip(*(gradients(form) for form in depthwise.FORMS.values()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_table_of_depthwise_convolutions_has_sums_and_shares():
    seconds = {name: dict.fromkeys(depthwise.DIRECTIONS, 2e-3) for name in depthwise.FORMS}
    del seconds['lax']['kernel gradient']
    rows = [
        {'network': 'd0:512:64', 'layer': [8, 8, 4, 3, 1], 'count': 3, 'batch': 1, 'bytes': 10**6, 'seconds': seconds}
    ]
    report = {'dtype': 'bfloat16', 'device': 'H', 'peak': {'bandwidth': 1e9, 'source': 'data sheet'}}
    text = depthwise.summary(report, rows, wanted=7)
    assert '1 of 7 shapes' in text and '1,000 GB/s' not in text
    (total,) = (line for line in text.splitlines() if 'sum of the layers measured' in line)
    assert '6 (50%)' in total and '| -' in total
    assert '8x8x4, 3x3 / 1' in text and '2 (50%)' in text


# Killed and continued.


@pytest.fixture
def runs(tmp_path):
    """`runs(name, value, losses)`: a work directory with a checkpoint of step 2 and a loss a step."""

    def write(name, value, losses):
        state = {'params': {'a': np.zeros(3, np.float32), 'b': np.array([value], np.float32)}}
        ocp.PyTreeCheckpointer().save((tmp_path / name / 'checkpoints/2/state').absolute(), state)
        lines = [json.dumps({'step': step, 'train/loss': loss}) for step, loss in enumerate(losses, start=1)]
        (tmp_path / name / 'metrics.jsonl').write_text(''.join(f'{line}\n' for line in lines))
        return tmp_path / name

    return write


def test_equal_and_different_bits_are_told_apart(runs):
    a, b, c = runs('a', 1.0, [3.0, 2.0]), runs('b', 1.0, [3.0, 2.0]), runs('c', -0.5, [3.0, 2.5])
    assert resume.compare(a, b, 2)['arrays that differ'] == 0
    assert resume.compare(a, c, 2) == {
        'arrays': 2, 'arrays that differ': 1, 'largest difference': 1.5, 'first loss that differs': 2,
        'losses': [2.0, 2.5],
    }  # fmt: skip
    text = resume.summary({'as it is': resume.compare(a, c, 2), 'deterministic': {'failed': 'unknown flag'}})
    assert 'no ' in text and 'unknown flag' in text
    assert resume.compare(runs('minus', -0.0, []), runs('plus', 0.0, []), 2)['arrays that differ'] == 1


# Peers.


def test_a_system_that_fails_is_named_and_the_rest_is_written(tmp_path):
    out = tmp_path / 'peers.json'
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.benchmarks.peers', '--case=infer:no_such_model:64:1', '--systems=eager',
         '--quiet', f'--out={out}'],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert done.returncode == 1
    assert 'effdet eager: no weights or inputs: see the error above' in done.stdout
    assert done.stderr.splitlines()[-1].startswith('error: not measured: infer:no_such_model:64:1: ours; ')
    assert set(json.loads(out.read_text())['cases']['infer:no_such_model:64:1']) == {'ours', 'eager'}


# Packages that are brought along.


def test_what_is_brought_along_lacks_jax_and_torch_and_is_pinned():
    listed = wheels.listed(wheels.LIST.read_text())
    assert all(line.count('==') == 1 for line in listed)
    names = {line.partition('==')[0] for line in listed}
    assert {'ml-collections', 'grain', 'effdet'} <= names
    assert not any(name.startswith(('jax', 'torch', 'nvidia')) for name in names - {'jaxtyping'})


def test_only_what_is_missing_is_installed_and_without_a_network(tmp_path):
    def wheel(name):
        with zipfile.ZipFile(tmp_path / f'{name}-1.0-py3-none-any.whl', 'w') as file:
            info = f'{name}-1.0.dist-info'
            file.writestr(f'{name}.py', '')
            file.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
            file.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            file.writestr(f'{info}/RECORD', '')

    wheel('numpy')
    wheel('surely_missing_here')
    assert wheels.install(tmp_path, tmp_path / 'site') == ['surely_missing_here']
    assert {path.name for path in (tmp_path / 'site').glob('*.py')} == {'surely_missing_here.py'}
    with pytest.raises(SystemExit, match='no wheels in'):
        wheels.install(tmp_path / 'site', tmp_path / 'other')


def test_a_folder_of_wheels_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, '_pip', lambda *_: (tmp_path / 'a.whl').write_bytes(b'x' * 11))
    assert wheels.collect(['a==1'], tmp_path, most=11) == 11
    with pytest.raises(SystemExit, match='wheels, more than'):
        wheels.collect(['a==1'], tmp_path, most=10)
