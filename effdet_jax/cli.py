"""What all commands share: flags, one-line errors, exit codes (0 done, 1 failed, 2 bad usage)."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

import configs
from effdet_jax import startup
from effdet_jax.errors import UserError


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
    """Parses the flags, runs `main` on the rest, and turns what the user can mend into one line and an exit code."""
    app.run(functools.partial(_main, main), flags_parser=functools.partial(_parse, required=required))


def _main(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    logging.set_verbosity(logging.FATAL)  # Orbax reports every file; what matters to the user we print ourselves
    startup.prepare()
    try:
        main(arguments[1:])
    except app.UsageError as error:
        _fail(str(error), 2)
    except UserError as error:
        _fail(str(error), 1)


def _parse(argv: Sequence[str], required: Sequence[str]) -> Sequence[str]:
    argv = list(argv)
    if any(argument.startswith(('--help', '-help')) for argument in argv):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)  # absl's own flag exits with 1
    argv = _with_saved_config(argv)
    for argument in argv:
        file = argument.removeprefix('--config=').split(':')[0]
        if argument.startswith('--config=') and not Path(file).is_file():
            _fail(f'config file {file} does not exist: the ready ones are configs/*.py', 2)
    try:
        rest = flags.FLAGS(argv)
    # A config file is run while the flags are parsed, and an override may name a key that does not exist.
    except (flags.Error, UserError, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = str(error.args[0] if error.args else error)
        reason = reason.strip().splitlines()[-1] if 'Traceback' in reason else reason
        _fail('bad flags: ' + reason.replace('\\n', ' ').replace("\\'", "'").strip("'"), 2)
    if missing := [f'--{name}' for name in required if not flags.FLAGS[name].value]:
        _fail(f'{" and ".join(missing)} missing; --help explains', 2)
    return rest


def _with_saved_config(argv: list[str]) -> list[str]:
    """Without --config, a work directory's own config holds: `--config=configs/saved.py:WORKDIR` in its place."""
    given = {a.lstrip('-').partition('=')[0]: a.partition('=')[2] for a in argv if a.startswith('-')}
    workdir = given.get('workdir', '')
    if 'config' in given or 'config' not in flags.FLAGS or not (Path(workdir) / 'config.json').is_file():
        return argv
    return [argv[0], f'--config={Path(configs.__path__[0]) / "saved.py"}:{workdir}', *argv[1:]]


def _fail(message: str, code: int) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)
