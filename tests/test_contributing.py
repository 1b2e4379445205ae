"""The examples of CONTRIBUTING.md are what the program takes: rows, functions and options."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from torch import nn

from forgetless.methods.method import Setup

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Where the block goes ("options/verbs.py, in VERBS") -> the block.
EXAMPLES = {
    block.splitlines()[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
}


def names_of(file: str) -> dict[str, object]:
    """What a module of the package has at its top level."""
    module = file.removesuffix(".py").replace("/", ".")
    return dict(vars(importlib.import_module(f"forgetless.{module}")))


@pytest.mark.parametrize("place", [place for place in EXAMPLES if re.search("in [A-Z]+$", place)])
def test_a_row_fits_its_table(place):
    file, table = place.split(", in ")
    known = names_of(file)
    if table == "VERBS":
        exec(EXAMPLES["options/files.py"], names := names_of("options/files.py"))
        known["DiffOptions"] = names["DiffOptions"]
    rows = eval("{" + EXAMPLES[place] + "}", known)
    [(name, row)] = rows.items()
    assert type(row) is type(next(iter(known[table].values()))) and name not in known[table]
    if table == "VERBS":
        assert row.resolve({"file": "a", "other": "b"}).other == "b"


def test_a_method_is_a_function():
    known = names_of("methods/scaling.py")
    scaled = []
    known["Update"] = lambda model: type("Update", (), {"scale": lambda _, s: scaled.append(s)})()
    exec(EXAMPLES["methods/halved.py"], known)
    setup = Setup(options=None, tokenizer=None, text=(), tokens_per_step=1.0)
    assert known["halved"](setup, nn.Linear(1, 1)) == {"scale": 0.5} and scaled == [0.5]


def test_an_option_is_a_line():
    body = "".join(
        f"    {line}\n" for line in EXAMPLES["options/tune.py, in TuneOptions"].split("\n")
    )
    known = names_of("options/tune.py")
    exec(f"@dataclass(frozen=True)\nclass Options:\n{body}", known)
    [option] = dataclasses.fields(known["Options"])
    assert option.name == "warmup" and option.metadata["group"] == "training"


def test_every_kind_of_thing_is_shown():
    assert len(EXAMPLES) == 6
