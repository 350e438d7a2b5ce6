"""What all commands share: flags, --help, --quiet, one-line errors, exit codes (0 done, 1 failed, 2 bad usage)."""

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

QUIET = flags.DEFINE_bool('quiet', False, 'say nothing but results, warnings and errors')
VERBOSE = flags.DEFINE_bool('verbose', False, 'say what is compiled and what libraries log; tracebacks with errors')

CONFIGS = process.CONFIGS.resolve()  # beside the package in a checkout, inside of it where it is installed

# Keys of config.dataset that hold paths behind `voc:`, `coco:` and `csv:`.
SOURCE_KEYS = ('source', 'train_split', 'eval_split')


class PathParser(flags.ArgumentParser[Path]):
    """A path of this machine, with `~` expanded; empty ones and addresses are bad usage."""

    def parse(self, argument: str | Path) -> Path:
        if not argument:
            raise ValueError('the path is empty')
        return paths.local(argument)


SAVED = CONFIGS / 'saved.py'  # the config that is a work directory's own
PATH = PathParser()  # flags.DEFINE(cli.PATH, 'out', None, 'what it is for')


class TupleParser(flags.ArgumentParser):
    """(1, 2), 1,2, or a single value as it is: 512 and cup are (512,) and ('cup',). Nothing at all is ().

    In the place of ml_collections' own, whose flags, given twice, are joined: as with numbers, the last one counts.
    """

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if isinstance(argument, tuple):
            return argument  # the config's own
        if not argument:
            return ()
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError):  # a word without quotes
            if ',' in argument:
                raise
            value = argument
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class FloatParser(flags.FloatParser):
    """A number, or None where the key may be None."""

    def convert(self, argument: Any) -> Any:
        return None if argument == 'None' else super().convert(argument)


config_flags.register_flag_parser_for_type(tuple, TupleParser())
config_flags.register_flag_parser_for_type(float, FloatParser())


class Command(NamedTuple):
    """`effdet NAME` runs the module `effdet_jax.MODULE` with these flags and the user's."""

    module: str
    summary: str
    flags: tuple[str, ...] = ()


COMMANDS = {
    'train': Command('main', 'train and evaluate what a config describes, or continue where it stands'),
    'eval': Command('main', 'evaluate the best checkpoint of a run', ('--mode=eval',)),
    'predict': Command('commands.predict.command', 'detect in images and videos: pictures and detections.json'),
    'export': Command('commands.export.command', 'a run as one file of StableHLO, a SavedModel or ONNX'),
    'report': Command('commands.report', 'one HTML page about a run'),
    'check-data': Command('commands.check_data.command', 'what is wrong with the data of a config'),
    'plan': Command('commands.plan.command', 'parameters, memory, largest batch and time, before a run'),
    'benchmark': Command('commands.benchmark.command', 'how fast a config detects, trains, reads its data and starts'),
    'import-weights': Command(
        'commands.import_weights.command', 'checkpoints of google/automl, effdet, timm -> a work directory'
    ),
    'completion': Command('commands.completion', 'tab completion of all this for bash and zsh'),
}


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
    """Parses the flags, runs `main` on the rest, and turns what the user can mend into one line and an exit code."""
    process.use_huge_pages()  # at once, since it starts the command once more
    app.run(functools.partial(_main, main), flags_parser=functools.partial(_parse, required=required))


def _main(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    process.prepare()
    _set_loudness()
    try:
        main(arguments[1:])
    except (app.UsageError, UserError) as error:
        if VERBOSE.value:
            traceback.print_exc()
        fail(str(error), 2 if isinstance(error, app.UsageError) else 1)


def _set_loudness() -> None:
    if QUIET.value:
        from effdet_jax.records import console  # only now: it takes half a second to load

        console.quiet = True
    # Orbax reports every file; what matters to the user we print ourselves.
    logging.set_verbosity(logging.INFO if VERBOSE.value else logging.FATAL)
    if VERBOSE.value:
        os.environ.setdefault('JAX_LOG_COMPILES', '1')  # read when jax is imported, which no command has done yet


def _parse(argv: Sequence[str], required: Sequence[str]) -> Sequence[str]:
    if any(argument == '-h' or argument.startswith(('--help', '-help')) for argument in argv):
        print(_help(sys.modules['__main__'].__doc__ or '', argv[0], required))
        sys.exit(0)
    try:
        rest = flags.FLAGS(_with_config(list(argv)))
        config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
        if config is not None:
            from effdet_jax.config import check  # only now: where nothing can run, `problem` says why

            check(config)
        _check_paths(config)
    except UserError as error:
        fail(str(error), 2)
    # A config file is run while the flags are parsed, and an override may name a key that does not exist.
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        fail(_reason(error), 2)
    if missing := [f'--{name}' for name in required if not flags.FLAGS[name].value]:
        fail(f'{" and ".join(missing)} missing; --help explains', 2)
    if QUIET.value and VERBOSE.value:
        fail('--quiet and --verbose exclude each other: leave one away', 2)
    return rest


def _reason(error: Exception) -> str:
    """What to tell the user of an error of the flags, or of the config file."""
    if error.args and isinstance(error.args[0], Exception):  # ml_collections wraps what it raises
        error = error.args[0]
    reason = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    from effdet_jax.configs.rules import RULES  # only now, as in `_parse`

    wrong = re.match(r'flag --config\.([\w.]+)=(.*?): ', reason, re.DOTALL)
    if wrong and wrong[1] in RULES:  # a text that cannot be read as the type of its key
        return f'config.{wrong[1]}={wrong[2]!r}{RULES[wrong[1]].advice}'
    return 'bad flags: ' + (reason.splitlines()[-1] if 'Traceback' in reason else reason)


def _with_config(argv: list[str]) -> list[str]:
    """--config as one word that names a file that exists.

    `configs/d0.py` is the one of this package where the current folder has none. Without --config, a work directory's
    own config holds: `--config=configs/saved.py:WORKDIR` in its place.
    """
    if 'config' not in flags.FLAGS:
        return argv
    argv, given = _taken_out(argv, 'config')
    if not given:
        _, workdir = _taken_out(argv, 'workdir')
        is_run = workdir and (paths.local(workdir) / 'config.json').is_file()
        return [argv[0], f'--config={SAVED}:{workdir}', *argv[1:]] if is_run else argv
    paths.refuse_addresses(given)
    file, colon, preset = given.partition(':')
    file = str(paths.local(file))
    if not Path(file).is_file():
        ours = CONFIGS.parent / file
        if Path(file).parts[:1] != (CONFIGS.name,) or not ours.is_file():
            fail(f'config file {file} does not exist: the ready ones are configs/*.py', 2)
        file = str(ours)
    return [argv[0], f'--config={file}{colon}{preset}', *argv[1:]]  # first: overrides need it


def _check_paths(config: Any) -> None:
    """As `PathParser` does it, in those keys of the config that hold paths."""
    if not config:
        return
    for key in SOURCE_KEYS:
        paths.refuse_addresses(str(config.get('dataset', {}).get(key, '')))
    init_from = str(config.get('train', {}).get('init_from') or '')
    if (path := paths.local(init_from)) != Path(init_from):
        config.train.init_from = str(path)


def _taken_out(argv: list[str], name: str) -> tuple[list[str], str]:
    """(argv without the flag, its last value), given as `--name=value` or as two words."""
    rest, value, words = [], '', iter(argv)
    for word in words:
        flag, equals, text = word.partition('=')
        if flag in (f'--{name}', f'-{name}'):
            value = text if equals else next(words, '')
        else:
            rest.append(word)
    return rest, value


def flags_of(module: str) -> list[flags.Flag]:
    """The flags of a command, as it defines them, and those that all commands have."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return [*by_module.get(module, []), *(by_module[__name__] if module != __name__ else [])]


def _help(doc: str, module: str, required: Sequence[str]) -> str:
    """The command's docstring and a line for each of its flags: meaning, values, default."""
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
        lines += ['', f'Every key of the config is a flag, as --config.train.epochs=40. All keys: {keys}']
    return '\n'.join(lines)


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with one line."""
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


if _problem := process.problem():  # now: the imports of the commands would fail
    fail(_problem, 1)
