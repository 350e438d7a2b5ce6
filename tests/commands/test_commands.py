"""Commands as a user starts them: the exit code, and one line that says what to do."""

import json
import shutil

import pytest
import tiny
from processes import ROOT, printed_by, python

from effdet_jax import config as run_config
from effdet_jax.commands.cli import COMMANDS
from effdet_jax.configs import quickstart

DOORS = {'main': ('effdet_jax.main',), '__main__': ('effdet_jax',)}  # of all others `effdet_jax COMMAND`


def start(command, *arguments, cwd=ROOT, **environment):
    """(exit code, stdout, stderr)."""
    return python('-m', *DOORS.get(command, ('effdet_jax', command)), *arguments, cwd=cwd, **environment)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'error: missing --config; see'),
        (('--config=configs/d0.py', '--workdir='), 'flag --workdir=: the path is empty'),
        (('--config=configs/d9.py', '--workdir=W'), 'error: config file configs/d9.py does not exist'),
        (('--config=configs/d0.py', '--config.trian.epochs=3', '--workdir=W'), 'trian'),
        (('--config=configs/d0.py', '--config.train.epoch=3', '--workdir=W'), 'epoch'),
        (('--config=configs/d0.py', '--config.train.epochs=many', '--workdir=W'), 'many'),
        (('--config=configs/d0.py:voc2008', '--workdir=W'), "'voc2008' is unknown: choose a data set (shapes, voc2007"),
        (
            ('--config=configs/own_data.py:report', '--workdir=W'),
            "'report' is no member of the family: choose one of d0",
        ),
        (('--config=configs/d0.py', '--workdir=W', '--wrokdir=W'), 'wrokdir'),
        (('--config=configs/d0.py', '--workdir=W', '--mode=tain'), 'tain'),
        (('--config=configs/d0.py', '--workdir=W', 'resume'), 'resume'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message):
    code, out, error = start('main', *arguments)
    assert (code, out) == (2, '')
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    assert message in error
    assert not (ROOT / 'W').exists()


# The config, checked by every command that takes one before it does anything.

SHAPES = ('--config=configs/d0.py', '--config.dataset.train_split=0:9', '--config.dataset.eval_split=9:12')
TAKES_A_CONFIG = {
    'main': ('--workdir=W',), 'check-data': (), 'plan': (), 'report': ('--workdir=W',), 'benchmark': (),
    'import-weights': ('--workdir=W', '--source=README.md'),
}  # fmt: skip


def test_every_command_that_takes_a_config_is_tested():
    doors = {'main': 'main'} | {n: command.module for n, command in COMMANDS.items() if command.module != 'main'}
    sources = {n: (ROOT / 'effdet_jax' / f'{m.replace(".", "/")}.py').read_text() for n, m in doors.items()}
    assert {name for name, source in sources.items() if 'DEFINE_config_file' in source} == TAKES_A_CONFIG.keys()


@pytest.mark.parametrize('command', TAKES_A_CONFIG)
def test_a_wrong_value_is_one_line_and_exit_code_2(command):
    wrong = '--config.eval.nms=soft'
    reason = "error: config.eval.nms='soft' is unknown: choose one of gaussian, hard\n"
    assert start(command, *SHAPES, wrong, *TAKES_A_CONFIG[command]) == (2, '', reason)
    assert not (ROOT / 'W').exists()


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.image.size=512x640', "config.image.size=('512x640',): give height and width in pixels"),
        ('--config.train.epochs=nan', 'config.train.epochs=nan: give a number above 0'),
        ('--config.train.epochs=None', 'config.train.epochs=None: give a number above 0'),
        ('--config.dataset.class_names=cup,plate', "config.dataset.class_names='cup,plate': give every class a name"),
        ('--config.train.batch_size=8.5', "config.train.batch_size='8.5': give a whole number from 1"),
        ('--config.augment.flip=2', "config.augment.flip='2': give True or False"),
        ('--config.train.epoch=3', 'bad flags: \'epoch\' Did you mean "epochs"'),
        ('--config.model.cells=3', 'error: config.model.cells is now config.model.fpn_cells: use that name'),
    ],
)
def test_what_else_is_wrong_with_a_flag_of_the_config(flag, message):
    code, out, error = start('check-data', *SHAPES, flag)
    assert (code, out) == (2, '')
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        ('config.image.size = 512', "bad flags: TypeError: Could not override field 'size'"),
        ('config.image.size = (512, -1)', 'error: config.image.size=(512, -1): give height and width'),
        ('config.model.cells = 3', 'error: config.model.cells is now config.model.fpn_cells: use that name'),
        ('config.train.epochs = config.train.accumulate', 'error: config.train.accumulate is now config.train.gra'),
        ("open('/nowhere')", "No such file or directory: '/nowhere'"),
        ('config = {}', "bad flags: 'dict' object has no attribute"),
        ('del config.train.epochs', 'error: config.train.epochs is missing: start from'),
    ],
)
def test_what_is_wrong_in_a_config_file_is_one_line(body, message, tmp_path):
    lines = ['from effdet_jax.configs import default', 'def get_config():', '    config = default.get_config("d0")']
    (tmp_path / 'mine.py').write_text('\n'.join([*lines, f'    {body}', '    return config', '']))
    code, out, error = start('check-data', f'--config={tmp_path}/mine.py')
    assert (code, out) == (2, '')
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.slow
def test_a_run_with_a_wrong_value_is_one_line_until_a_flag_corrects_it(tmp_path):
    c = tiny.config()
    c.eval.nms = 'soft'
    run_config.save(c, tmp_path)
    reason = "config.eval.nms='soft' is unknown: choose one of gaussian, hard\n"
    saved = f'--config=configs/saved.py:{tmp_path}'
    assert start('check-data', saved) == (2, '', f'error: {reason}')
    assert start('check-data', saved, '--config.eval.nms=hard')[::2] == (0, '')
    detecting = {'predict': ('README.md', f'--out={tmp_path}/out'), 'export': (f'--out={tmp_path}/out',)}
    for command, arguments in detecting.items():
        printed = start(command, f'--workdir={tmp_path}', *arguments)
        assert printed == (1, '', f'error: {tmp_path}/config.json: {reason}')
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']


@pytest.mark.parametrize(
    ('command', 'arguments', 'address'),
    [
        ('main', ('--config=configs/d0.py', '--workdir=gs://bucket/run'), 'gs://bucket/run'),
        ('main', ('--config=configs/d0.py', '--workdir=S3://bucket/run'), 'S3://bucket/run'),
        ('main', ('--config', 'gs://bucket/d0.py', '--workdir=W'), 'gs://bucket/d0.py'),
        ('main', ('--config=configs/saved.py:gs://bucket/run',), 'gs://bucket/run'),
        ('main', ('--config=configs/d0.py', '--config.train.init_from=gs://bucket/run'), 'gs://bucket/run'),
        ('main', ('--config=configs/d0.py', '--config.dataset.source=voc:gs://bucket/voc'), 'gs://bucket/voc'),
        ('plan', ('--config=configs/d0.py', '--config.dataset.train_split=coco:a.json,s3://b/i'), 's3://b/i'),
        ('plan', ('--config=configs/d0.py', '--no-data', '--draw=gs://bucket/a.svg'), 'gs://bucket/a.svg'),
        ('plan', ('--config=configs/d0.py', '--no-data', '--out=gs://bucket/a.md'), 'gs://bucket/a.md'),
        ('check-data', ('--config=configs/d0.py', '--out=gs://bucket/a'), 'gs://bucket/a'),
        ('benchmark', ('--config=configs/d0.py', '--profile=gs://bucket/a'), 'gs://bucket/a'),
        ('benchmark', ('--config=configs/d0.py', '--out=gs://bucket/a'), 'gs://bucket/a'),
        ('report', ('--workdir=http://host/run',), 'http://host/run'),
        ('report', ('--workdir=W', '--out=hdfs://host/a.html'), 'hdfs://host/a.html'),
        ('export', ('--workdir=gs://bucket/run', '--out=W'), 'gs://bucket/run'),
        ('export', ('--workdir=W', '--out=gs://bucket/d0.zip'), 'gs://bucket/d0.zip'),
        ('predict', ('--workdir=gs://bucket/run', '--out=W', 'README.md'), 'gs://bucket/run'),
        ('predict', ('--workdir=W', '--out=gs://bucket/found', 'README.md'), 'gs://bucket/found'),
        ('import-weights', ('--config=configs/d0.py', '--source=https://host/d0.pth', '--workdir=W'), 'https://host/d0.pth'),
        ('import-weights', ('--config=configs/d0.py', '--source=a', '--workdir=gs://bucket/a'), 'gs://bucket/a'),
        ('import-weights', ('--config=configs/d0.py', '--source=a', '--workdir=W', '--certify=gs://b/a'), 'gs://b/a'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else value,
)  # fmt: skip
def test_an_address_is_refused_at_once_wherever_a_path_is_asked_for(command, arguments, address, tmp_path):
    code, out, error = start(command, *arguments, cwd=tmp_path)
    message = 'is an address, and only local files and folders work: mount or download it, and give that path'
    assert (code, out, error) == (2, '', f'error: {address} {message}\n')
    assert list(tmp_path.iterdir()) == []


def test_images_at_an_address_are_refused(tmp_path):
    code, out, error = start('predict', '--workdir=W', '--out=W', 'https://host/a.jpg', cwd=tmp_path)
    assert (code, out) == (1, '')
    assert error.startswith('error: https://host/a.jpg is an address, ')


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_path(tmp_path):
    home, here = tmp_path / 'home', tmp_path / 'here'
    (home / 'mine').mkdir(parents=True)
    here.mkdir()
    config = '--config=~/mine/own.py'
    (home / 'mine' / 'own.py').write_text((ROOT / 'configs' / 'quickstart.py').read_text())
    plan = ('plan', config, '--no-step', '--no-data', '--out=~/plan.md', '--draw=~/network.svg')
    code, _, error = start(*plan, cwd=here, HOME=str(home))
    assert (code, error) == (0, '')
    assert {path.name for path in home.iterdir()} >= {'plan.md', 'network.svg'}
    reason = f'error: {home}/run/config.json does not exist: give the --workdir of a training run\n'
    assert start('report', '--workdir=~/run', cwd=here, HOME=str(home)) == (1, '', reason)
    train = ('main', config, '--workdir=~/run', '--config.train.init_from=~/other')
    code, _, error = start(*train, cwd=here, HOME=str(home))
    assert code == 1
    assert error.startswith(f'error: {home}/other holds no checkpoints: set config.train.init_from to a run')
    assert list(here.iterdir()) == []
    unknown = 'error: ~nobody-of-this-name/run: there is no such home folder: write the whole path\n'
    assert start('report', '--workdir=~nobody-of-this-name/run') == (2, '', unknown)


def test_a_run_without_a_workdir_is_called_after_its_config():
    names = {
        'configs/d3.py': 'runs/d3',
        '/elsewhere/mine.py': 'runs/mine',
        'configs/d3.py:voc2007,report': 'runs/d3_voc2007_report',
        'mine.py:/data/../x': 'runs/mine_data_.._x',
        f'{ROOT}/configs/saved.py:out/d3': 'out/d3',
    }
    show = 'import sys; from effdet_jax import main; print(*map(main.default_workdir, sys.argv[1:]))'
    assert printed_by(show, *names).split() == list(names.values())


def test_the_cards_command_trains_in_its_own_folder_and_says_so(tmp_path):
    code, out, error = start('main', '--config=configs/d3.py:voc2007', cwd=tmp_path, TFDS_DATA_DIR=str(tmp_path))
    assert (code, out) == (1, 'work directory: runs/d3_voc2007 (--workdir=DIR chooses another)\n')
    assert error.startswith('error: voc/2007 is not prepared in ')


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_folder_of_another_run_is_refused_where_no_workdir_is_given(mode, tmp_path):
    config = quickstart.get_config()
    config.image.size = (64, 64)
    run_config.save(config, tmp_path / 'runs' / 'quickstart')
    code, out, error = start('main', '--config=configs/quickstart.py', f'--mode={mode}', cwd=tmp_path)
    assert code == 1
    assert out.startswith('work directory: runs/quickstart ')
    assert error.startswith('error: runs/quickstart belongs to a run with another config (')
    assert 'image.size: [64, 64] there, [128, 128] now' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    ('command', 'module'), [*((command, 'fcntl') for command in (*COMMANDS, 'main', '__main__')), ('train', 'resource')]
)
def test_on_windows_every_command_asks_for_wsl(command, module, tmp_path):
    (tmp_path / f'{module}.py').write_text(f'raise ModuleNotFoundError("No module named {module}")')
    code, out, error = start(command, '--help', PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert (code, out) == (1, '')
    assert error.startswith('error: effdet_jax runs on Linux and macOS: on Windows, install and start it inside WSL ')
    assert error.count('\n') == 1


def test_importing_the_detector_on_windows_asks_for_wsl(tmp_path):
    (tmp_path / 'fcntl.py').write_text('raise ModuleNotFoundError("No module named fcntl")')
    _, _, error = python('-c', 'from effdet_jax.inference import Detector', PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert error.splitlines()[-1].startswith('ImportError: effdet_jax runs on Linux and macOS: on Windows, ')


@pytest.mark.parametrize('command', ['__main__', 'main', 'report', 'completion'])
def test_a_checkout_without_links_is_told_in_one_line(command, tmp_path):
    shutil.copytree(
        ROOT / 'effdet_jax', tmp_path / 'effdet_jax', ignore=shutil.ignore_patterns('configs', '__pycache__')
    )
    (tmp_path / 'effdet_jax' / 'configs').write_text('../configs')  # as git leaves it
    code, out, error = start(command, '--help', cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (code, out) == (1, '')
    assert error.startswith(f'error: {tmp_path}/effdet_jax/configs is not a link to the folder configs: ')
    assert error.count('\n') == 1


def test_a_report_needs_a_run(tmp_path):
    assert start('report') == (2, '', 'error: missing --workdir; see --help\n')
    reason = f'error: {tmp_path}/config.json does not exist: give the --workdir of a training run\n'
    assert start('report', f'--workdir={tmp_path}') == (1, '', reason)


def test_missing_data_is_one_line_that_says_how_to_get_it(tmp_path):
    workdir = tmp_path / 'run'
    code, out, error = start(
        'main', '--config=configs/d3.py:voc2007', f'--workdir={workdir}', TFDS_DATA_DIR=str(tmp_path)
    )
    assert (code, out) == (1, '')
    assert error.startswith('error: voc/2007 is not prepared in ')
    assert 'download_and_prepare' in error
    assert error.count('\n') == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        (('README.md',), 2, 'missing --workdir and --out; see'),
        (('--workdir=nowhere', '--out=W', 'nowhere'), 1, 'error: nowhere does not exist'),
        (('--workdir=nowhere', '--out=W'), 2, 'name at least one image, video, folder or pattern'),
    ],
)
def test_predict_needs_a_run_and_images(arguments, code, message):
    returned, _, error = start('predict', *arguments)
    assert returned == code
    assert message in error
    assert error.count('\n') == 1
    assert not (ROOT / 'W').exists()


def test_check_data_fails_where_there_is_an_error_and_writes_only_what_it_is_told_to(tmp_path):
    (tmp_path / 'boxes.csv').write_text('image,xmin,ymin,xmax,ymax,label\nmissing.png,1,1,9,9,star\n')
    config = ('--config=configs/d0.py', '--config.dataset.train_split=0:9', '--config.dataset.eval_split=9:12')
    code, out, error = start('check-data', *config, f'--config.dataset.train_split=csv:{tmp_path}/boxes.csv',
                             f'--out={tmp_path}/found')  # fmt: skip
    assert (code, error) == (1, '')
    assert 'missing.png: no such file: add the file' in out
    found = json.loads((tmp_path / 'found' / 'check.json').read_text())['findings']
    assert [f['file'] for f in found if f['kind'] == 'missing_image'] == [f'{tmp_path}/missing.png']
    code, out, error = start('check-data', *config)
    assert (code, error) == (0, '')
    assert '0 errors' in out
    assert {path.name for path in tmp_path.iterdir()} == {'boxes.csv', 'found'}


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        ((), 2, 'error: missing --config; see'),
        (('--config=configs/d0.py', '--fit', '--no-data'), 2, '--fit needs the data'),
        (('--config=configs/d0.py', '--memory=16'), 1, 'error: --memory=16 is not an amount of memory'),
        (('--config=configs/d0.py', '--batch=0'), 2, 'batch'),
    ],
)
def test_plan_says_what_is_wrong_in_one_line(arguments, code, message):
    returned, out, error = start('plan', *arguments)
    assert (returned, out) == (code, '')
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.slow
def test_a_plan_of_shapes_alone(tmp_path):
    out = tmp_path / 'plans' / 'quickstart.md'
    code, printed, error = start(
        'plan', '--config=configs/quickstart.py', '--no-step', '--no-data', '--batch=24', f'--out={out}'
    )
    assert (code, error) == (0, '')
    assert out.read_text().splitlines()[0] == 'Network: nano, 90 classes, 128x128 pixels'
    assert all(section in printed for section in out.read_text().split('\n\n'))
    assert 'batch 24 on ' in printed
