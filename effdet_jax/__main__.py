"""effdet COMMAND FLAGS..., the same as python -m effdet_jax COMMAND FLAGS..."""

import runpy
import sys

import effdet_jax
from effdet_jax.commands import cli


def main() -> None:
    """The console script `effdet`: runs the command that its first argument names."""
    _, *words = sys.argv
    name, *arguments = words or ['--help']
    if name in ('--help', '-h', 'help'):
        print(_overview())
        sys.exit(0 if words else 2)
    if name == '--version':
        print(effdet_jax.__version__)
    elif command := cli.COMMANDS.get(name):
        sys.argv[1:] = [*command.flags, *arguments]
        runpy.run_module(f'effdet_jax.{command.module}', run_name='__main__', alter_sys=True)
    else:
        cli.fail(f'unknown command {name}: choose one of {", ".join(cli.COMMANDS)}', 2)


def _overview() -> str:
    width = max(map(len, cli.COMMANDS)) + 2
    rows = [f'  {name:<{width}}{command.summary}' for name, command in cli.COMMANDS.items()]
    return '\n'.join(['effdet COMMAND FLAGS...', '', *rows, '', '`effdet COMMAND --help` explains a command.'])


if __name__ == '__main__':
    main()
