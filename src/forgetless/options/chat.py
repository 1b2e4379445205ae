"""Options of `forgetless chat`: a base model and what was tuned from it, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.errors import OptionError
from forgetless.options.finished import EvalOptions
from forgetless.options.model import ModelOptions
from forgetless.options.option import RUNNING, option, same


@dataclass(frozen=True)
class ChatOptions(ModelOptions):
    """Options of `forgetless chat`: the same prompts to a base and to what was tuned from it."""

    model: str = option(
        "",
        "folder of a run of tune or shrink, an adapter folder, or a base model with --adapter or "
        "--tuned",
        group="model",
        positional=True,
        metavar="RUN",
        reads=True,
    )
    adapter: str | None = same(EvalOptions, "adapter")
    tuned: str | None = same(EvalOptions, "tuned")
    prompt: str | None = option(
        None, "ask this alone, and end; without it you type", group="data", metavar="TEXT"
    )
    prompts: str | None = option(
        None,
        "ask every prompt of a file (columns prompt or messages), and write --out",
        group="data",
        metavar="FILE",
        reads=True,
    )
    system: str | None = option(None, "system prompt", group="data", metavar="TEXT")
    raw: bool = option(
        False,
        "no chat template: each text is continued as it stands, for base models",
        group="data",
    )
    # What chat programs commonly use: answers stay sensible, and small models don't run in circles
    # as they do at 0.
    temperature: float = option(
        0.7,
        "0 takes the likeliest token, 1 is the model's own distribution",
        group="measuring",
        at_least=0,
    )
    max_tokens: int = option(512, "tokens of an answer at most", group="measuring", at_least=1)
    out: str | None = option(
        None,
        "with --prompts: file to write, a row for each with prompt, before and after",
        group="output",
        decides=RUNNING,
        metavar="FILE",
    )


def check_chat(options: ChatOptions) -> None:
    """Raise OptionError for options that do not fit together."""
    if options.adapter and options.tuned:
        raise OptionError("give --adapter or --tuned, not both")
    if options.prompt is not None and options.prompts:
        raise OptionError("give --prompt TEXT for one or --prompts FILE for many, not both")
    if bool(options.prompts) != bool(options.out):
        raise OptionError("--prompts FILE and --out FILE.jsonl go together; give both or neither")
    if options.prompt is not None and not options.prompt.strip():
        raise OptionError("--prompt expects a text, found an empty one")
    if options.raw and options.system:
        raise OptionError("--system is put into the chat template, which --raw leaves out")
