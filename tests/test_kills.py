"""A short campaign of fuzz/kill.py: what is killed and gone on with ends as what nobody killed.

The long one's counts are in fuzz/kills.csv.
"""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from conftest import run_forked

SCRIPT = Path(__file__).parents[1] / "fuzz" / "kill.py"


@pytest.mark.parametrize(
    "scenarios",
    [
        "record-path,tune",
        pytest.param("record-kronecker,tune-full,compare,sequence", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, scenarios):
    words = ["--seed", 7, "--kills", 2, "--scenarios", scenarios, "--folder", tmp_path, "--csv", ""]
    code, printed = run_forked(SCRIPT, *words, out=tmp_path / "printed.txt")
    assert code == 0 and "no findings" in printed, printed


def test_the_script_sees_what_is_not_whole_and_what_differs(tmp_path, monkeypatch):
    """A harness that finds nothing has to be able to find something."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with mock.patch.dict(os.environ):  # the script sets variables for the processes that it starts
        import kill
    for name, value in (("killed", 1.0), ("whole", 1.0 + 2**-23)):
        (tmp_path / name / "final").mkdir(parents=True)
        adapter = tmp_path / name / "final" / "adapter_model.safetensors"
        save_file({"a": torch.full((3,), value)}, adapter)
        run = {"seconds": value, "energy": value, "log": [{"loss": 1.0}]}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    (tmp_path / "killed" / "part.json").write_text('{"a": ')
    dump = ".forgetless-new-00000000-00000000-12.tmp"
    (tmp_path / "killed" / dump).write_text('{"a": ')
    wrong = list(kill.wrong_after_a_kill(tmp_path / "killed", tmp_path / "whole"))
    different = list(kill.differences(tmp_path / "killed", tmp_path / "whole"))
    assert [line.split(" is not ")[0] for line in wrong] == [
        "final/adapter_model.safetensors",
        "part.json",
        "final",
    ]
    assert [line.split()[0] for line in different] == [
        dump,
        "part.json",
        "final/adapter_model.safetensors",
        "run.json",
    ]
    assert ".energy is 1.0 after kills" in different[-1]
