"""What is known of every estimator of importance, a row each.

An estimator is a class in record/ that turns text into importance, and a row here that says what
the rest of the program must know of it: which options of `record` mean something to it, the form
in which it writes, and what its numbers are worth. Nobody else asks for an estimator by its name.

    ESTIMATORS["kronecker"].strength             # 10.0
    known(importance.info.get("estimator"))      # the row, or None for a name that is not ours

docs/estimators.md compares them. Nothing heavy is imported: classes are named by reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.errors import OptionError
from forgetless.options.option import Given, flag


@dataclass(frozen=True)
class Estimator:
    """One estimator.

    help        one line for --help
    recorder    its class (options/reference.py); None: importance is 1 everywhere, so there is
                nothing to read, to calibrate, to shrink along or to consolidate
    trains      whether it trains an adapter on the text, or only observes passes over it
    gradients   whether it needs the backward pass
    tier        the form in which it records: f32, factored or kronecker
    reads       the options of `record` that mean something to it and not to every estimator
    in_nats     whether half its energy is a rise of the general loss in nats, up to a factor near 1
    strength    what to hold with where nothing is given; None: there is no good default
    predicts    whether its predictions kept budgets for updates of every kind (docs/budget.md)
    """

    help: str
    recorder: str | None
    tier: str
    trains: bool = False
    gradients: bool = True
    reads: tuple[str, ...] = ()
    in_nats: bool = False
    strength: float | None = None
    predicts: bool = False

    @property
    def constant(self) -> bool:
        """Whether its importance is the same for every weight and every text."""
        return self.recorder is None


# Options of `record` that only estimators which train an adapter use.
TRAINING_OPTIONS = (
    "rank",
    "alpha",
    "dropout",
    "rslora",
    "gradient",
    "clamp",
    "xi",
    "keep_anchor",
    "epochs",
    "max_steps",
    "accumulation",
    "learning_rate",
    "schedule",
    "gradient_checkpointing",
    "offload",
)
# The strength for importance whose energy is in nats: on the lab model and the demo it kept most of
# the learning and lost least of the rest (LOG.md).
NATS_STRENGTH = 10.0
ESTIMATORS: dict[str, Estimator] = {
    "path": Estimator(
        help="credit along a short training",
        recorder="forgetless.record.path:PathIntegral",
        tier="f32",
        trains=True,
        reads=TRAINING_OPTIONS,
        # Chosen like NATS_STRENGTH; its unit depends on the training that records it.
        strength=0.01,
    ),
    "path-factored": Estimator(
        help="the same by rows and columns",
        recorder="forgetless.record.path_factored:PathFactored",
        tier="factored",
        trains=True,
        reads=TRAINING_OPTIONS,
    ),
    "fisher": Estimator(
        help="squared gradients of each weight",
        recorder="forgetless.record.fisher:Fisher",
        tier="f32",
        reads=("labels", "groups"),
        in_nats=True,
        strength=NATS_STRENGTH,
    ),
    "kronecker": Estimator(
        help="covariances of inputs and output gradients",
        recorder="forgetless.record.kronecker:Kronecker",
        tier="kronecker",
        reads=("labels", "groups", "cov_rank"),
        in_nats=True,
        strength=NATS_STRENGTH,
        predicts=True,
    ),
    "activation": Estimator(
        help="size of the inputs",
        recorder="forgetless.record.activation:Activation",
        tier="factored",
        gradients=False,
    ),
    "uniform": Estimator(help="1 everywhere", recorder=None, tier="factored", gradients=False),
}


def known(name: object) -> Estimator | None:
    """The row of the estimator that an importance file names, if it is one of ours."""
    return ESTIMATORS.get(name) if isinstance(name, str) else None


def in_nats(name: object) -> bool:
    """Whether the energy of importance of this estimator is a rise of the general loss in nats."""
    row = known(name)
    return row is not None and row.in_nats


def default_strength(name: str) -> float:
    """The strength for importance of this estimator where none is given.

    Raises OptionError for estimators without one.
    """
    row = known(name)
    if row is None or row.strength is None:
        with_one = (name for name, row in ESTIMATORS.items() if row.strength is not None)
        raise OptionError(
            f"importance of estimator '{name}' has no default strength (known: "
            f"{', '.join(with_one)}); give the strength"
        )
    return row.strength


def unread(name: str) -> list[str]:
    """The options that other estimators read and this one does not."""
    every = dict.fromkeys(option for row in ESTIMATORS.values() for option in row.reads)
    row = known(name)
    return [option for option in every if row is None or option not in row.reads]


def check_estimator(given: Given, name: str) -> None:
    """Raise OptionError where an option of `record` was given that the estimator would ignore."""
    trains = ESTIMATORS[name].trains
    wrong = [option for option in unread(name) if given.get(option) is not None]
    if wrong:
        flags = ", ".join(map(flag, wrong))
        why = "trains an adapter" if trains else "makes one pass over the text, without training"
        advice = "leave out" if trains else "leave out, or give --estimator path"
        raise OptionError(f"{flags}: not used by --estimator {name}, which {why}; {advice}")
    if not trains and given.get("preset") == "paper":
        raise OptionError(
            f"--preset paper records the path integral, found --estimator {name}; leave out one of "
            "them"
        )
