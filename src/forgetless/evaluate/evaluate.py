"""What was learned and what was lost: loss on general text and on domain data in nats per token,
and accuracies on tasks.

    held_out = read_held_out(TextOptions("wide.jsonl"), data="domain.jsonl", tasks="sciq")
    before = measure(base, tokenizer, held_out)
    after = measure(tuned, tokenizer, held_out)
    changes(before, after).forgetting     # Interval(nats=0.056, low=0.049, high=0.063, ...)
    print(changes_table(before, after))

What was lost is measured on text of the user's, and on what the base says itself, where that is
asked for (paired_answers.py). "Before" is always the bare base model. Perplexity is exp(nats). The
standard error of a loss is over documents, as of a ratio, since documents differ in length. A
change is paired by document, which takes most of the noise out, and its interval leaves out one
source in turn (rise.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.data.inputs import HeldOut, Questions, read_held_out
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import answers, check_tasks
from forgetless.evaluate.conversations import ask_base, check_chat_model, run_keys
from forgetless.evaluate.domain_form import completions_of
from forgetless.evaluate.harness import lm_eval_accuracy
from forgetless.evaluate.losses import TextLoss, completion_loss, general_loss
from forgetless.evaluate.own_answers import OWN_WORDS, default_kind
from forgetless.evaluate.paired_answers import PairedAnswers, divergence_by_kind, paired_part
from forgetless.evaluate.paired_scores import error_name, with_score_changes
from forgetless.evaluate.rise import Rise
from forgetless.files.measured_json import (
    DIVERGENCE,
    Changes,
    Loss,
    Measured,
    ScoreChange,
    Scores,
)
from forgetless.files.outputs import claim, local_inputs
from forgetless.files.provenance import environment
from forgetless.files.room import check_output_folder
from forgetless.files.run_json import EvaluatedRun
from forgetless.files.schema import plain_of, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.model.adapter_files import adapter_shapes, tuned_folder, with_adapter
from forgetless.model.adapter_fit import check_adapter_fits
from forgetless.model.adapter_path import scaled_update
from forgetless.model.adapter_rows import give_rows
from forgetless.model.adapter_tokenizer import tuned_tokenizer
from forgetless.model.loading import load_model, load_tokenizer, seed_and_threads
from forgetless.options.finished import EvalOptions
from forgetless.options.option import as_dict
from forgetless.report.behaviours import behaviours_in_words
from forgetless.report.terminal import table

logger = logging.getLogger("forgetless")
# What a label of the table says of a loss.
UNIT = "(nats/token)"


def measure(
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    own: PairedAnswers | None = None,
    is_base: bool = False,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> Measured:
    """The numbers of one state of a model; what was not asked for is None.

    `own` are the base's own answers (`paired_part`), which need the base to be made; from these
    the bare base itself (`is_base`) is at no distance.
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
        ).record()
    if held_out.domain is not None:
        domain = completion_loss(
            model, tokenizer, held_out.domain, length=length, batch_tokens=batch_tokens
        ).record()
    tasks: dict[str, Scores | None] = {
        questions.name: _answered(model, tokenizer, questions, batch_tokens)
        for questions in held_out.tasks
    }
    diverged = None if own is None else own.measured(None if is_base else model)
    return Measured(general, domain, tasks, diverged)


def _answered(
    model: nn.Module, tokenizer: Any, questions: Questions, batch_tokens: int | None
) -> Scores:
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


def changes(before: Measured, after: Measured) -> Changes:
    """Forgetting (the divergence on the base's own answers, else the rise of the general loss) and
    learning (fall of the domain loss), in nats per token, paired by document; None where not
    measured.
    """
    diverged = rise_between(before.own, after.own)
    risen = rise_between(before.general, after.general)
    unlearned = rise_between(before.domain, after.domain)
    learning = None if unlearned is None else (-unlearned).record(percent=False)
    general = None if risen is None else risen.record()
    if diverged is None:
        return Changes(general, learning)
    return Changes(replace(diverged.record(), of=DIVERGENCE), learning, general)


def rise_between(before: Loss | None, after: Loss | None) -> Rise | None:
    """The rise from one loss to another of the same documents; None where one was not measured."""
    if before is None or after is None:
        return None
    return TextLoss.of(before).rise(TextLoss.of(after))


@dataclass(frozen=True)
class Line:
    """One number before and after; `error` is the standard error of the change where it is known,
    and else of the number.
    """

    label: str
    before: float | None
    after: float | None
    error: float | None = None
    paired: ScoreChange | None = None

    def cells(self, *, paired: bool) -> list[str]:
        change = None
        if self.before is not None and self.after is not None:
            change = self.after - self.before
        cells = [
            self.label,
            _or_dash(self.before, ".4f"),
            _or_dash(self.after, ".4f"),
            _or_dash(change, "+.4f"),
            _or_dash(self.error, ".4f"),
        ]
        if paired:
            known = self.paired or ScoreChange()
            cells += [_or_dash(known.low, "+.4f"), _or_dash(known.high, "+.4f")]
            cells.append(_or_dash(known.p, ".3f"))
        return cells


def changes_table(
    before: Measured, after: Measured | None, *, authors_perplexity: bool = False
) -> str:
    """What was measured, as text: what, before, after, change, standard error.

    Where tasks were asked before and after, also the 95 % interval of each accuracy's change,
    paired by question, and McNemar's p. `authors_perplexity`: also 2^nats, which the paper's code
    calls perplexity.
    """
    later = after or Measured()
    lines: list[Line] = []
    if before.own:
        lines.append(_loss_line("divergence on own answers", before.own, later.own))
    if before.general:
        lines += _general_lines(before.general, later.general, authors_perplexity)
    if before.domain:
        lines.append(_loss_line("domain loss", before.domain, later.domain))
    for name, scores in before.tasks.items():
        lines += _task_lines(name, scores or Scores(), later.tasks.get(name))
    columns = ["", "before", "after", "change", "std.err."]
    paired = any(line.paired is not None for line in lines)
    if paired:
        columns += ["low", "high", "p"]
    return table(columns, [line.cells(paired=paired) for line in lines])


def _or_dash(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)


def _loss_line(label: str, before: Loss, after: Loss | None) -> Line:
    """A loss before and after."""
    change = rise_between(before, after)
    error = before.standard_error if change is None else change.estimate()["standard_error"]
    return Line(f"{label} {UNIT}", before.nats, after.nats if after else None, error)


def _general_lines(before: Loss, after: Loss | None, authors_perplexity: bool) -> list[Line]:
    """General text in nats, and what other people would call it."""
    later = after or Loss()
    lines = [_loss_line("general loss", before, after)]
    for label, first, last in (
        ("general perplexity", before.perplexity, later.perplexity),
        ("general bits per byte", before.bits_per_byte, later.bits_per_byte),
    ):
        if first is not None:
            lines.append(Line(label, first, last))
    if authors_perplexity and before.nats is not None:
        power = None if later.nats is None else 2**later.nats
        lines.append(Line("2^nats (as the paper's code)", 2**before.nats, power))
    return lines


def _task_lines(name: str, before: Scores, after: Scores | None) -> list[Line]:
    """The loss on the right answers of one task, where it is known, and the accuracies."""
    lines = []
    if before.answer_loss is not None:
        answered = after.answer_loss if after else None
        lines.append(_loss_line(f"{name} answer loss", before.answer_loss, answered))
    paired = (after.changes if after else None) or {}
    for metric in before.metrics:
        change = paired.get(metric)
        if change is not None:
            error = change.standard_error
        else:
            error = (after or before).numbers.get(error_name(metric))
        later = after.numbers.get(metric) if after else None
        lines.append(Line(f"{name} {metric}", before.numbers[metric], later, error, change))
    return lines


def evaluate(options: EvalOptions) -> JsonObject:
    """`forgetless eval`: the bare base model, then with the adapter (its update times `scale`) or
    the tuned model. Prints the table, returns what is in its run.json.

    Raises ValueError or OptionError before a model is loaded where the options cannot work.
    """
    _check_evaluated(options)
    seed_and_threads(options)
    tokenizer = _tokenizer(options)
    if options.behaviours:
        check_chat_model(tokenizer)
    options = _with_own_text(options, tokenizer)
    held_out = read_held_out(
        options,
        data=options.data,
        tasks=options.tasks,
        data_split=options.data_split,
        columns=options.columns,
        limit=options.limit,
        shots=options.shots,
    )
    windows = {key: getattr(options, key) for key in ("length", "stride", "batch_tokens")}
    model = load_model(options)
    if options.adapter:
        give_rows(model, adapter_shapes(options.adapter))
    own = paired_part(model, tokenizer, held_out.own, "check")
    asked = ask_base(model, tokenizer, options, completions_of(held_out.domain))
    before = measure(model, tokenizer, held_out, own=own, is_base=True, **windows)
    after = behaved = None
    if options.adapter or options.tuned:
        model = _tuned_model(options, model)
        after = measure(model, tokenizer, held_out, own=own, **windows)
        behaved = asked.compared_with(model, tokenizer) if asked else None
    change = Changes()
    if after is not None:
        after = with_score_changes(before, after)
        change = changes(before, after)
    run = EvaluatedRun(
        configuration=as_dict(options),
        environment=environment(str(next(model.parameters()).device)),
        before=before,
        after=after,
        forgetting=change.forgetting,
        learning=change.learning,
        general=change.general,
        divergence_by_kind=divergence_by_kind(after.own if after else None),
        **run_keys(behaved),
    )
    if options.out:  # before anything is printed, since nobody may read it to its end
        write_record(Path(options.out) / "run.json", run)
    print(changes_table(before, after, authors_perplexity=options.authors_perplexity))
    if behaved:
        print(behaviours_in_words(run))
    return plain_of(run)


def _tokenizer(options: EvalOptions) -> Any:
    """The tokenizer of the tuned model, by which its base is measured too."""
    tuned = options.adapter or options.tuned
    return tuned_tokenizer(options, tuned) if tuned else load_tokenizer(options)


def _tuned_model(options: EvalOptions, base: nn.Module) -> nn.Module:
    """The base with the adapter on it, or the tuned model, whichever the options name."""
    if not options.adapter:
        assert options.tuned is not None
        return load_model(options, str(tuned_folder(options.tuned)))
    model = with_adapter(base, options.adapter)
    if options.scale != 1.0:
        scaled_update(model).scale(options.scale)
    return model


def _with_own_text(options: EvalOptions, tokenizer: Any) -> EvalOptions:
    """The options with the model's own answers to measure on, where they name nothing else."""
    if options.general or options.data or options.tasks:
        return options
    kind = default_kind(tokenizer)
    logger.info("measuring on %s; --general TEXT measures on a text of yours", OWN_WORDS[kind])
    return replace(options, general=kind)


def _check_evaluated(options: EvalOptions) -> None:
    """Everything that can be refused without loading a model."""
    if options.adapter and options.tuned:
        raise OptionError("give --adapter or --tuned, not both")
    if options.scale != 1.0 and not options.adapter:
        raise OptionError("--scale scales an adapter's update; give --adapter")
    if options.adapter:
        check_adapter_fits(options, options.adapter)
    if options.tuned and not Path(options.tuned).is_dir():
        raise ValueError(
            f"'{options.tuned}' is not a folder; give --tuned the final/ folder of a run with "
            "--full"
        )
    if options.behaviours and not (options.adapter or options.tuned):
        raise OptionError(
            "--behaviours compares a tuned model with its base; give --adapter or --tuned"
        )
    check_tasks(options.tasks, shots=options.shots)
    if options.out:
        check_output_folder(options.out)
        claim(options.out, "eval", ("run.json",), local_inputs(options))
