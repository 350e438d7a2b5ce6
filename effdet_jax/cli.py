"""What all commands share: flags, one-line errors, exit codes (0 done, 1 failed, 2 bad usage)."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from effdet_jax.errors import UserError


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> None:
    """Parses the flags, runs `main` on the rest, and turns what the user can mend into one line and an exit code."""
    for name in required:
        flags.register_validator(name, bool, message=f'--{name} is missing; --help explains it')
    app.run(lambda arguments: _main(main, arguments), flags_parser=_parse)


def _main(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file; what matters to the user we print ourselves
    try:
        main(arguments[1:])
    except app.UsageError as error:
        _fail(str(error), 2)
    except UserError as error:
        _fail(str(error), 1)


def _parse(argv: Sequence[str]) -> Sequence[str]:
    try:
        return app.parse_flags_with_usage(list(argv)) if '--help' in argv else flags.FLAGS(list(argv))
    except flags.Error as error:
        _fail(str(error), 2)
    # A config file is run while the flags are parsed, and an override may name a key that does not exist.
    except FileNotFoundError as error:
        _fail(f'config file {error.filename} does not exist: the ready ones are configs/*.py', 2)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        _fail(f'bad --config: {error.args[0] if error.args else error}', 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)
