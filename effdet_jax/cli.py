"""What all commands share: flags, one-line errors, exit codes (0 done, 1 failed, 2 bad usage)."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from effdet_jax.errors import UserError


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
    """Parses the flags, runs `main` on the rest, and turns what the user can mend into one line and an exit code."""
    app.run(functools.partial(_main, main), flags_parser=functools.partial(_parse, required=required))


def _main(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    logging.set_verbosity(logging.FATAL)  # Orbax reports every file; what matters to the user we print ourselves
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
    for argument in argv:
        file = argument.removeprefix('--config=').split(':')[0]
        if argument.startswith('--config=') and not Path(file).is_file():
            _fail(f'config file {file} does not exist: the ready ones are configs/*.py', 2)
    try:
        rest = flags.FLAGS(argv)
    # A config file is run while the flags are parsed, and an override may name a key that does not exist.
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = str(error.args[0] if error.args else error)
        reason = reason.strip().splitlines()[-1] if 'Traceback' in reason else reason
        _fail('bad flags: ' + reason.replace('\\n', ' ').replace("\\'", "'").strip("'"), 2)
    if missing := [f'--{name}' for name in required if not flags.FLAGS[name].value]:
        _fail(f'{" and ".join(missing)} missing; --help explains', 2)
    return rest


def _fail(message: str, code: int) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)
