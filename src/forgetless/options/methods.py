"""What is known of every method, a row each.

A method is one or a few functions in methods/, each for one place in the story of `tune`, and a row
here that names them and says what the rest of the program must know: what the method needs, which
options mean something to it, what it sets, what it cannot be combined with.

    METHODS["kl"].needs                    # ("replay",)
    method_settings({"method": "kl"})      # {"method": "kl", "kl_weight": 1.0, "kl_sequences": 2}

methods/table.py checks what `--method a,b` asks for and loads its functions; docs/methods.md has a
card for each. Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forgetless.options.estimators import ESTIMATORS
from forgetless.options.holding import default_settings
from forgetless.options.option import Given

# Places that at most one method fills; the terms of several methods add up.
PLACES = ("adapter", "optimizer", "objective", "pull", "after_step", "finish")
# What comparisons call methods of one kind.
FAMILIES = ("baseline", "hold", "penalty", "loss", "data", "adapter", "control")


@dataclass(frozen=True)
class Method:
    """One method.

    help        a few words for --help
    family      one of FAMILIES
    needs       options without which it cannot work
    reads       more options of methods that mean something to it
    settings    what it sets where neither the command line nor a YAML file does
    refuses     methods that it cannot be combined with -> why
    lora        whether it is about LoRA adapters, so that full fine-tuning is refused
    budget      whether it leaves penalty and finish to `--budget`

    The rest are functions by reference (options/reference.py); without any, tuning is plain.

    check       the options -> OptionError for those that do not fit it
    rows        the bare model and the encoded training rows -> the rows to train on
    adapter     the bare model -> the model to train
    start       what happens to the model to train before tuning
    optimizer   the model to train -> a torch optimizer
    objective   what the rows are learned by in place of their cross-entropy (methods/objectives.py)
    loss        a term: adds its gradient once per optimizer step, before the data's gradients are
                there, so that clipping sees the sum
    pull        a penalty: adds its gradient right before the step, after clipping
    after_step  holds the update right after each step of the optimizer (methods/after_step.py)
    finish      the trained model -> numbers for run.json; may change the model in place
    save        how to write the adapter, where not as it is
    """

    help: str
    family: str = "baseline"
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    settings: Given = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    lora: bool = False
    budget: bool = False
    check: str | None = None
    rows: str | None = None
    adapter: str | None = None
    start: str | None = None
    optimizer: str | None = None
    objective: str | None = None
    loss: str | None = None
    pull: str | None = None
    after_step: str | None = None
    finish: str | None = None
    save: str | None = None

    @property
    def needs_earlier(self) -> bool:
        """Whether it works beside the adapters of earlier domains, merged before it starts."""
        return "earlier" in self.needs


# The methods that pull the update by a penalty.
PULLS = ("hold", "ewc-lora", "la-lora", "l2", "shuffled")
# What adapters that are no product of two factors cannot be combined with, and why.
NOT_LORA = {
    **dict.fromkeys(
        (*PULLS, "proximal", "project", "null-start", "lora-fa", "o-lora", "rslora", "wise"),
        "its update is not the product of two LoRA factors",
    ),
    "full": "it is an adapter",
}
# What the control of stage 1's training cannot be combined with, and why.
ALONE = dict.fromkeys(
    (*PULLS, "proximal", "project", "kl", "replay"),
    "it is the control without a penalty and without general text while tuning",
)
# What a method that changes the base weight cannot be combined with, and why.
MOVES = dict.fromkeys(
    (*PULLS, "proximal", "project", "null-start", "kl", "wise", "lora-fa", "o-lora"),
    "corda starts by taking directions out of the base weight, so its factors are not the update",
)
# What methods that hold after the step cannot be combined with, and why.
HELD_TWICE = {
    **dict.fromkeys(PULLS, "both hold the same update"),
    "lora-fa": "its optimizer corrects the step of B for an A that must not move",
}
METHODS: dict[str, Method] = {
    "plain": Method(help="LoRA", budget=True),
    "rslora": Method(
        help="LoRA scaled by alpha / sqrt(rank)",
        family="adapter",
        settings={"rslora": True},
        lora=True,
        budget=True,
    ),
    "full": Method(help="the target weights themselves", settings={"full": True}, budget=True),
    "small-lr": Method(
        help="a tenth of the learning rate", settings={"learning_rate": 1e-4}, budget=True
    ),
    "hold": Method(
        help="held where importance says so",
        family="hold",
        needs=("importance",),
        reads=("strength",),
        pull="forgetless.methods.pulls:from_file",
        budget=True,
    ),
    "proximal": Method(
        help="held by importance after each step",
        family="hold",
        needs=("importance", "strength"),
        check="forgetless.methods.after_step:check_towards_base",
        after_step="forgetless.methods.after_step:proximal",
        refuses=HELD_TWICE,
    ),
    "project": Method(
        help="steps projected off high curvature",
        family="penalty",
        needs=("importance",),
        reads=("protect",),
        settings={"protect": 0.9},
        check="forgetless.methods.after_step:check_towards_base",
        after_step="forgetless.methods.after_step:project",
        refuses=HELD_TWICE,
    ),
    "kl": Method(
        help="predictions on general text held to the base's",
        family="data",
        needs=("replay",),
        reads=(
            "replay_documents",
            "kl_weight",
            "kl_sequences",
            "kl_every",
            "kl_length",
            "kl_kinds",
            "importance",
        ),
        settings={"kl_weight": 1.0, "kl_sequences": 2},
        check="forgetless.methods.kinds:check_kinds",
        loss="forgetless.methods.kl:kl_term",
        budget=True,
    ),
    "replay": Method(
        help="general text mixed in",
        family="data",
        needs=("replay",),
        reads=("replay_documents", "replay_share", "replay_weight", "importance"),
        settings={"replay_share": 0.05},
        loss="forgetless.methods.terms:replay_term",
        budget=True,
    ),
    "self-dialogues": Method(
        help="what the base says itself among the rows",
        family="data",
        needs=("replay",),
        reads=("replay_documents", "importance"),
        rows="forgetless.methods.training_rows:self_dialogues",
        budget=True,
    ),
    "eaft": Method(
        help="tokens weighted by entropy",
        family="loss",
        objective="forgetless.methods.objectives:eaft",
        budget=True,
    ),
    "dft": Method(
        help="tokens weighted by their probability",
        family="loss",
        objective="forgetless.methods.objectives:dft",
        budget=True,
    ),
    "masked-kl": Method(
        help="the other tokens held to the base's",
        family="loss",
        reads=("masked_weight",),
        settings={"masked_weight": 1.0},
        objective="forgetless.methods.objectives:masked_kl",
        budget=True,
    ),
    "stm": Method(
        help="tokens that surprise the base left out",
        family="loss",
        reads=("stm_perplexity",),
        settings={"stm_perplexity": 2.5},
        rows="forgetless.methods.training_rows:stm",
        budget=True,
    ),
    "wise": Method(
        help="the finished update scaled",
        needs=("scale",),
        finish="forgetless.methods.scaling:wise",
    ),
    "dg-hard": Method(
        help="the finished update without its noise",
        check="forgetless.methods.noise:check_full",
        finish="forgetless.methods.noise:dg_hard",
    ),
    "ewc-lora": Method(
        help="held by the diagonal Fisher",
        family="penalty",
        reads=("importance", "replay", "replay_documents", "strength"),
        settings={"strength": ESTIMATORS["fisher"].strength},
        check="forgetless.methods.pulls:needs_fisher",
        pull="forgetless.methods.pulls:ewc_lora",
    ),
    "la-lora": Method(
        help="factors held by their own curvature",
        family="penalty",
        needs=("replay", "strength"),
        reads=("replay_documents",),
        lora=True,
        pull="forgetless.methods.laplace:la_lora",
    ),
    "l2": Method(
        help="control: held equally everywhere",
        family="control",
        needs=("strength",),
        check="forgetless.methods.pulls:no_file",
        pull="forgetless.methods.pulls:l2",
    ),
    "shuffled": Method(
        help="control: held by importance in a random order",
        family="control",
        needs=("importance",),
        reads=("strength",),
        pull="forgetless.methods.pulls:of_shuffled",
    ),
    "o-lora": Method(
        help="turned away from earlier adapters",
        needs=("earlier",),
        reads=("orthogonality",),
        settings={"orthogonality": 0.5},
        lora=True,
        check="forgetless.methods.orthogonal:check_earlier",
        loss="forgetless.methods.orthogonal:o_lora",
        refuses={"lora-fa": "it freezes A, the factor that o-lora turns"},
    ),
    "general-steps": Method(
        help="control: steps on general text first",
        family="control",
        needs=("replay",),
        reads=("replay_documents", "general_steps"),
        start="forgetless.methods.control:general_steps",
        refuses=ALONE,
    ),
    "oft": Method(
        help="weights rotated in blocks",
        family="adapter",
        lora=True,
        adapter="forgetless.methods.adapters:oft",
        # wise scales the rotations by what generates them.
        refuses={name: why for name, why in NOT_LORA.items() if name != "wise"},
    ),
    "osf": Method(
        help="only the smallest singular directions",
        family="adapter",
        lora=True,
        check="forgetless.methods.adapters:check_osf",
        adapter="forgetless.methods.adapters:osf",
        refuses=NOT_LORA,
    ),
    "corda": Method(
        help="starts where weights act least on general text",
        family="adapter",
        needs=("replay",),
        reads=("replay_documents",),
        lora=True,
        check="forgetless.methods.adapters:check_corda",
        adapter="forgetless.methods.adapters:corda",
        save="forgetless.methods.adapters:save_as_lora",
        refuses=MOVES,
    ),
    "null-start": Method(
        help="A starts beside what general inputs use",
        family="adapter",
        needs=("importance",),
        lora=True,
        check="forgetless.methods.after_step:check_towards_base",
        start="forgetless.methods.null_start:null_start",
        budget=True,
    ),
    "lora-fa": Method(
        help="LoRA with A frozen",
        family="adapter",
        lora=True,
        optimizer="forgetless.methods.adapters:lora_fa",
    ),
}


def method_names(spec: str | None) -> list[str]:
    """The names in `--method a,b`."""
    return [name.strip() for name in (spec or "").split(",") if name.strip()]


def method_settings(given: Given) -> Given:
    """The method by its default (holding.py), and the settings of the methods that it names.

    They are stronger than the preset. Unknown names are left to methods/table.py.
    """
    decided = default_settings(given)
    settings: dict[str, Any] = {}
    for name in method_names(decided["method"]):
        if name in METHODS:
            settings.update(METHODS[name].settings)
    return {**settings, **decided}


def budget_pulls(method: str | None) -> bool:
    """Whether a budget holds by a pull: not where a divergence alone is what it sets."""
    names = method_names(method)
    return "kl" not in names or any(METHODS[name].pull for name in names if name in METHODS)


def family(method: str) -> str:
    """The family of the first method that `--method a,b` names."""
    first = next(iter(method_names(method)), "")
    return METHODS[first].family if first in METHODS else "baseline"
