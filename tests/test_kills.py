"""A short campaign of fuzz/kill.py: what is killed and gone on with ends as what nobody killed.

The long one's counts are in fuzz/kills.csv.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fuzz" / "kill.py"


@pytest.mark.parametrize(
    "scenarios",
    [
        "record-path,tune",
        pytest.param("record-kronecker,tune-full,compare,sequence", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, scenarios):
    words = [
        sys.executable,
        str(SCRIPT),
        "--seed",
        "7",
        "--kills",
        "2",
        "--scenarios",
        scenarios,
        "--folder",
        str(tmp_path),
        "--csv",
        "",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "no findings" in done.stdout, done.stdout + done.stderr


def test_the_script_sees_what_is_not_whole_and_what_differs(tmp_path, monkeypatch):
    """A harness that finds nothing has to be able to find something."""
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
from safetensors.torch import save_file
import kill
root = Path({str(tmp_path)!r})
for name, value in (("killed", 1.0), ("whole", 1.0 + 2**-23)):
    (root / name / "final").mkdir(parents=True)
    save_file({{"a": torch.full((3,), value)}}, root / name / "final" / "adapter_model.safetensors")
    run = {{"seconds": value, "energy": value, "log": [{{"loss": 1.0}}]}}
    (root / name / "run.json").write_text(json.dumps(run))
(root / "killed" / "part.json").write_text('{{"a": ')
(root / "killed" / ".forgetless-new-00000000-00000000-12.tmp").write_text('{{"a": ')
wrong = list(kill.wrong_after_a_kill(root / "killed", root / "whole"))
print(json.dumps([wrong, list(kill.differences(root / "killed", root / "whole"))]))
"""
    wrong, different = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )
    assert [line.split(" is not ")[0] for line in wrong] == [
        "final/adapter_model.safetensors",
        "part.json",
        "final",
    ]
    assert [line.split()[0] for line in different] == [
        ".forgetless-new-00000000-00000000-12.tmp",
        "part.json",
        "final/adapter_model.safetensors",
        "run.json",
    ]
    assert ".energy is 1.0 after kills" in different[-1]
