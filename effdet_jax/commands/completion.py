"""Tab completion of `effdet`: put eval "$(effdet completion bash)" into ~/.bashrc, or the same with zsh into ~/.zshrc.

Completes commands, flags, keys of the config (--config.tr), choices (--mode=) and paths, also after `--flag=`.
"""

import functools
import importlib
from collections.abc import Sequence

from absl import app, flags

from effdet_jax.commands import cli
from effdet_jax.config import flatten
from effdet_jax.configs import default

# Bash splits words at `=` and replaces only what follows; zsh replaces the whole word, so it needs the whole word.
# In zsh, compgen -f looks at PREFIX, and there is no compopt.
SCRIPT = """\
_effdet() {
  local line="${COMP_LINE:0:$COMP_POINT}" command current flag value before='' choices='' reply
  command="${line#* }" command="${command%% *}" current="${line##* }"
  flag="${current%%=*}" value="${current#*=}"
  COMPREPLY=()
  case "$command" in
@FLAGS@
  esac
  if [[ "$line" != *' '*' '* ]]; then
    COMPREPLY=($(compgen -W '@COMMANDS@' -- "$current"))
    return
  elif [[ "$current" == -* && "$current" != *=* ]]; then
    [[ "$current" == --config.* && "$choices" == *--config=* ]] && choices='@KEYS@'
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
    [[ "${COMPREPLY[*]}" == *= ]] && compopt -o nospace 2>/dev/null
    return
  fi
  case "$command $flag" in
@CHOICES@
    *) choices='' ;;
  esac
  [[ -n "$ZSH_VERSION" && "$current" == *=* ]] && before="$flag="
  if [[ -n "$choices" ]]; then
    COMPREPLY=($(compgen -P "$before" -W "$choices" -- "$value"))
    return
  fi
  compopt -o filenames 2>/dev/null
  while IFS= read -r reply; do
    [[ -n "$ZSH_VERSION" && -d "$reply" ]] && reply="$reply/"
    COMPREPLY+=("$before$reply")
  done < <(PREFIX="$value"; compgen -f -- "$value")
}
"""
SHELLS = {
    'bash': SCRIPT + 'complete -F _effdet effdet\n',
    'zsh': 'autoload -Uz compinit bashcompinit && compinit && bashcompinit\n'
    + SCRIPT
    + 'complete -o nospace -F _effdet effdet\n',
}


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise app.UsageError(f'name one shell: {" or ".join(SHELLS)}')
    print(script(arguments[0]), end='')


def script(shell: str) -> str:
    """The shell script, filled with the flags of all commands."""
    words, choices = [], []
    for name, command in cli.COMMANDS.items():
        for flag in _flags_of(command.module):
            if values := getattr(flag.parser, 'enum_values', None):
                choices.append(f"    '{name} --{flag.name}') choices='{' '.join(values)}' ;;")
        spelled = (f'--{flag.name}' + ('' if flag.boolean else '=') for flag in _flags_of(command.module))
        words.append(f"    {name}) choices='{' '.join([*spelled, '--help'])}' ;;")
    parts = {
        'FLAGS': '\n'.join(words),
        'CHOICES': '\n'.join(choices),
        'COMMANDS': ' '.join(cli.COMMANDS),
        'KEYS': ' '.join(f'--config.{key}=' for key, _ in flatten(default.get_config('d0').to_dict())),
    }
    text = SHELLS[shell]
    for part, content in parts.items():
        text = text.replace(f'@{part}@', content)
    return text


@functools.cache
def _flags_of(module: str) -> list[flags.Flag]:
    """The flags of a command. They are removed from absl afterwards, because several commands define --workdir."""
    name = f'effdet_jax.{module}'
    importlib.import_module(name)
    defined = cli.flags_of(name)
    for flag in defined:
        if flag not in cli.flags_of(cli.__name__):
            delattr(flags.FLAGS, flag.name)
    return defined


if __name__ == '__main__':
    cli.run(main, positional=True)
