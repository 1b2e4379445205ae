"""The same prompts put to the base and to the tuned model, so that their behaviours are compared.

    asked = ask_base(model, tokenizer, options, completions)    # None without --behaviours
    ...                                                         # train, or load the tuned model
    behaved = asked.compared_with(tuned, tokenizer)
    behaved.behaviours          # list[BehaviourChange], for run.json
    behaved.conversations       # at most SHOWN of them, to read

Both answer with the same random numbers, and the same tokens end their answers. Prompts are those
of the parts control and check, which importance is not recorded on. The base's answers come from
the cache (own_answers.py); the tuned model's are sampled once, which costs one forward pass of a
batch for each token of its longest answer.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.prompts.prompts import Prompt, load_prompts, parted, supported
from forgetless.data.selftext import Answer, Opening, sample, stop_tokens
from forgetless.errors import OptionError
from forgetless.evaluate.behaviour_change import compared_behaviours, length_change
from forgetless.evaluate.behaviours import (
    BEHAVIOURS,
    OF_ALL,
    Behaviour,
    Said,
    judged_answers,
    rules_for,
    special_rule,
)
from forgetless.evaluate.domain_form import domain_leak
from forgetless.evaluate.own_answers import (
    ANSWERS_SEED,
    answer_length,
    cached_answers,
    fitting_openings,
    users_prompts,
)
from forgetless.evaluate.paired_answers import PairedAnswers, paired_answers
from forgetless.files.behaviours_json import BehaviourChange, Conversation
from forgetless.files.provenance import sha256_text
from forgetless.files.untrusted import JsonObject
from forgetless.options.finished import EvalOptions
from forgetless.options.tune import TuneOptions
from forgetless.report.terminal import progress

logger = logging.getLogger("forgetless")
# Prompts of importance and anchors are not asked, so that nothing is measured on what was held.
ASKED_PARTS = ("control", "check")
# In each round over the prompts a rule that is about few of them gets two, any other kind one: with
# one each, 200 prompts would hold 10 of every rule, too few to see that a third of them changed.
OF_A_RULE = 2
# How a sentence about behaviours that nothing is said of begins.
NOT_JUDGED = "not judged: "
# Conversations to read: those whose answers changed most, and as many at random.
MOST_CHANGED = 4
AT_RANDOM = 4
# Characters of a prompt or an answer that are kept to be read.
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Behaved:
    """How a tuned model behaves beside its base.

    `not_judged` says in sentences which behaviours were left out, and why. `said` has every answer
    of the tuned model by its prompt, both as they are shown.
    """

    behaviours: list[BehaviourChange]
    conversations: list[Conversation]
    not_judged: list[str] = field(default_factory=list)
    said: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AskedBase:
    """What the base said, with all that it takes to ask a tuned model the same.

    `stops` are the tokens that end an answer, `leak` counts answers in the domain's form, and
    `refused` has the prompts that the template cannot put to the model, by reason.
    """

    prompts: list[Prompt]
    openings: list[Opening]
    length: int
    stops: frozenset[int]
    paired: PairedAnswers
    said: dict[str, Said]
    leak: Behaviour | None
    refused: Mapping[str, Sequence[Prompt]]

    @property
    def rules(self) -> tuple[Behaviour, ...]:
        return BEHAVIOURS if self.leak is None else (*BEHAVIOURS, self.leak)

    def compared_with(self, tuned: nn.Module, tokenizer: Any) -> Behaved:
        """Ask the tuned model, and judge both models' answers."""
        logger.info(
            "sampling %d answers of at most %d tokens from the tuned model",
            len(self.openings),
            self.length,
        )
        with progress("sampling", len(self.openings), unit="answer") as bar:
            answers = sample(
                tuned,
                tokenizer,
                self.openings,
                seed=ANSWERS_SEED,
                length=self.length,
                stops=self.stops,
                done=lambda batch: bar.advance(len(batch)),
            )
        said = as_said(answers, tokenizer)
        before = judged_answers(self.prompts, self.said, self.rules)
        after = judged_answers(self.prompts, said, self.rules)
        changes = compared_behaviours(before, after, self.rules)
        changes.insert(1, length_change(self.said, said))
        shown = {
            _as_shown(words_of(prompt)): _as_shown(said[prompt.id].text) for prompt in self.prompts
        }
        return Behaved(changes, self._shown(tuned, said), self._not_judged(changes), shown)

    def _shown(self, tuned: nn.Module, said: Mapping[str, Said]) -> list[Conversation]:
        """The conversations to read: the most changed by divergence, no two of a kind, and as many
        others by the digest of their prompt, which knows nothing of the answers.
        """
        nats = self.paired.losses(tuned) / self.paired.tokens
        by_prompt = {
            answer.prompt: float(each)
            for answer, each in zip(self.paired.answers, nats, strict=True)
        }
        asked = [prompt for prompt in self.prompts if np.isfinite(by_prompt[prompt.id])]
        most = most_of_each_kind(asked, by_prompt)[:MOST_CHANGED]
        others = [prompt for prompt in self.prompts if prompt not in most]
        drawn = sorted(others, key=lambda prompt: sha256_text(f"shown {prompt.id}"))[:AT_RANDOM]
        return [
            Conversation(
                kind=prompt.kind,
                chosen=chosen,
                nats=by_prompt[prompt.id],
                prompt=_as_shown(words_of(prompt)),
                before=_as_shown(self.said[prompt.id].text),
                after=_as_shown(said[prompt.id].text),
            )
            for chosen, prompts in (("largest change", most), ("at random", drawn))
            for prompt in prompts
        ]

    def _not_judged(self, changes: Sequence[BehaviourChange]) -> list[str]:
        """Sentences about the behaviours that nothing is said of."""
        judged = {change.name for change in changes}
        missing = [rule.name for rule in BEHAVIOURS if rule.name not in judged]
        why: dict[str, list[str]] = {}
        for name in missing:
            reasons = [
                reason
                for reason, prompts in self.refused.items()
                if any(special_rule(prompt) == name for prompt in prompts)
            ]
            reason = reasons[0] if reasons else f"none of {len(self.prompts)} prompts asks for it"
            why.setdefault(reason, []).append(name)
        sentences = [f"{NOT_JUDGED}{', '.join(names)} ({reason})" for reason, names in why.items()]
        if self.leak is None:
            sentences.append(
                f"{NOT_JUDGED}domain leak (no domain data, or its answers have no form that the "
                "base's lack)"
            )
        return sentences


def names_not_judged(sentence: str) -> list[str]:
    """The behaviours that a sentence of `not_judged` is about."""
    return sentence.removeprefix(NOT_JUDGED).partition(" (")[0].split(", ")


def run_keys(behaved: Behaved | None) -> JsonObject:
    """What is behaved, by the keys of run.json."""
    if behaved is None:
        return {}
    return {
        "behaviours": behaved.behaviours,
        "not_judged": behaved.not_judged or None,
        "conversations": behaved.conversations,
    }


def ask_base(
    model: nn.Module,
    tokenizer: Any,
    options: EvalOptions | TuneOptions,
    completions: Sequence[str],
) -> AskedBase | None:
    """What the bare base says to the prompts that --behaviours asks for; None without it.

    `completions` are what the domain teaches to say, none where there is no domain. Raises
    OptionError for a model without a chat template.
    """
    if options.behaviours is None:
        return None
    check_chat_model(tokenizer)
    length = answer_length(model, options.answer_length)
    prompts, refused = chosen_for_behaviours(options.behaviours, options.prompts, tokenizer)
    return ask(model, tokenizer, prompts, length, completions, refused)


def ask(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    length: int,
    completions: Sequence[str] = (),
    refused: Mapping[str, Sequence[Prompt]] | None = None,
) -> AskedBase:
    """What the bare base says to `prompts`, in answers of at most `length` tokens.

    `completions` are what the domain teaches to say; `refused` are prompts that cannot be put to
    it, by reason.
    """
    openings = fitting_openings(model, tokenizer, prompts, length)
    fitting = {opening.id for opening in openings}
    prompts = [prompt for prompt in prompts if prompt.id in fitting]
    answers = cached_answers(model, tokenizer, openings, length, "behaviours")
    said = as_said(answers, tokenizer)
    return AskedBase(
        prompts=prompts,
        openings=openings,
        length=length,
        stops=stop_tokens(model, tokenizer),
        paired=paired_answers(model, answers),
        said=said,
        leak=domain_leak(completions, prompts, said) if completions else None,
        refused=refused or {},
    )


def check_chat_model(tokenizer: Any) -> None:
    """Refuse a model that cannot be asked."""
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            "--behaviours judges what a chat model answers, and the tokenizer of this model has no "
            "chat template; leave it out"
        )


def chosen_for_behaviours(
    number: int, file: str | None, tokenizer: Any
) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """(all of the user's prompts and `number` of ours, reason -> prompts that cannot be put).

    Ours are dealt in rounds, so that every rule has prompts that it is about; a larger number holds
    the smaller.
    """
    own, ours, refused = _askable(file, tokenizer)
    return [*own, *ours[:number]], refused


def prompts_about(
    names: Collection[str], number: int, file: str | None, tokenizer: Any
) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """The same for some behaviours: of ours first the prompts that their rules are about. Others
    are left out, but where one of the behaviours is about every answer.
    """
    own, ours, refused = _askable(file, tokenizer)
    others: list[Prompt] = []
    if {rule.name for rule in BEHAVIOURS if rule.name not in OF_ALL}.issuperset(names):
        own = [prompt for prompt in own if _is_about(prompt, names)]
    else:
        others = [prompt for prompt in ours if not _is_about(prompt, names)]
    about = [prompt for prompt in ours if _is_about(prompt, names)]
    return [*own, *[*about, *others][:number]], refused


def _is_about(prompt: Prompt, names: Collection[str]) -> bool:
    return not rules_for(prompt).keys().isdisjoint(names)


def _askable(
    file: str | None, tokenizer: Any
) -> tuple[list[Prompt], list[Prompt], dict[str, list[Prompt]]]:
    """(the user's prompts, ours as they are dealt, reason -> those that cannot be put)."""
    parts = parted(load_prompts())
    usable, refused = supported(
        [prompt for part in ASKED_PARTS for prompt in parts[part]], tokenizer
    )
    own = [prompt for part in ASKED_PARTS for prompt in users_prompts(file, tokenizer, part)]
    return own, dealt(usable), refused


def dealt(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts in rounds: OF_A_RULE of each special rule, then one of each other kind."""
    ordered = sorted(
        prompts, key=lambda prompt: (sha256_text(prompt.text), prompt.thinking or False)
    )
    ruled: dict[str, list[Prompt]] = {}
    others: dict[str, list[Prompt]] = {}
    for prompt in ordered:
        rule = special_rule(prompt)
        group = others.setdefault(prompt.kind, []) if rule is None else ruled.setdefault(rule, [])
        group.append(prompt)
    rounds: list[tuple[int, int, str, Prompt]] = []
    for first, groups, taken in ((0, ruled, OF_A_RULE), (1, others, 1)):
        for name, group in groups.items():
            rounds += [(place // taken, first, name, prompt) for place, prompt in enumerate(group)]
    return [prompt for *_, prompt in sorted(rounds, key=lambda row: row[:3])]


def as_said(answers: Sequence[Answer], tokenizer: Any) -> dict[str, Said]:
    """Prompt id -> the answer as text, without the token that ends it."""
    said = {}
    for answer in answers:
        ids = answer.scored[:-1] if answer.ended else answer.scored
        said[answer.prompt] = Said(tokenizer.decode(ids), answer.ended, len(answer.scored))
    return said


def most_of_each_kind(prompts: Sequence[Prompt], nats: Mapping[str, float]) -> list[Prompt]:
    """The prompt of each kind whose answer diverged most, the most diverged first."""
    ordered = sorted(prompts, key=lambda prompt: -nats[prompt.id])
    most: dict[str, Prompt] = {}
    for prompt in ordered:
        most.setdefault(prompt.kind, prompt)
    return list(most.values())


def words_of(prompt: Prompt) -> str:
    """A prompt as people read it: the user's turn alone, or every turn with its role."""
    lines = [f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt.messages]
    if len(lines) == 1:
        lines = [str(prompt.messages[0].get("content") or "")]
    if prompt.tools:
        names = [str(tool.get("function", tool).get("name")) for tool in prompt.tools]
        lines.append(f"[tools: {', '.join(names)}]")
    if prompt.thinking is not None:
        lines.append(f"[thinking {'on' if prompt.thinking else 'off'}]")
    return "\n".join(lines)


def _as_shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
