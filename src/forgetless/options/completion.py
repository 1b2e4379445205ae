"""Completion of verbs, options and their choices in a shell.

    forgetless --completion bash >> ~/.bashrc
    forgetless --completion zsh >> ~/.zshrc
    forgetless --completion fish > ~/.config/fish/completions/forgetless.fish

The text holds all names, so that completing starts no Python. Where no name fits, files are
completed.
"""

from __future__ import annotations

import dataclasses

from forgetless.options.option import flag
from forgetless.options.verbs import VERBS, Verb

# The shells that can be completed in.
SHELLS = ("bash", "zsh", "fish")
# What every verb takes.
COMMON_FLAGS = ("--config", "--quiet", "--debug", "--help", "--help-all")
# bash, with @VERBS@ and @CASES@ in the place of names.
BASH = """\
_forgetless() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
  local verb="${COMP_WORDS[1]}" names=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    names="@VERBS@"
  else
    case "$verb $before" in
@CHOICES@
      *) case "$verb" in
@FLAGS@
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$names" -- "$word"))
}
complete -o default -F _forgetless forgetless
"""


def completion(shell: str) -> str:
    """What a shell reads to complete the command line."""
    if shell == "fish":
        return "\n".join(_fish()) + "\n"
    choices = [
        f'      "{verb} {flag(spec.name)}") names="{" ".join(spec.metadata["choices"])}" ;;'
        for verb, row in VERBS.items()
        for spec in dataclasses.fields(row.options)
        if spec.metadata["choices"]
    ]
    flags = [f'        {verb}) names="{" ".join(_flags(row))}" ;;' for verb, row in VERBS.items()]
    script = BASH.replace("@VERBS@", " ".join(VERBS))
    script = script.replace("@CHOICES@", "\n".join(choices)).replace("@FLAGS@", "\n".join(flags))
    return ("autoload -U bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


def _flags(verb: Verb) -> list[str]:
    specs = dataclasses.fields(verb.options)
    own = [flag(spec.name) for spec in specs if not spec.metadata["positional"]]
    return [*own, *COMMON_FLAGS, *(["--json"] if verb.reports else [])]


def _fish() -> list[str]:
    lines = [
        f"complete -c forgetless -n __fish_use_subcommand -a {name} -d {_quoted(verb.help)}"
        for name, verb in VERBS.items()
    ]
    for name, verb in VERBS.items():
        for written in _flags(verb):
            spec = verb.options.__dataclass_fields__.get(written[2:].replace("-", "_"))
            line = (
                f"complete -c forgetless -n '__fish_seen_subcommand_from {name}' -l {written[2:]}"
            )
            if spec is not None and spec.metadata["choices"]:
                line += f" -xa {_quoted(' '.join(spec.metadata['choices']))}"
            lines.append(line)
    return lines


def _quoted(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"
