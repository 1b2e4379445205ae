"""Tasks of lm-eval on the live model, from the Hub or from a local file.

    lm_eval_accuracy(model, tokenizer, "hellaswag", limit=200)
    lm_eval_accuracy(model, tokenizer, "ifeval", file="ifeval.jsonl")

A file has the fields of the task's dataset on the Hub and takes the place of the split that the
task is measured on; nothing is then read from the Hub. Examples before a question (`shots`) come
from the file too, never the question itself. Tasks whose answers are written (generate_until) are
put through the model's chat template where it has one; tasks that rank given answers are not, as
their published numbers are not.

lm-eval brings 40 packages with it, so it is an extra and is loaded only where a task needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.documents import load_rows
from forgetless.data.tasks import TASKS
from forgetless.errors import FileError, OptionError, nearest
from forgetless.evaluate.losses import evaluating
from forgetless.evaluate.paired_scores import error_name, standard_error_of_mean
from forgetless.files.measured_json import Scores
from forgetless.files.untrusted import JsonObject
from forgetless.model.loading import context_length

logger = logging.getLogger("forgetless")
# Packages that lm-eval does not bring along, and a task needs.
NEEDS = {"ifeval": ("langdetect", "immutabledict", "nltk")}
# Readers of the datasets library by a file's ending; json reads JSON lines too.
READERS = {".csv": "csv", ".parquet": "parquet"}
# Tokens that lm-eval lets a model write where the task does not say.
USUAL_LENGTH = 256


def lm_eval_accuracy(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    file: str | None = None,
    shots: int = 0,
    limit: int | None = None,
) -> Scores:
    """One lm-eval task on the live model, from the Hub or with its data replaced by a local file;
    `shots` examples stand before each question.

    Raises OptionError where lm-eval is not installed or does not know the task.
    """
    check_lm_eval(name)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    config = _config_of(name)
    writes = config.get("output_type") == "generate_until"
    templated = writes and bool(getattr(tokenizer, "chat_template", None))
    if templated:
        logger.info("%s: asked through the model's chat template, since answers are written", name)
    with evaluating(model):
        result = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[_local_task(name, file) if file else name],
            num_fewshot=shots,
            limit=limit,
            task_manager=_task_manager(),
            bootstrap_iters=0,
            apply_chat_template=templated,
            fewshot_as_multiturn=templated,
            gen_kwargs=_shortened(name, config, model) if writes else None,
        )
    results = result["results"]
    numbers = results[name] if name in results else next(iter(results.values()))
    samples = result["samples"].get(name, [])
    return _task_scores(numbers, samples, templated if writes else None)


def _task_scores(
    numbers: Mapping[str, Any], samples: list[JsonObject], templated: bool | None
) -> Scores:
    """The numbers of a task, and the score of each question where their mean is the number."""
    accuracies: dict[str, float | None] = {}
    items: dict[str, list[float | None]] = {}
    for key, value in numbers.items():
        if not isinstance(value, (int, float)):
            continue
        metric = key.replace(",none", "")
        accuracies[metric] = value
        scored = _by_question(key, samples)
        if scored and np.isclose(np.mean(scored), value, rtol=0, atol=1e-9):
            items[metric] = list(scored)
            accuracies.setdefault(error_name(metric), standard_error_of_mean(scored))
    return Scores(accuracies, items=items or None, chat_template=templated)


def _by_question(key: str, samples: list[JsonObject]) -> list[float]:
    """The scores of one metric in the order of the questions; none where they aren't numbers."""
    metric, _, answer_filter = key.partition(",")
    rows = [row for row in samples if row.get("filter") == answer_filter and metric in row]
    scores = [row[metric] for row in sorted(rows, key=lambda row: row["doc_id"])]
    numeric = all(isinstance(score, (bool, int, float, np.number)) for score in scores)
    return [float(score) for score in scores] if numeric else []


def _shortened(name: str, config: JsonObject, model: nn.Module) -> JsonObject | None:
    """lm-eval's setting for a model whose context cannot hold the answer that a task allows."""
    wanted = (config.get("generation_kwargs") or {}).get("max_gen_toks", USUAL_LENGTH)
    room = context_length(model) // 2
    if wanted <= room:
        return None
    logger.warning(
        "%s allows answers of %d tokens, and half of the model's context is %d: they are cut there",
        name,
        wanted,
        room,
    )
    return {"max_gen_toks": room}


def _config_of(name: str) -> JsonObject:
    """What lm-eval's index says of a task; nothing of a group of tasks."""
    config = getattr(_task_manager().task_index[name], "cfg", None)
    return config if isinstance(config, dict) else {}


def ranks_answers(name: str) -> bool:
    """Whether a task of lm-eval ranks given answers, and lets the model write none."""
    return _config_of(name).get("output_type") in ("multiple_choice", "loglikelihood")


def task_metrics(name: str) -> list[str]:
    """The names of a task's accuracies and of the filters before them; none where lm-eval's index
    does not say.
    """
    config = _config_of(name)
    metrics = [str(each.get("metric")) for each in config.get("metric_list") or ()]
    filters = [str(each.get("name")) for each in config.get("filter_list") or ()]
    return [*metrics, *filters]


def _local_task(name: str, file: str) -> JsonObject:
    """lm-eval's settings of a task, with its data replaced by a local file.

    It is written as a group of one, which is how lm-eval changes settings of a task that it knows.
    Raises OptionError for what reads its data in a way of its own.
    """
    config = _config_of(name)
    split = config.get("test_split") or config.get("validation_split")
    if split is None or "class" in config or "custom_dataset" in config:
        raise OptionError(
            f"task '{name}' cannot be read from a file: expected one task of lm-eval with a split "
            "to measure on, found a group of tasks or one that reads its data itself; name the "
            "single tasks, or leave the file out"
        )
    measured = "test_split" if config.get("test_split") else "validation_split"
    others = {key: None for key in ("training_split", "validation_split") if key != measured}
    changed = {
        "task": name,
        "dataset_path": READERS.get(Path(file).suffix, "json"),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(Path(file).resolve())}},
        "fewshot_split": split,
        **others,
    }
    return {"group": f"{name} from a file", "task": [changed]}


def check_lm_eval(name: str, file: str | None = None) -> None:
    """Raise OptionError where lm-eval is not installed, knows no task of this name, or lacks what
    the task needs; FileError for a file that the task cannot be asked from.
    """
    if importlib.util.find_spec("lm_eval") is None:
        known = ", ".join(TASKS)
        raise OptionError(
            f"task '{name}' is measured by lm-eval, which is not installed; expected {known} "
            "without --shots, or lm-eval: pip install 'forgetless[tasks]'"
        )
    known_there = _task_manager().all_tasks
    if name not in known_there:
        raise OptionError(f"unknown task '{name}'; {nearest(name, [*TASKS, *known_there])}")
    _check_packages(name)
    if file is not None:
        _check_file(name, file)


def _check_packages(name: str) -> None:
    """Raise OptionError for packages and data that a task needs beside lm-eval."""
    needed = NEEDS.get(name, ())
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise OptionError(
            f"task '{name}' needs {', '.join(missing)} beside lm-eval; expected them to be "
            f"installed: pip install {' '.join(missing)}, or leave the task out"
        )
    if "nltk" in needed and os.environ.get("HF_HUB_OFFLINE") == "1" and not _has_punkt():
        raise OptionError(
            f"task '{name}' needs nltk's data punkt_tab, which is not here and is not fetched in "
            "offline mode: python -m nltk.downloader punkt_tab, or leave the task out"
        )


def _has_punkt() -> bool:
    """Whether nltk finds the data by which it splits words."""
    data = importlib.import_module("nltk.data")
    try:
        data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _check_file(name: str, file: str) -> None:
    """Raise FileError for the first row of a file that a task cannot be asked from."""
    if not Path(file).is_file():
        raise FileError(
            f"task {name}: '{file}' does not exist; expected a file with the fields of "
            f"{_config_of(name).get('dataset_path')} on the Hub"
        )
    settings = _local_task(name, file)
    found = ", ".join(map(str, load_rows(file)[0]))
    expected = f"{file}: task {name} expects the fields of {_config_of(name).get('dataset_path')}"
    row = 1
    try:
        task = _task_manager().load([settings])["tasks"][name]
        for row, question in enumerate(task.eval_docs, 1):  # noqa: B007 (the error names it)
            task.doc_to_text(question)
            task.doc_to_target(question)
            if task.OUTPUT_TYPE == "multiple_choice":
                task.doc_to_choice(question)
    except Exception as error:  # the reader's, the template's and the task's own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileError(
            f"{expected} on the Hub, found {found}; row {row} cannot be asked: {reason[-1]}"
        ) from None


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of tasks, which takes seconds to make, hence once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
