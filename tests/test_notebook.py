"""experiments/colab.ipynb, executed top to bottom as a newcomer would, with a network too small to find anything."""

import os
import shutil
import stat
import sys
from contextlib import nullcontext
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from effdet_jax.runtime import xla

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'experiments' / 'colab.ipynb'


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    commands = tmp_path / 'bin' / 'effdet'  # what pip makes of [project.scripts]
    commands.parent.mkdir()
    commands.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m effdet_jax "$@"\n')
    commands.chmod(commands.stat().st_mode | stat.S_IXUSR)
    environment = {
        'PATH': f'{commands.parent}:{os.environ["PATH"]}',
        'PYTHONPATH': str(ROOT),
        'EFFDET_TINY': '1',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': xla.known_flags('--xla_backend_optimization_level=0'),  # it compiles in half the time
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'jax'),
        'IPYTHONDIR': str(tmp_path / 'ipython'),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}).execute()
    printed = ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', ()))
    assert 'error:' not in printed  # a command that fails behind a `!` stops nothing
    assert (tmp_path / 'runs' / 'own' / 'report.html').exists()
    pictures = [
        output for cell in notebook.cells for output in cell.get('outputs', ()) if 'image/png' in output.get('data', {})
    ]
    assert len(pictures) >= 6


INSTALL = '%pip install --quiet "{source}" "{jax_for}"'


@pytest.mark.parametrize(
    ('folder', 'repository', 'source'),
    [
        (ROOT / 'experiments', '', ROOT),
        (Path('/'), 'https://host/effdet_jax.git', 'git+https://host/effdet_jax.git'),
        (Path('/'), '', None),
    ],
)
def test_it_installs_from_the_checkout_it_is_in_or_from_the_address_given(folder, repository, source, monkeypatch):
    cell = next(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if INSTALL in cell.source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shutil, 'which', lambda _: None)
    names = {'REPOSITORY': repository}
    with nullcontext() if source else pytest.raises(ValueError, match='REPOSITORY is empty'):
        exec(cell.replace(INSTALL, 'pass'), names)
    assert names.get('source') == source


def test_it_is_small_and_names_no_machine():
    content = NOTEBOOK.read_text()
    assert len(content) < 1_000_000
    assert '/tmp/' not in content
