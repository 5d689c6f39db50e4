"""Prints a script that completes commands, fields and shipped configs in bash and zsh.

eval "$(trapo completion)"                                                       # in ~/.bashrc
autoload -U +X bashcompinit && bashcompinit && eval "$(trapo completion)"        # in ~/.zshrc
"""

from collections.abc import Sequence

from trapo_jax.__main__ import COMMANDS
from trapo_jax.config import Config, EvaluateConfig, list_fields
from trapo_jax.inputs.paths import SHIPPED_CONFIGS
from trapo_jax.runs.command_line import ArgumentParser, command, run_and_exit

SCRIPT = """\
_trapo() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} words=
  if (( COMP_CWORD == 1 )); then
    words='{commands}'
  elif [[ $previous == --config ]]; then
    words='{configs}'
  elif [[ $previous != '=' && $word != '=' ]]; then
    case ${{COMP_WORDS[1]}} in
      train|preview|plan|compare) words='--config --help {train}' ;;
      evaluate) words='--config --help {evaluate}' ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
}}
complete -o default -F _trapo trapo"""


@command
def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="python -m trapo_jax.completion", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.parse_args(arguments)
    configs = {file.stem for folder in SHIPPED_CONFIGS for file in folder.glob("*.yaml")}
    print(
        SCRIPT.format(
            commands=" ".join(COMMANDS),
            configs=" ".join(sorted(configs)),
            train=_assignments(Config),
            evaluate=_assignments(EvaluateConfig),
        )
    )
    return 0


def _assignments(config_class: type[Config] | type[EvaluateConfig]) -> str:
    return " ".join(f"{field.name}=" for field in list_fields(config_class))


if __name__ == "__main__":
    run_and_exit(main)
