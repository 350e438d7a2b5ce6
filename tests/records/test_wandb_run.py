import sys
from types import SimpleNamespace

import numpy as np
import pytest

from effdet_jax.errors import UserError
from effdet_jax.records.metrics import MetricsLog
from effdet_jax.records.wandb_run import WandbRun, import_wandb


class FakeError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """A module that remembers what it is told: `calls`, a list of (name, arguments)."""
    fake = SimpleNamespace(calls=[], Error=FakeError, Image=lambda rgb: ('image', rgb.shape))

    def note(name):
        return lambda *arguments, **named: fake.calls.append((name, *arguments, *([named] if named else [])))

    run = SimpleNamespace(
        log=note('log'),
        define_metric=note('define'),
        finish=note('finish'),
        config=SimpleNamespace(update=note('config')),
    )

    def init(**named):
        fake.calls.append(('init', named))
        return run

    fake.init, fake.run = init, run
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    return fake


def of(wandb, name):
    return [call[1] for call in wandb.calls if call[0] == name]


def test_it_gets_curves_pictures_and_the_config(wandb, tmp_path):
    with MetricsLog(tmp_path, mirror=WandbRun('team/cells', tmp_path)) as log:
        log.hyper_parameters({'train.epochs': 2.0}, ['train/loss'])
        log.write(1, {'train/loss': 0.5, 'eval/AP': float('nan')})
        log.pictures(1, {'eval/0': np.zeros((4, 6, 3), np.uint8)})
    (init,) = of(wandb, 'init')
    assert (init['entity'], init['project'], init['name'], init['dir']) == ('team', 'cells', tmp_path.name, tmp_path)
    assert of(wandb, 'config') == [{'train.epochs': 2.0}]
    assert of(wandb, 'log') == [{'step': 1, 'train/loss': 0.5}, {'step': 1, 'eval/0': ('image', (4, 6, 3))}]
    assert wandb.calls[-1] == ('finish',)


def test_a_run_that_continues_is_the_same_run_there(wandb, tmp_path):
    for step in (0, 5):
        MetricsLog(tmp_path, step, WandbRun('cells', tmp_path)).close()
    first, second = of(wandb, 'init')
    assert first == second
    assert first['resume'] == 'allow'
    MetricsLog(tmp_path / 'other', 0, WandbRun('cells', tmp_path / 'other')).close()
    assert of(wandb, 'init')[2]['id'] != first['id']


def test_its_failures_end_no_run(wandb, tmp_path, capsys):
    def fail(values):
        raise RuntimeError('no route')

    with MetricsLog(tmp_path, mirror=WandbRun('cells', tmp_path)) as log:
        wandb.run.log = fail
        log.write(1, {'train/loss': 0.5})
        log.write(2, {'train/loss': 0.4})
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 2
    assert capsys.readouterr().out == (
        'WARNING: logging to Weights & Biases failed and is off for this run (no route): training goes on\n'
    )


def test_a_refusal_says_the_way_out(wandb, tmp_path):
    def refuse(**named):
        raise FakeError('no API key')

    wandb.init = refuse
    with pytest.raises(UserError, match="wandb='cells': no API key: run `wandb login`, or set WANDB_MODE=offline"):
        WandbRun('cells', tmp_path)


@pytest.mark.parametrize('module', [None, SimpleNamespace()])  # not installed; a folder of that name
def test_where_it_is_not_installed_the_way_out_is_told(module, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', module)
    with pytest.raises(UserError, match='not installed: pip install wandb'):
        import_wandb('cells')
