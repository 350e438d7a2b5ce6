"""Shared by all commands: flags, --help, --quiet, one-line errors, exit codes (0 done, 1 failed, 2 bad usage)."""

import ast
import functools
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from effdet_jax.errors import UserError
from effdet_jax.runtime import paths, process

QUIET = flags.DEFINE_bool('quiet', False, 'print only results, warnings and errors')
VERBOSE = flags.DEFINE_bool('verbose', False, 'also print compilations, library logs, and tracebacks of errors')

CONFIGS = process.CONFIGS.resolve()  # next to the package in a checkout, inside it once installed
CONFIG_HELP = 'FILE or FILE:PRESET, e.g. configs/d3.py:voc2007'

# Keys of config.dataset with a path after `voc:`, `coco:` or `csv:`.
SOURCE_KEYS = ('source', 'train_split', 'eval_split')


class PathParser(flags.ArgumentParser[Path]):
    """A local path, with `~` expanded. Empty paths and addresses such as gs://bucket are bad usage."""

    def parse(self, argument: str | Path) -> Path:
        if not argument:
            raise ValueError('the path is empty')
        return paths.local(argument)


SAVED = CONFIGS / 'saved.py'  # loads the config of a work directory
PATH = PathParser()  # flags.DEFINE(cli.PATH, 'out', None, 'help')


class TupleParser(flags.ArgumentParser):
    """Parses '(1, 2)' or '1,2', and single values: '512' is (512,), 'cup' is ('cup',), and '' is ().

    Replaces the parser of ml_collections, which joins the values of a repeated flag. Here the last value wins.
    """

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if isinstance(argument, tuple):
            return argument  # the default, from the config
        if not argument:
            return ()
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError):  # a string without quotes
            if ',' in argument:
                raise
            value = argument
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class FloatParser(flags.FloatParser):
    """A number, or None."""

    def convert(self, argument: Any) -> Any:
        return None if argument == 'None' else super().convert(argument)


config_flags.register_flag_parser_for_type(tuple, TupleParser())
config_flags.register_flag_parser_for_type(float, FloatParser())


class Command(NamedTuple):
    """`effdet NAME` runs the module `effdet_jax.MODULE` with `flags` and the user's flags."""

    module: str
    summary: str
    flags: tuple[str, ...] = ()


COMMANDS = {
    'train': Command('main', 'train and evaluate a config, or continue its run'),
    'eval': Command('main', 'evaluate the best checkpoint of a run', ('--mode=eval',)),
    'predict': Command('commands.predict.command', 'detect objects in images and videos'),
    'export': Command('commands.export.command', 'export a run to StableHLO, SavedModel or ONNX'),
    'report': Command('commands.report', 'write an HTML report about a run'),
    'check-data': Command('commands.check_data.command', 'find errors in the data of a config'),
    'plan': Command('commands.plan.command', 'estimate parameters, memory, batch size and time before a run'),
    'benchmark': Command('commands.benchmark.command', 'measure the speed of detection, training, data and start-up'),
    'import-weights': Command(
        'commands.import_weights.command', 'convert checkpoints of google/automl, effdet or timm to a work directory'
    ),
    'completion': Command('commands.completion', 'print the tab completion for bash or zsh'),
}


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = (), *, positional: bool = False) -> None:
    """Parses the flags and runs `main` with the other arguments; a UserError becomes one line and an exit code.

    `required`: names of flags that must be given. `positional`: whether the command takes arguments that are no flags.
    """
    process.use_huge_pages()  # first, because it starts the command again
    parser = functools.partial(parse, required=required, positional=positional)
    app.run(functools.partial(_main, main), flags_parser=parser)


def _main(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    process.prepare()
    _set_verbosity()
    try:
        main(arguments[1:])
    except (app.UsageError, UserError) as error:
        if VERBOSE.value:
            traceback.print_exc()
        fail(str(error), 2 if isinstance(error, app.UsageError) else 1)


def _set_verbosity() -> None:
    if QUIET.value:
        from effdet_jax.records import console  # imported late: it takes half a second

        console.quiet = True
    # Orbax logs every file; we print what matters ourselves.
    logging.set_verbosity(logging.INFO if VERBOSE.value else logging.FATAL)
    if VERBOSE.value:
        os.environ.setdefault('JAX_LOG_COMPILES', '1')  # read when jax is imported, which no command has done yet


def parse(argv: Sequence[str], required: Sequence[str] = (), *, positional: bool = False) -> Sequence[str]:
    """The arguments that are no flags. Sets the flags, checks the config, and ends the process on bad usage."""
    if any(argument == '-h' or argument.startswith(('--help', '-help')) for argument in argv):
        print(_help(sys.modules['__main__'].__doc__ or '', argv[0], required))
        sys.exit(0)
    try:
        rest = flags.FLAGS(_with_config(list(argv)))
        config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
        if config is not None:
            from effdet_jax.config import check  # imported late: `_problem` below must come first

            check(config)
        _check_paths(config)
    except UserError as error:
        fail(str(error), 2)
    # Parsing runs the config file, which may raise anything, and an override may name a key that does not exist.
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        fail(_reason(error), 2)
    if rest[1:] and not positional:
        fail(f'unexpected {" ".join(rest[1:])}: this command takes only flags, such as --name=value; see --help', 2)
    if missing := [f'--{name}' for name in required if not flags.FLAGS[name].value]:
        fail(f'missing {" and ".join(missing)}; see --help', 2)
    if QUIET.value and VERBOSE.value:
        fail('--quiet and --verbose contradict each other: give only one of them', 2)
    return rest


def _reason(error: Exception) -> str:
    """The message for an error in the flags or in the config file."""
    if error.args and isinstance(error.args[0], Exception):  # ml_collections wraps what it raises
        error = error.args[0]
    reason = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    from effdet_jax.configs import rules  # imported late, as in `parse`

    wrong = re.match(r'flag --config\.([\w.]+)=(.*?): ', reason, re.DOTALL)
    if wrong and wrong[1] in rules.RULES:  # the text does not parse as the type of the key
        return f'config.{wrong[1]}={wrong[2]!r}{rules.RULES[wrong[1]].advice}'
    missing = re.match(r"'(\w+)'", reason)  # a key that ml_collections did not find, without its groups
    for old in rules.RENAMED:
        if (wrong and wrong[1] == old) or (missing and missing[1] == old.rpartition('.')[2]):
            return rules.use_new_name(old)
    return 'bad flags: ' + (reason.splitlines()[-1] if 'Traceback' in reason else reason)


def _with_config(argv: list[str]) -> list[str]:
    """Replaces --config by one argument that names an existing file.

    `configs/d0.py` means the file of this package if the current folder has none. Without --config, the config of the
    work directory is used: `--config=configs/saved.py:WORKDIR`.
    """
    if 'config' not in flags.FLAGS:
        return argv
    argv, given = _without_flag(argv, 'config')
    if not given:
        _, workdir = _without_flag(argv, 'workdir')
        is_run = workdir and (paths.local(workdir) / 'config.json').is_file()
        return [argv[0], f'--config={SAVED}:{workdir}', *argv[1:]] if is_run else argv
    paths.refuse_addresses(given)
    file, colon, preset = given.partition(':')
    file = str(paths.local(file))
    if not Path(file).is_file():
        ours = CONFIGS.parent / file
        if Path(file).parts[:1] != (CONFIGS.name,) or not ours.is_file():
            fail(f'config file {file} does not exist: the ready-made ones are configs/*.py', 2)
        file = str(ours)
    return [argv[0], f'--config={file}{colon}{preset}', *argv[1:]]  # must come before its overrides


def _check_paths(config: Any) -> None:
    """Checks and expands the keys of the config that hold paths, as `PathParser` does for flags."""
    if not config:
        return
    for key in SOURCE_KEYS:
        paths.refuse_addresses(str(config.get('dataset', {}).get(key, '')))
    init_from = str(config.get('train', {}).get('init_from') or '')
    if (path := paths.local(init_from)) != Path(init_from):
        config.train.init_from = str(path)


def _without_flag(argv: list[str], name: str) -> tuple[list[str], str]:
    """(argv without the flag, its last value); the flag may be `--name=value` or two words."""
    rest, value, words = [], '', iter(argv)
    for word in words:
        flag, equals, text = word.partition('=')
        if flag in (f'--{name}', f'-{name}'):
            value = text if equals else next(words, '')
        else:
            rest.append(word)
    return rest, value


def flags_of(module: str) -> list[flags.Flag]:
    """The flags of a command in the order of their definition, and those that all commands share."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return [*by_module.get(module, []), *(by_module[__name__] if module != __name__ else [])]


def _help(doc: str, module: str, required: Sequence[str]) -> str:
    """The docstring of the command and one entry per flag: meaning, values, default."""
    lines = [doc.strip(), '', 'flags:']
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for flag in flags_of(module):
        name = f'--[no]{flag.name}' if flag.boolean else f'--{flag.name}'
        takes = '' if flag.boolean else flag.parser.syntactic_help
        default = '' if flag.boolean or not flag.value else f'default {flag.default}'
        notes = '; '.join(filter(None, (takes, default, 'required' if flag.name in required else '')))
        text = flag.help + (f' ({notes})' if notes else '')
        lines += textwrap.wrap(text, width, initial_indent=f'  {name:<15} ', subsequent_indent=' ' * 18)
    if any(flag.name == 'config' for flag in flags_of(module)):
        keys = CONFIGS / 'default.py'
        lines += ['', f'Every key of the config is a flag, e.g. --config.train.epochs=40. All keys: {keys}']
    return '\n'.join(lines)


def fail(message: str, code: int) -> NoReturn:
    """Prints one line and exits."""
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


if _problem := process.problem():  # before the commands import what does not work on this system
    fail(_problem, 1)
