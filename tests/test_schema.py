"""JSON files as dataclasses: what is read is checked by the annotations, what is written keeps its
keys in order.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comparisons import RUN, comparison, kept_budget
from forgetless.errors import FileError
from forgetless.evaluate.losses import TextLoss
from forgetless.evaluate.rise import paired_rise
from forgetless.files.budget_json import BudgetReport, ControllerLook, PredictedRise, ProbeCosts
from forgetless.files.compare_json import Comparison, TrialRun
from forgetless.files.measured_json import Interval, Loss
from forgetless.files.run_json import EvaluatedRun, Run, SequenceRun, ShrunkRun, TunedRun
from forgetless.files.schema import (
    LEFT_OUT,
    REST,
    Level,
    Text,
    as_record,
    from_json,
    key,
    read_record,
    to_json,
    write_record,
)


@dataclass(frozen=True)
class Leaf:
    number: float | None = None
    level: Level | None = field(default=None, metadata=key("share"))


@dataclass(frozen=True)
class Tree:
    name: str
    text: Text | None = None
    truth: bool | None = None
    leaves: list[Leaf] = field(default_factory=list)
    rows: list[list[float | None]] = field(default_factory=list)
    by_name: dict[str, Leaf | None] = field(default_factory=dict)
    anything: Any = None
    note: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Open:
    about: str | None = None
    numbers: dict[str, float | None] = field(default_factory=dict, metadata=REST)


WHOLE = {
    "name": "n",
    "text": 3,
    "truth": True,
    "leaves": [{"number": 1, "share": 0.5}],
    "rows": [[1.5, None], []],
    "by_name": {"a": {"number": None, "share": None}, "b": None},
    "anything": [{"x": []}],
}


def test_what_is_read_is_written_again_with_its_keys_in_order(tmp_path):
    tree = from_json(WHOLE, Tree, "tree")
    assert tree.leaves[0].level == 0.5 and tree.by_name["b"] is None and tree.rows[0][1] is None
    assert json.dumps(to_json(tree)) == json.dumps(WHOLE)
    write_record(tmp_path / "tree.json", tree)
    assert read_record(tmp_path / "tree.json", Tree) == tree


def test_missing_keys_and_null_are_the_default_and_unknown_keys_are_let_through():
    assert from_json({"name": "n", "leaves": None, "new": 3}, Tree, "tree") == Tree("n")
    assert to_json(Tree("n", note="said"))["note"] == "said" and "note" not in to_json(Tree("n"))


def test_keys_that_no_field_has_can_be_gathered():
    numbers = from_json({"acc": 0.5, "about": "x", "acc_stderr": None}, Open, "scores")
    assert numbers == Open("x", {"acc": 0.5, "acc_stderr": None})
    assert list(to_json(numbers)) == ["about", "acc", "acc_stderr"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "tree: 'name' is missing"),
        ({"name": 3}, "tree.name: expected a name, found 3"),
        ({"text": []}, "tree.text: expected text, found list"),
        ({"truth": 1}, "tree.truth: expected true or false, found 1"),
        ({"leaves": {}}, "tree.leaves: expected a list, found dict"),
        ({"leaves": [None]}, "tree.leaves[0]: expected a mapping, found None"),
        ({"leaves": [{}, {"number": "x"}]}, "tree.leaves[1].number: expected a number, found 'x'"),
        ({"leaves": [{"number": True}]}, "tree.leaves[0].number: expected a number, found True"),
        ({"leaves": [{"number": float("nan")}]}, "tree.leaves[0].number: expected a number"),
        ({"leaves": [{"number": 1e200}]}, "tree.leaves[0].number: expected a number"),
        ({"leaves": [{"share": 1.5}]}, "tree.leaves[0].share: expected a number from 0 to 1"),
        ({"rows": [[1.0], 3]}, "tree.rows[1]: expected a list, found 3"),
        ({"by_name": {"b": 3}}, "tree.by_name.b: expected a mapping, found 3"),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(change, said):
    with pytest.raises(FileError) as caught:
        from_json({**WHOLE, **change}, Tree, "tree")
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("the file is damaged, or of another version of forgetless")


def holds(written, given):
    """Whether everything given is written; what was not given is null, empty or left out."""
    if isinstance(given, dict):
        return all(holds(written.get(name), value) for name, value in given.items())
    if isinstance(given, list):
        return len(written) == len(given) and all(map(holds, written, given))
    return written == given


def test_a_comparison_is_written_as_it_was_read():
    given = comparison()
    given["runs"] = [run for run in given["runs"] if run["status"] == "done"]
    read = from_json(given, Comparison, "compare.json")
    assert holds(to_json(read), given)
    assert from_json(to_json(read), Comparison, "compare.json") == read
    assert list(to_json(Comparison()))[-2:] == ["sequences", "verdict"]


def test_a_run_with_a_result_and_one_without_hold_different_keys():
    about = ["id", "method", "domain", "settings", "part", "seed", "status", "error", "points"]
    done = list(to_json(TrialRun(method="plain", status="done")))
    failed = list(to_json(TrialRun(method="plain", status="failed", chosen=False)))
    assert done[: len(about)] == failed[: len(about)] == about
    assert done[len(about) :] == [
        "energy",
        "seconds",
        "peak_memory_bytes",
        "extra_data",
        "file_bytes",
        "trainable_parameters",
        "moved",
        "log",
        "environment",
        "wall_seconds",
    ]
    assert failed[len(about) :] == ["log", "moved", "wall_seconds", "chosen"]


def test_each_verb_writes_its_own_keys():
    run = from_json(RUN, Run, "run.json")
    assert run.before.tasks["sciq"].numbers == {"acc": 0.25, "acc_stderr": 0.01}
    assert list(to_json(EvaluatedRun())) == [
        "configuration",
        "environment",
        "before",
        "after",
        "forgetting",
        "learning",
    ]
    assert list(to_json(ShrunkRun()))[2:] == [
        "importance",
        "before",
        "after",
        "forgetting",
        "learning",
        "seconds",
    ]
    assert list(to_json(ShrunkRun(budget=BudgetReport())))[-3:] == ["budget", "verdict", "seconds"]
    assert list(to_json(TunedRun()))[4:10] == [
        "method",
        "finished",
        "budget",
        "verdict",
        "replay",
        "importance",
    ]
    assert list(to_json(SequenceRun()))[2:7] == [
        "method",
        "sequence",
        "importance",
        "budget",
        "verdict",
    ]


def test_what_was_forgotten_and_learned_is_written_with_its_interval():
    rise = paired_rise(np.zeros(4), np.arange(4.0), np.ones(4), list("aabb"))
    for numbers in (rise.numbers(), (-rise).numbers(percent=False)):
        read = from_json(numbers, Interval, "forgetting")
        assert json.dumps(to_json(read)) == json.dumps(numbers)
    losses = TextLoss(np.ones(4), np.ones(4), sources=list("aabb")).numbers()
    assert json.dumps(to_json(from_json(losses, Loss, "general"))) == json.dumps(losses)


def test_a_budget_holds_what_was_checked_or_what_was_predicted():
    report = from_json(kept_budget(), BudgetReport, "budget")
    assert report.fraction == 0.7 and report.curve[0].rise.nats == 0.012 * 0.8
    assert list(to_json(BudgetReport()))[:4] == ["verdict", "control", "check", "checks"]
    predicted = BudgetReport(
        predicted=PredictedRise(0.1), trajectory=[ControllerLook(1)], probe=ProbeCosts()
    )
    assert list(to_json(predicted))[:3] == ["verdict", "predicted", "calibration"]
    assert list(to_json(predicted))[-2:] == ["trajectory", "probe"]
    assert list(to_json(report))[-3:] == ["trajectory", "probe", "overlap"]


def test_data_of_a_training_that_diverged_is_read_with_its_numbers_missing():
    loss = {"nats": 300.0, "perplexity": 1e130, "standard_error": float("nan")}
    run = as_record({"before": {"general": loss}, "configuration": {"out": Path("x")}}, Run)
    assert (run.before.general.nats, run.before.general.perplexity) == (300.0, None)
    assert run.configuration == {"out": "x"} and run.before.general.standard_error is None
