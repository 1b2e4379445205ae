"""The demo as an experiment that `compare` runs: its texts, its questions and its methods.

    OUT/general.jsonl, domain.jsonl              what is recorded, and what is trained on
    OUT/general-test.jsonl, domain-test.jsonl    the same facts as no training text says them
    OUT/answers.jsonl                            the world's questions with their answers, as text
    OUT/general-questions.jsonl, domain-questions.jsonl    four choices each

Every setting is run with every seed, and the texts in other phrasings are both what settings are
chosen by and what is shown, so that the whole demo is five trainings a seed. A comparison that is
to be believed keeps a test part apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from forgetless.compare.experiment import Experiment
from forgetless.compare.experiment_file import experiment_of
from forgetless.data.documents import Row
from forgetless.demo.world import MODEL_FOLDER, build, documents, multiple_choice
from forgetless.files.atomic import write_text

# The names of the domain and of the general text, as the report shows them.
DOMAIN, TEXT = "herbal", "world"
# The learning rates that plain fine-tuning tries. The two larger ones learn the herbal nearly
# equally well: which of them is better differs between processors.
RATES = (2e-3, 4e-3, 8e-3)
# Plain fine-tuning at a smaller rate than the best, which is tried already.
SMALLER = 2e-3
# The rates at which the model is held: those that plain fine-tuning learns well with.
HELD_RATES = (4e-3, 8e-3)
# What every method trains with.
TRAINING = {
    "max_steps": 150,
    "batch_size": 16,
    "accumulation": 1,
    "length": 128,
    "log_steps": 10,
}


# The names of the demo's files of texts and questions.
TEXTS = (
    "general",
    "general-test",
    "general-questions",
    "answers",
    "domain",
    "domain-test",
    "domain-questions",
)


def write_texts(out: Path) -> dict[str, str]:
    """The demo's texts and questions as JSON lines, so that every step can be repeated with the
    other verbs: name -> file.
    """
    world = build()
    questions = multiple_choice(world.general)
    contents: dict[str, list[Row]] = {
        "general": _text_rows(documents(world.general, 101, 600)),
        "general-test": _text_rows(documents(world.general, 102, 150, held_out=True)),
        "general-questions": questions,
        "answers": _text_rows([_with_answer(row) for row in questions]),
        "domain": _text_rows(documents(world.domain, 201, 600)),
        "domain-test": _text_rows(documents(world.domain, 202, 100, held_out=True)),
        "domain-questions": multiple_choice(world.domain),
    }
    paths = {}
    for name, rows in contents.items():
        path = out / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(path)
    return paths


def _text_rows(texts: list[str]) -> list[Row]:
    return [{"text": text} for text in texts]


def _with_answer(question: Row) -> str:
    """A question with its right answer, as text."""
    return f"{question['prompt']} {question['choices'][question['gold']]}."


def experiment(paths: Mapping[str, str], seeds: int) -> Experiment:
    """The experiment on what `write_texts` wrote, with so many seeds."""
    held = {"validation": paths["general-test"], "test": paths["general-test"]}
    answers = {"validation": paths["answers"], "test": paths["answers"]}
    taught = {"validation": paths["domain-test"], "test": paths["domain-test"]}
    given = {
        "title": "What the demo found",
        "model": str(MODEL_FOLDER),
        "dtype": "float32",
        "device": "cpu",
        "general": {
            TEXT: {"text": paths["general"], **held},
            "answers": {"text": paths["answers"], **answers},
        },
        "domains": {
            DOMAIN: {
                "data": paths["domain"],
                **taught,
                "task": f"choices={paths['domain-questions']}",
            }
        },
        "tasks": {TEXT: f"choices={paths['general-questions']}"},
        "training": dict(TRAINING),
        "importance": {"default": {"length": 128}},
        "methods": {
            "plain": {"grid": {"learning_rate": list(RATES)}},
            "smaller": {"learning_rate": SMALLER},
            "hold": {"importance": "default", "grid": {"learning_rate": list(HELD_RATES)}},
        },
        "trials": "free",
        "seeds": {"validation": list(range(seeds)), "test": []},
        "limit": {"validation": 1000, "test": 1000},
    }
    return experiment_of(given, "the demo")
