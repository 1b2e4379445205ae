"""plan(): what recording and tuning will take, from a model's configuration alone: bytes of the
file, memory per process, time per step. No weights are read.

    forgetless plan meta-llama/Llama-3.1-8B --tier kronecker:16 --processes 4 --flops 400e12

sketch.py looks at the model on torch's meta device, where tensors have shapes and no storage;
memory.py and time.py count what it takes. Files are within 1 % of what is then written
(benchmarks/plan.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from forgetless.errors import OptionError
from forgetless.files.untrusted import JsonObject
from forgetless.importance.sizes import bytes_of_file, total, usual_tiers
from forgetless.importance.tiers import parse_tier
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.plan import PlanOptions
from forgetless.plan.fits import Fits, fitting_on
from forgetless.plan.memory import recording_memory, tuning_memory
from forgetless.plan.sketch import Sketch, sketched
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
    fits                what fits on GPUs of usual sizes, and in how many passes over the text
    fits_smallest       the same of `smallest` options
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
    fits: list[Fits]
    fits_smallest: list[Fits]
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
        name: bytes_of_file(
            sketch.weights,
            name,
            estimator=options.estimator,
            anchor_rank=anchor,
            general_tokens=options.general_tokens,
        )
        for name in dict.fromkeys([tier, *tiers])
    }
    rate = rates(options, sketch, tier)
    work = operations(options, sketch, tier)
    memory = _memory_of(options, sketch, tier)
    least = smallest(options)
    at_least = _memory_of(least, sketch, tier)
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
        memory=memory,
        fits=fitting_on(options, sketch, memory.recording, memory.tuning),
        fits_smallest=fitting_on(least, sketch, at_least.recording, at_least.tuning),
        operations=work,
        rates=rate,
        seconds=seconds(work, rate, options),
    )
    print(json.dumps(asdict(taken), indent=1) if options.json else _text(taken, options))
    return asdict(taken)


def _memory_of(options: PlanOptions, sketch: Sketch, tier: str) -> Memory:
    return Memory(recording_memory(options, sketch), tuning_memory(options, sketch, tier))


def smallest(options: PlanOptions) -> PlanOptions:
    """The options with what takes the least memory: one sequence at a time, its activations
    recomputed, and where an adapter is trained the base in 4 bit.
    """
    return replace(
        options,
        quantize=options.quantize if options.full else "4bit",
        gradient_checkpointing=True,
        tokens=min(options.tokens, options.length),
        record_tokens=min(options.record_tokens, options.length),
    )


def _text(taken: Resources, options: PlanOptions) -> str:
    """The plan for people."""
    parts = [
        f"{taken.model}: {taken.parameters:,} parameters; {taken.weights} target weights with "
        f"{taken.elements:,} elements ({taken.targets}); {taken.trained_parameters:,} trained",
        _files(taken),
        _memory(taken, options),
        _fits(taken),
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
    passes = {"sums": "sums, all weights in one pass"}
    rows = [[passes.get(n, n), shown(recording, n), shown(tuning, n)] for n in names]
    rows.append(["together", numbers.byte_size(total(recording)), numbers.byte_size(total(tuning))])
    rows.append(["tokens per forward pass", f"{options.record_tokens:,}", f"{options.tokens:,}"])
    of = "memory"
    if options.processes > 1:
        of += f" per process ({options.processes}, {options.engine}; importance shared out)"
    return terminal.table([of, "recording", "tuning"], rows)


def _fits(taken: Resources) -> str:
    """A table of what fits on usual GPUs, as asked for and with what takes the least memory."""
    columns = ["fits on a GPU of", *(f"{fits.gib} GB" for fits in taken.fits)]
    rows = []
    for label, each in (("", taken.fits), (", smallest", taken.fits_smallest)):
        rows.append([f"recording{label}", *map(_in_passes, each)])
        rows.append([f"tuning{label}", *("yes" if fits.tuning else "no" for fits in each)])
    lines = [
        terminal.table(columns, rows),
        "smallest: --quantize 4bit (adapters) --gradient-checkpointing --batch-size 1",
    ]
    if any((fits.recording_passes or 1) > 1 for fits in (*taken.fits, *taken.fits_smallest)):
        lines.append(
            "passes over the text: record divides the weights by itself; --groups N divides further"
        )
    return "\n".join(lines)


def _in_passes(fits: Fits) -> str:
    """'in one pass', 'in 3 passes', 'no'."""
    if fits.recording_passes is None:
        return "no"
    return "in one pass" if fits.recording_passes == 1 else f"in {fits.recording_passes} passes"


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
