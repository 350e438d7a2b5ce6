"""README.md and docs/: the commands they show are accepted, config keys exist, tables agree with the code.

The Python they show runs in tests/commands/test_exporter.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from effdet_jax.commands.cli import COMMANDS
from effdet_jax.config import flatten
from effdet_jax.configs import default
from effdet_jax.configs.recipes import RECIPES
from effdet_jax.configs.scaling import SCALES

ROOT = Path(__file__).parents[1]
FILES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in FILES}
KEYS = dict(flatten(default.get_config('d0').to_dict()))
CODE = re.compile(r'`([^`\n]+)`')

# Reads commands from stdin and prints those that are refused. Each is parsed in a process of its own, as the command
# itself does it; there it ends.
PARSE = """
import json, os, sys
from effdet_jax import __main__
from effdet_jax.commands import cli
def parse(main, *arguments, **options):
    cli.parse(sys.argv, *arguments, **options)
    os._exit(0)
cli.run = parse
refused = []
for words in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        sys.argv = ['effdet', *words]
        try:
            __main__.main()
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        refused.append(words)
print(json.dumps(refused))
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a page: in shell blocks with their variables, in sentences, and flags alone."""
    for block in blocks(text, 'bash'):
        variables = dict(re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE))
        for line in block.replace('\\\n', '').splitlines():
            yield from words_of(re.sub(r'\$(\w+)', lambda found: variables[found[1]], line))  # noqa: B023
    for shown in CODE.findall(re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)):
        if re.match(r'(python -m|effdet) .*--(config|workdir)=', shown):
            yield from words_of(shown)
        elif re.match(r'--config\.[\w.]+=.', shown):
            yield ['effdet', 'train', '--config=configs/d0.py', *shlex.split(shown)]


def words_of(line: str) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*shlex.split(line, comments=True), '&&']:
        if word == '&&':
            yield command
            command = []
        elif ' && ' in word:  # commands for another shell
            yield from words_of(word.partition('=')[2])
        else:
            command.append(word)


def arguments_of(command: list[str]) -> list[str] | None:
    """What follows `effdet` in a command of this package; None for others."""
    module = command[command.index('-m') + 1] if '-m' in command else ''
    rest = command[command.index(module) + 1 :] if module else command[1:]
    if module == 'effdet_jax.main':
        return ['train', *rest]
    return rest if 'effdet_jax' in module or command[:1] == ['effdet'] else None


@pytest.mark.parametrize('page', PAGES)
def test_commands_are_accepted(page, tmp_path):
    shown = list(commands(PAGES[page]))
    for command in shown:
        for word in command:
            assert not word.startswith('requirements') or (ROOT / word).is_file(), command
            assert not re.fullmatch(r'experiments\.[\w.]+', word) or find_spec(word), command
    for workdir in re.findall(r'\bruns/\w+', PAGES[page]):  # whose own config may be meant
        (tmp_path / workdir).mkdir(parents=True, exist_ok=True)
        (tmp_path / workdir / 'config.json').write_text(json.dumps(default.get_config('d0').to_dict()))
    done = subprocess.run(
        [sys.executable, '-c', PARSE], cwd=tmp_path, capture_output=True, text=True, check=False,
        input=json.dumps([words for words in map(arguments_of, shown) if words is not None]),
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [], done.stderr


@pytest.mark.parametrize(
    'page', sorted(PAGES.keys() - {'docs/reference.md'})
)  # which also names keys of the official code
def test_config_keys_exist(page):
    shown = ' '.join(CODE.findall(PAGES[page]))
    for key in re.findall(r'(?<![\w.])config\.(?!json|py)([a-z_.0-9]*\w)', shown):
        assert any(f'{known}.'.startswith(f'{key}.') for known in KEYS), key


@pytest.mark.parametrize('group', ['model', 'augment'])
def test_config_keys_in_tables_exist(group):
    for cell, *_ in table('docs/training.md', f'`--config.{group}.`'):
        first, *others = re.findall(r'`([\w.]+)', cell)
        for key in [first, *(key if key[0] != '.' else first.rpartition('.')[0] + key for key in others)]:
            assert f'{group}.{key}' in KEYS


# Tables.


def table(page: str, header: str) -> Iterator[list[str]]:
    """The cells of each row of the table that begins with `header`."""
    lines = PAGES[page][PAGES[page].index(f'\n| {header} |') + 1 :].splitlines()
    for line in lines[2:]:
        if not line.startswith('|'):
            return
        yield [cell.strip() for cell in line.strip('|').split(' |')]


def test_the_table_of_models_is_that_of_the_reference():
    shown = {name: values[:3] for name, *values in table('README.md', 'model')}
    assert shown == {
        name: [str(SCALES[name].image_size), f'{int(parameters.replace(",", "")) / 1e6:.2f} M', f'{multiply_adds} G']
        for name, parameters, _, _, multiply_adds, *_ in table('docs/reference.md', 'Model | Trainable parameters ✓')
    }


def test_every_recipe_command_and_data_set_is_shown():
    def names(header: str) -> set[str]:
        return {CODE.findall(cell)[0] for cell, *_ in table('docs/training.md', header)}

    assert names('recipe') == RECIPES.keys()
    assert names('`effdet ...`') == COMMANDS.keys()
    assert default.DATASETS.keys() - {'own'} <= {*CODE.findall(PAGES['docs/data.md'])}


def test_readme_links_to_every_page():
    assert {page for page in PAGES if page != 'README.md'} <= {*re.findall(r'\]\(([^)#]+)', PAGES['README.md'])}
