"""Methods that hold the effective update where importance says so, by a pull right before each
optimizer step (`forgetless.Penalty`).

    hold        importance from a file of `forgetless record`
    ewc-lora    the diagonal Fisher of the base weights on the update U = s B A (arXiv 2305.10626,
                2602.17559), from a file, or of --replay's text on the spot; our penalty has no
                factor 1/2, so its strength is half of theirs
    l2          importance 1 everywhere: a control that says "do not move at all"
    shuffled    the file's importance in a random order within each weight: a control that has the
                right numbers in the wrong places
"""

from __future__ import annotations

from torch import nn

from forgetless.data.encoding import batches
from forgetless.errors import OptionError
from forgetless.importance.controls import shuffled, uniform
from forgetless.importance.importance import Importance
from forgetless.methods.method import Setup
from forgetless.model import distributed
from forgetless.options.tune import TuneOptions
from forgetless.penalty.pull import Penalty
from forgetless.record.fisher import Fisher


def _penalty(setup: Setup, model: nn.Module, importance: Importance) -> Penalty:
    """The penalty of `importance` by the options' strength, layers and anchor."""
    o = setup.options
    assert o.strength is not None
    penalty = Penalty(
        model,
        importance,
        strength=o.strength,
        layers=setup.layers,
        anchor=o.anchor,
        names=o.targets if o.full else None,
        offload=o.offload_importance,
        shard=distributed.running(),
    )
    penalty.settle()  # this process lets go of what the others keep
    return penalty


def from_file(setup: Setup, model: nn.Module) -> Penalty | None:
    """The penalty of --importance; None where its strength is 0."""
    assert setup.importance is not None
    return _penalty(setup, model, setup.importance) if setup.options.strength else None


def of_shuffled(setup: Setup, model: nn.Module) -> Penalty | None:
    """The penalty of --importance shuffled by the seed; None where its strength is 0."""
    assert setup.importance is not None
    if not setup.options.strength:
        return None
    return _penalty(setup, model, shuffled(setup.importance, setup.options.seed))


def l2(setup: Setup, model: nn.Module) -> Penalty | None:
    """The penalty of importance 1; None where its strength is 0."""
    if not setup.options.strength:
        return None
    return _penalty(setup, model, uniform(model, setup.options.targets))


def ewc_lora(setup: Setup, model: nn.Module) -> Penalty | None:
    """The penalty of the diagonal Fisher, from --importance or recorded now on --replay.

    None where its strength is 0.
    """
    if not setup.options.strength:
        return None
    importance = setup.importance
    if importance is None:
        importance = _fisher_of_replay(setup, model)
    elif importance.info.get("estimator") != Fisher.estimator:
        estimator = importance.info.get("estimator", "?")
        raise OptionError(
            "--method ewc-lora holds by the diagonal Fisher, found importance of estimator "
            f"'{estimator}'; record with --estimator fisher, "
            "give --replay TEXT instead, or use --method hold"
        )
    return _penalty(setup, model, importance)


def _fisher_of_replay(setup: Setup, model: nn.Module) -> Importance:
    """The diagonal Fisher of --replay's text; each process reads its shard of the batches."""
    recorder = Fisher(model, setup.options.targets)
    device = next(model.parameters()).device
    every = batches(
        setup.text, batch_size=setup.options.batch_size, pad_id=setup.tokenizer.pad_token_id
    )
    for batch in distributed.shard(list(every)):
        recorder.observe(**{key: value.to(device) for key, value in batch.items()})
    return recorder.finish()


def needs_fisher(options: TuneOptions) -> None:
    """Refuse ewc-lora without a file and without a text, and with both."""
    if (options.importance is None) == (options.replay is None):
        raise OptionError(
            "--method ewc-lora needs --importance FILE (of --estimator fisher) or --replay TEXT, "
            "one of them"
        )


def no_file(options: TuneOptions) -> None:
    """Refuse an anchor other than the base: l2 reads no file that could hold one."""
    if options.anchor != "base":
        raise OptionError(
            f"--method l2 holds towards the base, found --anchor {options.anchor}; use --anchor "
            "base"
        )
