"""What was learned and what was lost: loss on general text in nats per token, loss on the answers,
task accuracies through lm-eval.

"Before" is always the bare base model. Perplexity is exp(nats). Standard errors are over documents
(or questions), as ratio estimates, since documents differ in length; a change is paired by
document, which takes most of the noise out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.data.inputs import HeldOut, Questions, read_held_out
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import answers, check_tasks, lm_eval_accuracy
from forgetless.evaluate.losses import TextLoss, completion_loss, general_loss
from forgetless.evaluate.rise import Rise
from forgetless.files.atomic import write_json
from forgetless.files.provenance import environment
from forgetless.files.room import check_output_folder
from forgetless.model.adapter_files import checked, with_adapter
from forgetless.model.adapters import scale_update
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.option import as_dict
from forgetless.options.verbs import EvalOptions


def measure(
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """The numbers of one state of a model: {"general": ..., "domain": ..., "tasks": {...}}; what
    was not asked for is None.
    """
    general = domain = None
    if held_out.general:
        general = general_loss(
            model,
            tokenizer,
            held_out.general,
            length=length,
            stride=stride,
            batch_tokens=batch_tokens,
        ).numbers()
    if held_out.domain is not None:
        domain = completion_loss(
            model, tokenizer, held_out.domain, length=length, batch_tokens=batch_tokens
        ).numbers()
    tasks = {
        questions.name: _answered(model, tokenizer, questions, batch_tokens)
        for questions in held_out.tasks
    }
    return {"general": general, "domain": domain, "tasks": tasks}


def _answered(
    model: nn.Module, tokenizer: Any, questions: Questions, batch_tokens: int | None
) -> dict[str, Any]:
    """The accuracy of one task: by our own ranking where it is ours, else by lm-eval."""
    if questions.task is not None:
        return answers(model, tokenizer, questions.task, questions.rows, batch_tokens=batch_tokens)
    return lm_eval_accuracy(
        model,
        tokenizer,
        questions.name,
        file=questions.file,
        shots=questions.shots,
        limit=questions.limit,
    )


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Forgetting (rise of the general loss) and learning (fall of the domain loss), in nats per
    token, paired by document; None where not measured.
    """
    lost = rise_between(before["general"], after["general"])
    unlearned = rise_between(before["domain"], after["domain"])
    return {
        "forgetting": None if lost is None else lost.numbers(),
        "learning": None if unlearned is None else (-unlearned).numbers(percent=False),
    }


def rise_between(before: dict[str, Any] | None, after: dict[str, Any] | None) -> Rise | None:
    """The rise from one loss to another of the same documents, each as a file has it; None where
    one was not measured.
    """
    if not before or not after:
        return None
    return TextLoss.read(before).rise(TextLoss.read(after))


def table(
    before: dict[str, Any], after: dict[str, Any] | None, *, authors_perplexity: bool = False
) -> str:
    """Aligned text: what, before, after, change, standard error."""
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    later = after or {"general": None, "domain": None, "tasks": {}}
    for key, label in (
        ("general", "general loss (nats/token)"),
        ("domain", "domain loss (nats/token)"),
    ):
        if before[key]:
            a, b = before[key], later[key]
            rows.append(
                (
                    label,
                    a["nats"],
                    b and b["nats"],
                    _error(a, b),
                )
            )
            if key == "general":
                rows.append(("general perplexity", a["perplexity"], b and b["perplexity"], None))
                if a["bits_per_byte"] is not None:
                    rows.append(
                        (
                            "general bits per byte",
                            a["bits_per_byte"],
                            b and b["bits_per_byte"],
                            None,
                        )
                    )
                if authors_perplexity:
                    rows.append(
                        (
                            "2^nats (as the paper's code)",
                            2 ** a["nats"],
                            2 ** b["nats"] if b else None,
                            None,
                        )
                    )
    for name, a in before["tasks"].items():
        b = later["tasks"].get(name)
        if "answer_loss" in a:
            x, y = a["answer_loss"], b and b["answer_loss"]
            rows.append(
                (
                    f"{name} answer loss (nats/token)",
                    x["nats"],
                    y and y["nats"],
                    _error(x, y),
                )
            )
        for metric in ("acc", "acc_norm"):
            if metric in a:
                rows.append(
                    (
                        f"{name} {metric}",
                        a[metric],
                        b and b[metric],
                        (b or a).get(f"{metric}_stderr"),
                    )
                )
    show = lambda value: "-" if value is None else f"{value:.4f}"
    lines = [f"{'':<34}{'before':>10}{'after':>10}{'change':>10}{'std.err.':>10}"]
    for label, x, y, error in rows:
        change = None if x is None or y is None else y - x
        lines.append(
            f"{label:<34}{show(x):>10}{show(y):>10}{('-' if change is None else f'{change:+.4f}'):>10}{show(error):>10}"
        )
    return "\n".join(lines)


def _error(before: dict[str, Any], after: dict[str, Any] | None) -> float | None:
    """The standard error of a change, or of the loss before where there is none after."""
    change = rise_between(before, after)
    error = before["standard_error"] if change is None else change.estimate()["standard_error"]
    return None if error is None else float(error)


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """`forgetless eval`: the bare base model, then with the adapter (its update times `scale`) or
    the tuned model. Prints the table, returns the run.
    """
    if options.adapter and options.tuned:
        raise OptionError("give --adapter or --tuned, not both")
    if options.scale != 1.0 and not options.adapter:
        raise OptionError("--scale scales an adapter's update; give --adapter")
    if options.adapter:
        checked(options.adapter)
    if options.tuned and not Path(options.tuned).is_dir():
        raise ValueError(
            f"'{options.tuned}' is not a folder; give --tuned the final/ folder of a run with "
            "--full"
        )
    check_tasks(options.tasks)
    if options.out:
        check_output_folder(options.out)
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    held_out = read_held_out(
        general=options.general,
        data=options.data,
        tasks=options.tasks,
        text_column=options.text_column,
        general_split=options.general_split,
        data_split=options.data_split,
        limit=options.limit,
        shots=options.shots,
    )
    windows = {key: getattr(options, key) for key in ("length", "stride", "batch_tokens")}
    tokenizer, model = load_tokenizer(options), load_model(options)
    before = measure(model, tokenizer, held_out, **windows)
    after = None
    if options.adapter:
        model = with_adapter(model, options.adapter)
        scale_update(model, options.scale)
        after = measure(model, tokenizer, held_out, **windows)
    elif options.tuned:
        after = measure(load_model(options, options.tuned), tokenizer, held_out, **windows)
    run = {
        "configuration": as_dict(options),
        "environment": environment(str(next(model.parameters()).device)),
        "before": before,
        "after": after,
        **(changes(before, after) if after else {"forgetting": None, "learning": None}),
    }
    print(table(before, after, authors_perplexity=options.authors_perplexity))
    if options.out:
        write_json(Path(options.out) / "run.json", run)
    return run
