"""shrink(): a finished adapter, whoever trained it with PEFT, made to keep a forgetting budget;
along importance or by plain scaling.

The story: refuse what cannot be shrunk, measure the bare base on the general text, shrink by more
and less, take the most learning that keeps the budget on the control part, check it once on the
other part, write. Plain scaling is measured beside it at the same budget. The input is never
written to.

    DIR/final/      the adapter, same rank and configuration; loads with plain PEFT
    DIR/run.json    configuration, before, after, budget with verdict, the curve of each way

Along a way, the share 1 is the adapter as it came and 0 the base. Scaling: share * U. Shrinking: mu
= ((1 - share) / share)^2 in units of the typical importance (shrunk.py).

    forgetless shrink their-adapter --importance model.importance.safetensors --budget 1% --general
    held-out.jsonl --data domain.jsonl --out shrunk
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from forgetless.budget.baseline import open_ledger
from forgetless.budget.budget import check_reach, parse
from forgetless.budget.finish import EACH, keep_budget, keep_predicted, ways_of
from forgetless.budget.open import domain
from forgetless.budget.predicted import Forecast, check_calibrated
from forgetless.data.inputs import read_held_out
from forgetless.data.tasks import encode_rows
from forgetless.errors import OptionError
from forgetless.evaluate.evaluate import changes, measure, table
from forgetless.files.atomic import write_json
from forgetless.files.budget_json import BudgetReport
from forgetless.files.hub import importance_path
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.room import check_free_space, check_output_folder
from forgetless.files.run_json import Run
from forgetless.files.schema import as_record
from forgetless.importance.importance import Importance
from forgetless.model.adapter_files import checked, load_tuned
from forgetless.model.adapters import bare
from forgetless.model.loading import load_tokenizer, save_whole
from forgetless.model.targets import MOVES_THE_BASE
from forgetless.model.update import Update
from forgetless.options.finished import ShrinkOptions
from forgetless.options.option import as_dict
from forgetless.penalty.fit import check_fit
from forgetless.penalty.pull import Penalty
from forgetless.report.budget import curves, sentences
from forgetless.report.cards import write_card

logger = logging.getLogger("forgetless")
# What in an adapter's configuration moves the model by more than scale * B @ A, and so stays when
# that is shrunk.
BEYOND = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules trained beside it",
    "trainable_token_indices": "trained token embeddings",
    "lora_bias": "trained biases",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters of fused layers",
}


def shrink(options: ShrinkOptions) -> dict[str, Any]:
    """Shrink as `options` say; writes `options.out` and returns what is in its run.json.

    Raises ValueError or OptionError before anything is written.
    """
    config = _check(options)
    options = replace(options, model=options.model or config.get("base_model_name_or_path") or "")
    if not options.model:
        raise OptionError(f"'{options.adapter}' does not name its base model; give --model MODEL")
    file = importance_path(options.importance) if options.importance else None
    importance = Importance.load(file) if file else None
    calibration = check_calibrated(importance) if options.budget and not options.general else None
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    started, out = time.perf_counter(), Path(options.out)
    held_out = read_held_out(
        general=options.general,
        data=options.data,
        text_column=options.text_column,
        general_split=options.general_split,
        data_split=options.data_split,
        limit=options.limit,
    )
    tokenizer, model = load_tokenizer(options), load_tuned(options, options.adapter)
    update = Update(model)
    if importance is not None:
        check_fit(model, importance, [weight.name for weight in update.weights], "base")
    check_free_space(
        out,
        sum(p.numel() * p.element_size() for weight in update.weights for p in weight.parameters),
    )
    ways = ways_of(update, importance)
    logger.info(
        "%s %s (%d weights of %s)",
        options.method,
        options.adapter,
        len(update.weights),
        options.model,
    )
    with bare(model) as base:
        before = measure(base, tokenizer, held_out)
        learning = ledger = None
        if options.budget and held_out.domain is not None:
            learning = domain(base, encode_rows(held_out.domain, tokenizer), options.data or "")
        if options.budget and held_out.general:
            ledger = open_ledger(base, tokenizer, held_out.general, parse(options.budget))
    kept: dict[str, Any] = {}
    if ledger is not None:
        check_reach(
            ledger.spread(model, update, error=EACH)[0],
            len(ledger.check),
            ledger.budget,
            error=EACH,
        )
        report = keep_budget(ledger, model, ways, learning, among=(options.method,))
    elif calibration is not None and importance is not None:
        forecast = Forecast(
            parse(options.budget or ""), calibration, Penalty(model, importance, strength=0.0)
        )
        report = keep_predicted(forecast, model, {"scale": update.scale}, learning)
    if options.budget:
        kept = {"budget": report, "verdict": report["verdict"]}
    else:
        assert options.mu is not None
        ways[options.method](share_of(options.mu, options.method))
    save_whole(model, tokenizer, out / "final")
    after = measure(model, tokenizer, held_out)
    run = {
        "configuration": as_dict(options),
        "environment": environment(str(next(model.parameters()).device)),
        "importance": {"file": options.importance, "sha256": sha256_file(file)} if file else None,
        "before": before,
        "after": after,
        **changes(before, after),
        **kept,
        "seconds": time.perf_counter() - started,
    }
    write_card(out / "final", "shrink", as_record(run, Run))
    write_json(out / "run.json", run)
    if options.general or options.data:
        print(table(before, after))
    if kept:
        shown = as_record(report, BudgetReport)
        print("\n".join([curves(shown), *sentences(shown)]))
    logger.info("wrote %s in %.0f s", out / "final", run["seconds"])
    return run


def share_of(mu: float, method: str) -> float:
    """The share at which a method stands for mu: shrinking by 1 / (1 + mu Omega), scaling by 1 / (1
    + mu).
    """
    return 1 / (1 + math.sqrt(mu)) if method == "shrink" else 1 / (1 + mu)


def _check(options: ShrinkOptions) -> dict[str, Any]:
    """Everything that can be refused without loading a model; the adapter's configuration."""
    if options.method == "shrink" and not options.importance:
        raise OptionError(
            "--method shrink shrinks along importance: give --importance FILE of `forgetless "
            "record`, or --method scale"
        )
    if (options.budget is None) == (options.mu is None):
        raise OptionError("give --budget (1%, 0.01nats), which chooses mu, or --mu X; one of them")
    if options.budget:
        parse(options.budget)
        if options.general == "self":
            raise OptionError(
                "--budget is kept on held-out general text, found --general self; give --general "
                "TEXT"
            )
        if not options.general and options.method != "scale":
            raise OptionError(
                "without --general a budget is kept on a prediction, which holds for scaled "
                "updates alone: give --general TEXT, or --method "
                "scale with --importance FILE of forgetless record --calibrate"
            )
    config = adapter_config(options.adapter)
    adapter, out = Path(options.adapter).resolve(), Path(options.out).resolve()
    if out == adapter or out in adapter.parents or adapter in out.parents:
        raise OptionError(
            f"--out '{options.out}' would write where the adapter lies; the input is never "
            "changed: give another folder"
        )
    check_output_folder(options.out)
    if any(Path(options.out).iterdir()):
        raise ValueError(f"'{options.out}' is not empty; give a new folder")
    return config


def adapter_config(folder: str) -> dict[str, Any]:
    """The configuration of a PEFT adapter that shrink can work on.

    Raises ValueError with the reason otherwise.
    """
    config = checked(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"'{folder}' is a {kind} adapter; shrinking needs an update that is a product of two "
            "factors: LoRA or rsLoRA"
        )
    beyond = [what for key, what in BEYOND.items() if config.get(key)] + (
        ["trained biases"] if config.get("bias", "none") != "none" else []
    )
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(MOVES_THE_BASE):
        raise ValueError(
            f"'{folder}' starts away from the base model (init_lora_weights: {initial}), while "
            "importance belongs to the bare base; convert it to "
            "plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if beyond:
        raise ValueError(
            f"'{folder}' has {', '.join(beyond)}, which would stay as it is when scale * B @ A "
            "is shrunk; only plain LoRA and rsLoRA are taken"
        )
    return config
