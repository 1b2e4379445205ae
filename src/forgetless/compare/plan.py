"""What an experiment asks for: what cannot work, and what would be run. Nothing is loaded."""

from __future__ import annotations

from forgetless.compare.experiment import Experiment, tune_options, validation_trials
from forgetless.errors import OptionError
from forgetless.methods.table import chosen as chosen_methods


def check_methods(experiment: Experiment) -> None:
    """Raise OptionError for methods that do not exist, cannot be combined or lack what they need,
    in any setting.
    """
    for label, method in experiment.methods.items():
        for settings in method.settings():
            options = tune_options(
                experiment, settings, data="x", replay="x", importance="x", out="x", seed=0
            )
            try:
                chosen_methods(options)
            except OptionError as error:
                raise OptionError(f"methods: {label}: {error}") from None


def plan_text(experiment: Experiment, part: str) -> str:
    """How many runs there are of what, for people; `part` is that of --part."""
    seeds = [] if part == "validation" else experiment.seeds.get("test", [])
    final = len(experiment.methods) * len(experiment.domains) * len(seeds)
    lines = [
        f"{experiment.title}: {len(validation_trials(experiment))} validation runs and {final} "
        f"test runs; general text {', '.join(experiment.general)}"
    ]
    steps = sum(
        len(spec.domains) * len(spec.methods) * len(seeds) for spec in experiment.sequences.values()
    )
    if steps:
        orders = ", ".join(
            f"{name} ({', '.join(spec.domains)})" for name, spec in experiment.sequences.items()
        )
        lines.append(f"  and {steps} runs one after another: {orders}")
    for label, method in experiment.methods.items():
        grid = " ".join(f"{key}={values}" for key, values in method.grid.items())
        lines.append(f"  {label:<20} {method.options['method']:<16} {grid}")
    return "\n".join(lines)
