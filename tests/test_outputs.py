"""Nothing is lost: no output is an input or another program's file, nothing is removed that we did
not write, and nothing before everything was read.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from forgetless.cli import main
from forgetless.compare import compare as comparing
from forgetless.compare.experiment_file import as_given, experiment_of, read
from forgetless.errors import FileError
from forgetless.files.atomic import atomic_path, machine, temporary_beside
from forgetless.files.lock import only_writer
from forgetless.files.outputs import MARK, RESOLVED, claim, ours_in


@pytest.fixture
def project(tmp_path, monkeypatch, model_folder, text_file):
    """A folder of somebody's with files of names that we use too, in which the tests stand."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "final").mkdir()
    for name in ("one", "two"):
        shutil.copy(text_file, folder / "data" / f"{name}.jsonl")
    (folder / "final" / "thesis.txt").write_text("years of work")
    (folder / "config.yaml").write_text("title: mine\n")
    shutil.copytree(model_folder, folder / "model")
    monkeypatch.chdir(folder)
    return folder


def contents(folder):
    """Every file in a folder that is not one of ours that say what is ours."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARK
    }


def refused(capsys, code, part, *words):
    assert main([*map(str, words), "--quiet"]) == code
    error = capsys.readouterr().err
    assert part in error, error


TUNE = ("tune", "model", "--method", "plain", "--max-steps", "1", "--device", "cpu")


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize("domains", [1, 2])
def test_a_folder_of_somebody_else_is_not_taken_for_a_run(project, capsys, more, domains):
    """`tune --overwrite` took any folder with a config.yaml for a run and deleted its data/, and
    without --overwrite the final/ of a stranger was replaced.
    """
    before = contents(project)
    data = [word for name in ("one", "two")[:domains] for word in ("--data", f"data/{name}.jsonl")]
    code, part = (1, "not forgetless wrote it") if domains == 1 else (2, "lies where this run")
    refused(capsys, code, part, *TUNE, *data, "--out", ".", *more)
    assert contents(project) == before


def test_what_is_overwritten_goes_when_everything_was_read_and_what_is_not_ours_stays(
    project, capsys
):
    data = ("--data", "data/one.jsonl", "--data", "data/two.jsonl")
    assert main([*TUNE, *data, "--out", "run", "--quiet"]) == 0
    (project / "run" / "data" / "notes.jsonl").write_text("mine")
    before = contents(project / "run")
    Path("broken.jsonl").write_text("{")
    broken = ("--data", "data/one.jsonl", "--data", "broken.jsonl")
    refused(capsys, 1, "broken.jsonl", *TUNE, *broken, "--out", "run", "--overwrite")
    assert contents(project / "run") == before
    shutil.copy("data/one.jsonl", "three.jsonl")
    again = ("--data", "three.jsonl", "--data", "data/two.jsonl")
    assert main([*TUNE, *again, "--out", "run", "--overwrite", "--quiet"]) == 0
    assert sorted(path.name for path in (project / "run" / "data").iterdir()) == [
        "1-three.held.jsonl",
        "1-three.train.jsonl",
        "2-two.held.jsonl",
        "2-two.train.jsonl",
        "notes.jsonl",
    ]


def test_a_run_that_cannot_be_started_keeps_the_checkpoints_that_it_would_overwrite(
    project, capsys, monkeypatch
):
    from conftest import interrupt_after

    run = (*TUNE, "--data", "data/one.jsonl", "--out", "run")
    interrupt_after(monkeypatch, 1)
    assert main([*run, "--max-steps", "2", "--save-steps", "1", "--quiet"]) == 130
    assert (project / "run" / "checkpoints" / "checkpoint-1").is_dir()
    Path("broken.jsonl").write_text("{")
    refused(capsys, 1, "broken", *run[:-4], "--data", "broken.jsonl", "--out", "run", "--overwrite")
    assert (project / "run" / "checkpoints" / "checkpoint-1").is_dir()


def test_the_resolved_options_have_a_name_of_their_own_and_are_valid_input(project):
    """The dump was called as hand-written files are, and replaced them."""
    Path("run").mkdir()
    given = {"model": "model", "data": "data/one.jsonl", "method": "plain", "max_steps": 1}
    (project / "run" / "config.yaml").write_text(yaml.safe_dump(given))
    assert main(["tune", "--config", "run/config.yaml", "--out", "run", "--quiet"]) == 0
    assert yaml.safe_load((project / "run" / "config.yaml").read_text()) == given
    assert main(["tune", "--config", f"run/{RESOLVED}", "--out", "again", "--quiet"]) == 0
    one, two = (yaml.safe_load(Path(name, RESOLVED).read_text()) for name in ("run", "again"))
    assert {**one, "out": ""} == {**two, "out": ""}


EXPERIMENT = {
    "title": "Two texts",
    "model": "model",
    "dtype": "float32",
    "general": {"wiki": "general.jsonl", "code": {"text": "general.jsonl", "test": "t.jsonl"}},
    "domains": {"medicine": {"data": "d.jsonl", "test": "t.jsonl"}},
    "training": {"max_steps": 3, "batch_size": 4},
    "importance": {"default": {"documents": 20}},
    "methods": {
        "plain": {"grid": {"learning_rate": [1e-3, 1e-2]}},
        "held": {"importance": "default", "grid": {"strength": [1, 10]}},
    },
    "seeds": {"validation": [0], "test": [1, 2]},
    "scales": [0.5],
    "sequences": {"both": {"domains": ["medicine", "medicine"], "methods": ["plain"]}},
}


def test_the_resolved_experiment_is_a_valid_experiment(tmp_path):
    given = {**EXPERIMENT, "sequences": {}}
    experiment = experiment_of(given, "experiment.yaml")
    path = tmp_path / RESOLVED
    path.write_text(yaml.safe_dump(as_given(experiment), sort_keys=False))
    assert read(path) == experiment


def test_compare_leaves_the_hand_written_file_alone(tmp_path, monkeypatch):
    """It stood in the output folder under the name of the dump, and was replaced by a dump that
    compare itself could not read.
    """
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x" / "experiment.yaml"
    path.parent.mkdir()
    path.write_text(json.dumps({**EXPERIMENT, "sequences": {}}))
    before = path.read_text()
    monkeypatch.setattr(comparing, "check_questions", lambda experiment: None)

    def stop(*given):
        raise ValueError("far enough")

    monkeypatch.setattr(comparing, "prepare", stop)
    assert main(["compare", "x/experiment.yaml", "--out", "x", "--quiet"]) == 1
    assert path.read_text() == before
    assert read(tmp_path / "x" / RESOLVED) == read(path)
    assert main(["compare", f"x/{RESOLVED}", "--out", "x", "--quiet"]) == 1
    assert read(tmp_path / "x" / RESOLVED) == read(path)


def test_an_input_or_a_foreign_file_is_not_written_over(project, capsys):
    record = ("record", "model", "--estimator", "uniform", "--general", "data/one.jsonl")
    before = contents(project)
    refused(capsys, 2, "lies where this run writes", *record, "--out", "data/one.jsonl")
    weights = "model/model.safetensors"
    refused(capsys, 1, "did not write", *record, "--out", weights)
    (project / "link.safetensors").symlink_to(project / "data" / "one.jsonl")
    refused(capsys, 2, "lies where this run writes", *record, "--out", "link.safetensors")
    (project / "link.safetensors").unlink()
    (project / "i.safetensors.state").write_text("mine")
    refused(capsys, 1, "i.safetensors.state", *record, "--out", "i.safetensors")
    (project / "i.safetensors.state").unlink()
    refused(capsys, 1, "no regular file", *record, "--out", "/dev/null")
    refused(
        capsys,
        2,
        "an input is never written to",
        *TUNE,
        "--data",
        "data/one.jsonl",
        "--out",
        "model",
    )
    assert contents(project) == before
    Path("i.safetensors").touch()  # as mktemp makes it
    for more in ([], ["--overwrite"]):  # our own may be written over
        assert main([*record, "--out", "i.safetensors", "--quiet", *more]) == 0
    convert = ("convert", "i.safetensors", "--tier", "bf16", "--out")
    refused(capsys, 2, "lies where this run writes", *convert, "i.safetensors")
    refused(capsys, 1, "did not write", *convert, "data/two.jsonl")
    assert main([*convert, "j.safetensors", "--quiet"]) == 0
    from forgetless import Importance

    with pytest.raises(ValueError, match="did not write"):
        Importance.load("i.safetensors").save("data/one.jsonl")
    assert {**contents(project), **before} == contents(project)


def test_measurements_and_reports_write_over_their_own_alone(project, capsys):
    assert main([*TUNE, "--data", "data/one.jsonl", "--out", "run", "--quiet"]) == 0
    before = contents(project)
    refused(capsys, 1, "did not write", "report", "run", "--out", "run/run.json")
    evaluate = ("eval", "model", "--adapter", "run/final", "--data", "data/two.jsonl", "--out")
    refused(capsys, 1, "forgetless tune wrote it", *evaluate, "run")
    assert contents(project) == before
    for form in ("html", "markdown"):
        for _ in range(2):
            words = ("report", "run", "--format", form, "--out", f"page.{form}")
            assert main([*words, "--quiet"]) == 0
    for _ in range(2):
        assert main([*evaluate, "measured", "--quiet"]) == 0
    assert {**contents(project), **before} == contents(project)


def test_shrink_and_merge_can_be_run_again(project, capsys, monkeypatch):
    """After a kill or a full disk what an unfinished run had written was 'not empty'."""
    from forgetless.budget import shrink
    from forgetless.tune import merge

    assert main([*TUNE, "--data", "data/one.jsonl", "--out", "run", "--quiet"]) == 0

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    words = ("shrink", "run/final", "--method", "scale", "--budget", "50%", "--general")
    words = (*words, "data/two.jsonl", "--out", "small", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "write_card", full)
        assert main([*words, "--quiet"]) == 1
        assert (project / "small" / "final").is_dir()
        patch.setattr(merge, "write_merged_card", full)
        assert main(["merge", "run/final", "--out", "merged", "--quiet"]) == 1
    assert main([*words, "--quiet"]) in (0, 3)
    assert (project / "small" / "run.json").is_file()
    refused(capsys, 1, "not empty", *words)
    assert main(["merge", "run/final", "--out", "merged", "--quiet"]) == 0
    (project / "other").mkdir()
    (project / "other" / "final").mkdir()
    refused(capsys, 1, "not empty", *words[:-3], "other", "--device", "cpu")
    assert not [*project.rglob(".forgetless-*.tmp")]


def test_a_mark_of_strangers(tmp_path):
    mark = tmp_path / MARK
    for content in ("", "[]", '{"wrote": ["final"]}', '{"wrote": {"../final": "tune"}}'):
        mark.write_text(content)
        with pytest.raises(FileError, match=MARK):
            ours_in(tmp_path)
    mark.unlink()
    claim(tmp_path, "tune", ["final"], {})
    (tmp_path / "final").mkdir()
    claim(tmp_path, "tune", ["final", "run.json"], {})
    assert ours_in(tmp_path) == {"final": "tune", "run.json": "tune"}
    with pytest.raises(ValueError, match="forgetless tune wrote it"):
        claim(tmp_path, "eval", ["final"], {})


def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    """Any `.NAME.NUMBER.tmp` anywhere below was removed: other programs' files, and what a live
    process of ours was writing.
    """
    claim(tmp_path, "tune", ["final"], {})
    (tmp_path / "final").mkdir()
    (tmp_path / "theirs").mkdir()
    name = temporary_beside(tmp_path / "run.json").name
    left = name.replace(f"-{os.getpid()}.", f"-{ended()}.")
    living = name.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")
    elsewhere = left.replace(machine(), "0" * 8)
    gone = [tmp_path / left, tmp_path / "final" / left]
    kept = [
        tmp_path / ".run.json.7.tmp",
        tmp_path / "final" / ".hidden.123.tmp",
        tmp_path / "theirs" / left,
        tmp_path / living,
        tmp_path / elsewhere,
        tmp_path / name,
    ]
    for path in (*gone, *kept):
        path.touch()
    with only_writer(tmp_path):
        assert [path.exists() for path in (*gone, *kept)] == [False] * 2 + [True] * 6
    os.utime(tmp_path / elsewhere, (0, 0))  # nobody can ask there, but it is older than a week
    (tmp_path / "theirs" / living).touch()
    with only_writer(tmp_path / "theirs" / "run.json", folder=False):
        assert not (tmp_path / "theirs" / left).exists()
    with only_writer(tmp_path):
        assert not (tmp_path / elsewhere).exists() and (tmp_path / "theirs" / living).exists()


@pytest.mark.parametrize("name", ["n" * 243, "ü" * 121])
def test_the_longest_name_is_written(tmp_path, name):
    """The temporary name was longer than that of the file, so that a long name failed at the end.
    So was the name of a recording's state, which needs 12 bytes more than that of the file.
    """
    state = tmp_path / f"{name}.state.12345"
    with only_writer(tmp_path / name, folder=False):
        with atomic_path(state, of=name) as temporary:
            temporary.write_text("a state")
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text("whole")
    assert (tmp_path / name).read_text() == "whole" and state.read_text() == "a state"


@pytest.mark.parametrize("name", ["n" * 244, "n" * 246, "ü" * 122, "ü" * 123, "n" * 249, "n" * 256])
def test_a_longer_name_is_refused_before_anything_is_written(tmp_path, name):
    refusal = f"has {len(name.encode())} bytes, expected at most 243"
    with (
        pytest.raises(ValueError, match=refusal),
        only_writer(tmp_path / name, folder=False),
    ):
        pytest.fail("the work began")
    assert list(tmp_path.iterdir()) == []
