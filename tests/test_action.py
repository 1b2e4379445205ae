"""The GitHub action of integrations/github: its steps, run with a stub for forgetless."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ACTION = Path(__file__).parents[1] / "integrations" / "github" / "action.yml"
# It writes what it was given, what the check would write, and ends as $CODE says.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SEEN"
[ "$CODE" = 2 ] && { echo "forgetless check: wrong" >&2; exit 2; }
mkdir -p "$OUT" && echo "### forgetless check: $VERDICT" > "$OUT/summary.md"
echo "{\\"verdict\\": \\"$VERDICT\\"}"
exit "$CODE"
"""


@pytest.fixture
def step(tmp_path):
    """A function: inputs, exit code, verdict -> (exit code, arguments, outputs, summary)."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    stub = tmp_path / "bin" / "forgetless"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    (stub.parent / "python").symlink_to(sys.executable)
    content = yaml.safe_load(ACTION.read_text("utf-8"))

    def run(inputs, code, verdict):
        [only] = content["runs"]["steps"]
        given = {name: spec.get("default", "") for name, spec in content["inputs"].items()}
        given |= inputs
        told = {
            key: given[value.removeprefix("${{ inputs.").removesuffix(" }}")]
            for key, value in only["env"].items()
        }
        files = {name: tmp_path / name for name in ("SEEN", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        told |= {name: str(file) for name, file in files.items()}
        told |= {"CODE": str(code), "VERDICT": verdict}
        path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-e", "-c", only["run"]], cwd=tmp_path, env={**told, "PATH": path}, timeout=60
        )
        outputs = dict(
            line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().split("\n") if line
        )
        words = files["SEEN"].read_text().splitlines()
        return done.returncode, words, outputs, files["GITHUB_STEP_SUMMARY"].read_text()

    return run


def test_a_check_that_passes(step):
    inputs = {"base": "my model", "tuned": "run", "budget": "5%", "strict": "true"}
    inputs |= {"arguments": "--fast\n--task sciq=-1%\n", "bounds": "b.yaml"}
    code, words, outputs, summary = step(inputs, 0, "met")
    asked = ["check", "my model", "run", "--out", "forgetless-check", "--budget", "5%"]
    asked += ["--bounds", "b.yaml", "--strict", "--fast", "--task", "sciq=-1%", "--json"]
    assert (code, words) == (0, asked)
    assert outputs == {"verdict": "met", "passed": "true", "folder": "forgetless-check"}
    assert summary == "### forgetless check: met\n"


def test_a_check_that_does_not_pass_still_has_its_summary(step):
    code, words, outputs, summary = step({"base": "b", "tuned": "t"}, 3, "exceeded")
    assert (code, words) == (3, ["check", "b", "t", "--out", "forgetless-check", "--json"])
    assert outputs["verdict"] == "exceeded" and outputs["passed"] == "false" and summary


def test_wrong_options_end_the_step_and_no_input_is_run_as_shell(step, tmp_path):
    code, words, outputs, summary = step({"base": "$(touch hit)", "tuned": "`touch hit`"}, 2, "")
    assert code == 2 and words[1:3] == ["$(touch hit)", "`touch hit`"] and summary == ""
    assert outputs == {"passed": "false", "folder": "forgetless-check"}
    assert not (tmp_path / "hit").exists()
