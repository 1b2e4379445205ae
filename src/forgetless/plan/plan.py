"""plan(): what recording and tuning will take, from a model's configuration alone: bytes of the
file, memory per process, time per step. No weights are read.

    forgetless plan meta-llama/Llama-3.1-8B --tier kronecker:16 --processes 4 --flops 400e12

sketch.py looks at the model on torch's meta device, where tensors have shapes and no storage;
memory.py and time.py count what it takes. Files are within 1 % of what is then written
(benchmarks/plan.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from forgetless.errors import OptionError
from forgetless.files.untrusted import JsonObject
from forgetless.importance.sizes import bytes_of_file, total, usual_tiers
from forgetless.importance.tiers import parse_tier
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.plan import PlanOptions
from forgetless.plan.memory import recording_memory, tuning_memory
from forgetless.plan.sketch import sketched
from forgetless.plan.time import Operations, Rates, Seconds, operations, rates, seconds
from forgetless.report import numbers, terminal


@dataclass(frozen=True)
class Memory:
    """Bytes per process while recording and while tuning, by what they are for."""

    recording: dict[str, float]
    tuning: dict[str, float]


@dataclass(frozen=True)
class Resources:
    """What it will take, as `--json` prints it.

    weights             how many target weights, of so many `elements`
    parameters          of the whole model, of which `trained_parameters` are tuned
    files               tier -> bytes of the importance file; `tier` is the one to tune with
    memory              of recording and of tuning: what for -> bytes per process
    operations          floating-point operations of a step, of the pull and of recording
    rates, seconds      operations per second and where they come from; how long all that takes
    """

    model: str
    targets: str
    weights: int
    general_tokens: int
    elements: int
    parameters: int
    trained_parameters: int
    estimator: str
    tier: str
    files: dict[str, int]
    processes: int
    engine: str
    memory: Memory
    operations: Operations
    rates: Rates
    seconds: Seconds


def plan(options: PlanOptions) -> JsonObject:
    """Print the plan and return it.

    Raises OptionError for a tier that the estimator cannot have.
    """
    estimator = ESTIMATORS[options.estimator]
    tiers = usual_tiers(options.estimator, options.cov_rank)
    tier = options.tier or tiers[0]
    if parse_tier(tier)[0] == "kronecker" and estimator.tier != "kronecker":
        raise OptionError(
            f"--tier {tier} needs --estimator kronecker, found --estimator {options.estimator}"
        )
    sketch = sketched(options)
    anchor = options.rank if estimator.trains else None
    files = {
        name: bytes_of_file(sketch.weights, name, estimator=options.estimator, anchor_rank=anchor)
        for name in dict.fromkeys([tier, *tiers])
    }
    rate = rates(options, sketch, tier)
    work = operations(options, sketch, tier)
    taken = Resources(
        model=options.model,
        targets=options.targets,
        weights=len(sketch.weights),
        general_tokens=options.general_tokens,
        elements=sketch.elements,
        parameters=sketch.parameters,
        trained_parameters=sketch.elements if options.full else sketch.lora,
        estimator=options.estimator,
        tier=tier,
        files=files,
        processes=options.processes,
        engine=options.engine,
        memory=Memory(
            recording=recording_memory(options, sketch),
            tuning=tuning_memory(options, sketch, tier),
        ),
        operations=work,
        rates=rate,
        seconds=seconds(work, rate, options),
    )
    print(json.dumps(asdict(taken), indent=1) if options.json else _text(taken, options))
    return asdict(taken)


def _text(taken: Resources, options: PlanOptions) -> str:
    """The plan for people."""
    parts = [
        f"{taken.model}: {taken.parameters:,} parameters; {taken.weights} target weights with "
        f"{taken.elements:,} elements ({taken.targets}); {taken.trained_parameters:,} trained",
        _files(taken),
        _memory(taken, options),
        _time(taken, options),
        "Memory is what tensors take: an allocator's holes and libraries come on top. Time is a "
        "lower bound:\nall that is no product comes on top.",
    ]
    return "\n\n".join(parts)


def _files(taken: Resources) -> str:
    """A table of the file's size in each form that it can have."""
    rows = []
    for tier, size in taken.files.items():
        fraction = size / (4 * taken.parameters)
        mark = "<- tuned with" if tier == taken.tier else ""
        rows.append([tier, numbers.byte_size(size), f"{100 * fraction:.3f} %", mark])
    columns = [f"importance file, {taken.estimator}", "size", "of the model in f32", ""]
    return terminal.table(columns, rows)


def _memory(taken: Resources, options: PlanOptions) -> str:
    """A table of memory, by what it is for."""
    recording, tuning = taken.memory.recording, taken.memory.tuning
    shown = lambda parts, name: numbers.byte_size(parts[name]) if parts.get(name) else "-"
    names = dict.fromkeys([*recording, *tuning])
    rows = [[name, shown(recording, name), shown(tuning, name)] for name in names]
    rows.append(["together", numbers.byte_size(total(recording)), numbers.byte_size(total(tuning))])
    rows.append(["tokens per forward pass", f"{options.record_tokens:,}", f"{options.tokens:,}"])
    of = "memory"
    if options.processes > 1:
        of += f" per process ({options.processes}, {options.engine}; importance shared out)"
    return terminal.table([of, "recording", "tuning"], rows)


def _time(taken: Resources, options: PlanOptions) -> str:
    """A table of operations and time."""
    work, spent, rate = taken.operations, taken.seconds, taken.rates
    tokens = f"{options.accumulation} x {options.tokens:,} tokens"
    rows = [
        ["optimizer step", f"{work.step:.3g}", numbers.duration(spent.step), tokens],
        [
            "pull",
            f"{work.pull:.3g}",
            f"{1e3 * spent.pull:.3g} ms",
            f"{100 * spent.share:.2g} % of the step",
        ],
        [
            "recording",
            f"{work.recording:.3g}",
            numbers.duration(spent.recording),
            f"{taken.general_tokens:,} tokens",
        ],
    ]
    at = (
        f"at {rate.step:.3g} operations per second for the model and {rate.pull:.3g} for the "
        f"pull ({rate.source})"
    )
    return terminal.table(["time", "operations", "", "for"], rows) + "\n" + at
