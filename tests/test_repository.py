"""What the repository tells other tools: the workflow runs .ci/run, the citation has the version."""

import os
import re
from pathlib import Path

import yaml

import effdet_jax

ROOT = Path(__file__).parents[1]


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_workflow_checks_the_oldest_and_the_newest_python():
    *_, setup, check = read('.github/workflows/ci.yml')['jobs']['check']['steps']
    assert check == {'run': '.ci/run'}
    assert os.access(ROOT / '.ci/run', os.X_OK)
    supported = re.search("^SUPPORTED='(.*)'$", (ROOT / '.ci/run').read_text(), re.MULTILINE)[1].split()
    assert setup['with']['python-version'].split() == [supported[0], supported[-1]]


def test_the_citation_has_the_version_of_the_package():
    assert read('CITATION.cff')['version'] == effdet_jax.__version__


def test_hooks_and_the_issue_form():
    assert [hook['entry'].split()[0] for hook in read('.pre-commit-config.yaml')['repos'][0]['hooks']] == [
        'ruff',
        'ruff',
    ]
    assert {field['type'] for field in read('.github/ISSUE_TEMPLATE/bug.yml')['body']} == {'textarea'}
