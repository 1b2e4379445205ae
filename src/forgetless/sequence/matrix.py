"""What each step of a sequence did to every domain: measured after each, as matrices and as lines
of text.

    row = measured(options, domains, "run/steps/1/adapter", Path("run/steps/1/measured.json"))
        # the base with one adapter
    sequence_of([base, row], ["sciq"], [1])      # what run.json holds under `sequence`

Costs an evaluation of everything per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from forgetless.data.inputs import read_held_out
from forgetless.data.tasks import find_task, load_task
from forgetless.evaluate.accuracy import answers
from forgetless.evaluate.evaluate import measure
from forgetless.evaluate.losses import TextLoss
from forgetless.files.atomic import read_json, write_json
from forgetless.model.adapter_files import with_adapter
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.tune import TuneOptions
from forgetless.sequence.domains import Domain
from forgetless.sequence.transfer import of_accuracy, transfer


def measured(
    options: TuneOptions, domains: Sequence[Domain], adapter: str | None, path: Path
) -> dict[str, Any]:
    """General text, tasks and every domain, of the base with one adapter as anybody would load it;
    read from `path` where this was measured before.
    """
    if path.exists():
        found: dict[str, Any] = read_json(path)
        return found
    torch.manual_seed(options.seed)
    tokenizer, model = load_tokenizer(options), load_model(options)
    if adapter:
        model = with_adapter(model, adapter)
    held_out = read_held_out(
        general=options.general,
        tasks=options.tasks,
        text_column=options.text_column,
        general_split=options.general_split,
        limit=options.limit,
    )
    numbers = measure(model, tokenizer, held_out)
    numbers["domains"] = {}
    for domain in domains:
        split = domain.held_split
        held_out = read_held_out(data=domain.held, data_split=split, limit=options.limit)
        losses = measure(model, tokenizer, held_out)["domain"]
        accuracy = None
        if find_task(domain.held) is not None:
            task, rows = load_task(domain.held, split=split)
            scored = answers(model, tokenizer, task, rows[: options.limit])
            accuracy = {
                key: scored[key] for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
            }
        numbers["domains"][domain.name] = {**losses, "accuracy": accuracy}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, numbers)
    return numbers


def sequence_of(
    rows: Sequence[Mapping[str, Any]], domains: Sequence[str], learned: Sequence[int]
) -> dict[str, Any]:
    """The matrices, transfer and the rise of general loss (from the base) after each row of
    measurements.
    """
    cells = [[row["domains"][name] for name in domains] for row in rows]
    matrix = [[cell["nats"] for cell in row] for row in cells]
    scored: list[list[Any]] = [
        [(cell["accuracy"] or {}).get("acc") for cell in row] for row in cells
    ]
    chosen_from = [
        j for j in range(len(domains)) if scored[0][j] is not None
    ]  # domains where choices exist
    accuracy = [[float(row[j]) for j in chosen_from] for row in scored] if chosen_from else None
    moved = (
        of_accuracy(accuracy, [learned[j] for j in chosen_from], steps=max(learned))
        if accuracy
        else None
    )
    general = None
    if rows[0]["general"]:
        base = TextLoss.read(rows[0]["general"])
        general = [base.rise(TextLoss.read(row["general"])).numbers() for row in rows]
    after = [
        ", ".join(name for name, at in zip(domains, learned, strict=True) if at == row)
        for row in range(1, len(rows))
    ]
    return {
        "domains": list(domains),
        "learned": list(learned),
        "rows": ["base model", *after],
        "matrix": matrix,
        "standard_error": [[cell["standard_error"] for cell in row] for row in cells],
        **transfer(matrix, learned),
        "accuracy_domains": [domains[j] for j in chosen_from],
        "accuracy": accuracy,
        "accuracy_transfer": moved,
        "general": general,
        "general_nats": [row["general"]["nats"] for row in rows] if rows[0]["general"] else None,
    }


def lines(sequence: Mapping[str, Any]) -> list[str]:
    """The matrix and what follows from it, as text."""
    names, labels = (
        sequence["domains"],
        ["base model", *("after " + name for name in sequence["rows"][1:])],
    )
    width = max(map(len, [*labels, "nats per token"])) + 2
    wide = max(10, *(len(name) + 2 for name in names))
    found = []

    def table(
        title: str, columns: Sequence[str], rows: Sequence[Sequence[float]], number: str
    ) -> None:
        found.append(f"{title:<{width}}" + "".join(f"{name:>{wide}}" for name in columns))
        found.extend(
            f"{labels[i]:<{width}}" + "".join(f"{value:>{wide}{number}}" for value in row)
            for i, row in enumerate(rows)
        )

    general = sequence["general_nats"]
    matrix = [
        [*row, *([general[i]] if general else [])] for i, row in enumerate(sequence["matrix"])
    ]
    table("nats per token", [*names, *(["general"] if general else [])], matrix, ".4f")
    if sequence["accuracy"]:
        table("accuracy", sequence["accuracy_domains"], sequence["accuracy"], ".3f")
    said = [
        f"{key.replace('_', ' ')} {sequence[key]:+.4f}"
        for key in ("backward_transfer", "forward_transfer")
        if sequence[key] is not None
    ]
    rises = f"; general loss {sequence['general'][-1]['nats']:+.4f}" if general else ""
    if smaller := sequence.get("refactored"):
        found.append(
            f"the final adapter at rank {smaller['rank']}: relative error {smaller['error']:.3f} "
            "of the update; "
            + ", ".join(f"{name} {loss:.4f}" for name, loss in smaller["losses"].items())
        )
    found.append(
        f"average {sequence['average']:.4f}{''.join('; ' + one for one in said)} (above 0 is "
        f"good){rises}, in nats per token"
    )
    return found
