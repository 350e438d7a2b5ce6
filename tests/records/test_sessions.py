import json

import pytest

from effdet_jax.errors import UserError
from effdet_jax.records import sessions


def test_every_start_is_a_line(tmp_path):
    assert sessions.read_sessions(tmp_path) == []
    sessions.record_session(tmp_path, 0, '8 x TPU v4 on 1 host')
    sessions.record_session(tmp_path, 400, '1 x cpu on 1 host')
    first, second = sessions.read_sessions(tmp_path)
    assert (first['step'], first['devices']) == (0, '8 x TPU v4 on 1 host')
    assert (second['step'], second['devices']) == (400, '1 x cpu on 1 host')
    assert first['versions'].keys() == set(sessions.PACKAGES)
    assert 'cores' in first['host'] and 'Python 3' in first['system'] and first['started'].endswith('+00:00')


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert sessions.describe_session(0, 'cpu')['commit'] == ''


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / sessions.FILE).write_text(json.dumps({'step': 0}) + '\n{"step"')
    with pytest.raises(UserError, match=r'sessions\.jsonl is damaged'):
        sessions.read_sessions(tmp_path)
