"""What users of command lines expect: --help, --quiet, --verbose, NO_COLOR, tab completion, an installed `effdet`."""

import json
import re
import shutil
import subprocess
import zipfile

import pytest
from processes import ROOT, effdet, on_a_terminal, python

import effdet_jax
from effdet_jax.commands.cli import COMMANDS

HEAVY = ('jax', 'flax', 'tensorflow', 'torch', 'matplotlib', 'cv2', 'grain', 'orbax')


# Help.


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_flag_and_waits_for_no_library(name):
    code, out, loaded = python('-X', 'importtime', '-m', 'effdet_jax', name, '--help', COLUMNS='1000')
    assert code == 0
    source = (ROOT / 'effdet_jax' / f'{COMMANDS[name].module.replace(".", "/")}.py').read_text()
    for flag in [*re.findall(r"DEFINE\w*\(\s*(?:cli\.PATH, )?'([\w-]+)'", source), 'quiet', 'verbose']:
        assert re.search(rf'^  --(\[no])?{flag} +\S', out, re.MULTILINE), flag
    if 'DEFINE_config_file' in source:
        assert '--config.train.epochs=40' in out
    modules = {line.rpartition('|')[2].strip().partition('.')[0] for line in loaded.splitlines()}
    assert 'absl' in modules
    assert modules.isdisjoint(HEAVY)


def test_the_overview_names_every_command():
    code, out, _ = effdet('--help')
    assert code == 0
    for name, command in COMMANDS.items():
        assert f'  {name} ' in out
        assert command.summary in out
    assert effdet() == (2, out, '')
    assert effdet('--version') == (0, f'{effdet_jax.__version__}\n', '')
    code, out, error = effdet('trian', '--workdir=W')
    assert (code, out) == (2, '')
    assert error == f'error: unknown command trian: choose one of {", ".join(COMMANDS)}\n'


def test_every_command_is_in_the_table():
    package = ROOT / 'effdet_jax'
    ends_in_run = {path for path in package.rglob('*.py') if 'cli.run(main' in path.read_text()}
    assert ends_in_run == {package / f'{command.module.replace(".", "/")}.py' for command in COMMANDS.values()}


# How much is said.

BOXES = 'image,xmin,ymin,xmax,ymax,label\nmissing.png,1,1,9,9,star\n'
SMALL = ('--config=configs/d0.py', '--config.dataset.train_split=0:9', '--config.dataset.eval_split=9:12')


@pytest.mark.slow
def test_quiet_leaves_results_and_errors():
    plan = ('plan', '--config=configs/quickstart.py', '--no-step', '--no-data')
    code, out, error = effdet(*plan)
    assert (code, error) == (0, '')
    assert 'counting parameters: ' in out
    code, quiet, error = effdet(*plan, '--quiet')
    assert (code, error) == (0, '')
    assert quiet.splitlines() == [line for line in out.splitlines() if not line.startswith('counting parameters: ')]
    assert effdet('plan', '--quiet')[2] == 'error: missing --config; see --help\n'


@pytest.mark.slow
def test_verbose_tells_where_an_error_comes_from():
    wrong = ('plan', '--config=configs/d0.py', '--memory=16')
    code, out, error = effdet(*wrong, '--verbose')
    *trace, last = error.splitlines()
    assert (code, out) == (1, '')
    assert trace[0] == 'Traceback (most recent call last):'
    assert last == effdet(*wrong)[2].strip()
    code, _, error = effdet(*wrong, '--verbose', '--quiet')
    assert (code, error) == (2, 'error: --quiet and --verbose contradict each other: give only one of them\n')


# Tab completion.


@pytest.fixture(scope='module')
def tab(tmp_path_factory):
    """`tab('effdet tr')`: what bash puts in the place of the last word, or of what stands behind its `=`."""
    script = tmp_path_factory.mktemp('completion') / 'effdet.bash'
    script.write_text(effdet('completion', 'bash')[1])
    ask = 'source "$1"; COMP_LINE=$2; COMP_POINT=${#2}; _effdet; printf "%s\\n" "${COMPREPLY[@]}"'

    def complete(line):
        command = ['bash', '--norc', '-c', ask, 'bash', script, line]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()

    return complete


def test_bash_completes_commands_flags_keys_choices_and_paths(tab):
    assert tab('effdet ') == list(COMMANDS)
    assert tab('effdet tr') == ['train']
    assert tab('effdet train --w') == ['--workdir=']
    assert tab('effdet predict --cr') == ['--crop']
    assert tab('effdet train --config=configs/qui') == ['configs/quickstart.py']
    assert tab('effdet train --config.train.batch') == ['--config.train.batch_size=']
    assert tab('effdet predict --config.train.batch') == []  # has no config
    assert tab('effdet train --mode=') == ['train', 'eval']
    assert tab('effdet eval --workdir=exper') == ['experiments']  # readline adds the slash
    assert tab('effdet predict --workdir=runs/a --out=b READ') == ['README.md']


def test_bash_knows_that_effdet_is_completed(tmp_path):
    """A terminal, a tab: readline and all."""
    (tmp_path / 'effdet.bash').write_text(effdet('completion', 'bash')[1])
    source, line = f'source {tmp_path}/effdet.bash\n', 'effdet train --config=configs/qui\t'
    keys = f'{source}{line}\x01echo \nexit\n'  # \x01: to the start of the line
    written = on_a_terminal('bash', '--norc', '--noprofile', '-i', keys=keys.encode())
    assert 'effdet train --config=configs/quickstart.py' in written


def test_an_unknown_shell_is_bad_usage():
    assert effdet('completion', 'fish') == (2, '', 'error: name one shell: bash or zsh\n')


# From Python.

IMPORTS = """
import sys
import effdet_jax
assert {'Detector', 'train_and_evaluate'} <= set(dir(effdet_jax)) and not hasattr(effdet_jax, 'detector')
print(*sys.modules)
from effdet_jax import Detector, train_and_evaluate
from effdet_jax import inference, train
assert Detector is inference.Detector and train_and_evaluate is train.train_and_evaluate
"""


def test_the_package_loads_libraries_on_first_use():
    code, out, error = python('-c', IMPORTS)
    assert code == 0, error
    assert set(HEAVY).isdisjoint(out.split())


# Installed.


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A folder with what `pip install` puts into site-packages."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    for name in ('effdet_jax', 'configs'):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    for path in [
        *ROOT.glob('requirements*.txt'),
        *(ROOT / name for name in ('pyproject.toml', 'README.md', 'LICENSE')),
    ]:
        shutil.copy(path, source)
    build = ('-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '--no-index', '-q', '-w', folder, source)
    code, _, error = python(*build, cwd=folder)
    assert code == 0, error
    (wheel,) = folder.glob('effdet_jax-*.whl')
    zipfile.ZipFile(wheel).extractall(folder / 'site')
    return folder / 'site'


def test_a_wheel_has_the_command_the_configs_the_templates_and_the_requirements(site):
    assert {path.name.partition('-')[0] for path in site.iterdir()} == {'effdet_jax'}  # no top-level `configs`
    (metadata,) = site.glob('*.dist-info')
    assert 'effdet = effdet_jax.__main__:main' in (metadata / 'entry_points.txt').read_text()
    required = re.findall(r'^Requires-Dist: (\S+)$', (metadata / 'METADATA').read_text(), re.MULTILINE)
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    assert required == [line.partition('#')[0].strip() for line in lines if line.partition('#')[0].strip()]
    for folder in ('records/templates', 'configs'):
        ours = ROOT / 'effdet_jax' / folder
        assert {path.name for path in ours.iterdir() if path.is_file()} == {
            path.name for path in (site / 'effdet_jax' / folder).iterdir()
        }


def test_a_wheel_is_typed(site):
    assert (site / 'effdet_jax' / 'py.typed').is_file()


def test_an_installed_command_finds_its_configs_from_any_folder(site, tmp_path):
    show = (
        'import sys; from effdet_jax import main; from effdet_jax.commands import cli;'
        'sys.argv = ["main", *sys.argv[1:]];'
        'cli.run(lambda rest: print(main.CONFIG.value.to_json_best_effort()))'
    )
    code, out, error = python('-c', show, '--config=configs/d3.py:voc2007', cwd=tmp_path, PYTHONPATH=str(site))
    assert (code, error) == (0, '')
    assert json.loads(out)['name'] == 'd3'
    assert effdet('train', '--help', cwd=tmp_path, PYTHONPATH=str(site))[0] == 0
    (tmp_path / 'configs').mkdir()  # a file of one's own comes first
    own = tmp_path / 'configs' / 'd3.py'
    own.write_text(
        'from effdet_jax.configs import default\n\ndef get_config():\n    return default.get_config("lite4")\n'
    )
    _, out, _ = python('-c', show, '--config', 'configs/d3.py', cwd=tmp_path, PYTHONPATH=str(site))
    assert json.loads(out)['name'] == 'lite4'
