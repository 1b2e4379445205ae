"""A full disk and a folder that cannot be written: one clear sentence, nothing of before harmed, no
temporary left, and no long work for nothing.
"""

import contextlib
import errno
import json
import os
import random
import resource
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetless.cli import main
from forgetless.files import atomic as runs
from forgetless.model import adapter_files, precision
from forgetless.model import loading as models

HIDDEN = lambda root: [path for path in root.rglob("*") if path.name.endswith((".tmp", ".lock"))]


@contextlib.contextmanager
def little_room(size=4096):
    """No file of this process grows beyond `size` bytes: every write behind it fails as on a full
    disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def words(model_folder, text_file, tmp_path, monkeypatch):
    """A function: verb -> the words of its command, and the file or folder that it writes."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    rng = random.Random(7)
    rows = [
        {
            "prompt": f"Question {i} {rng.choice('abcd')} ?",
            "completion": " yes no " + rng.choice("abcd"),
        }
        for i in range(40)
    ]
    (tmp_path / "domain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, general = str(model_folder), str(text_file)
    training_words = [
        "--data",
        str(tmp_path / "domain.jsonl"),
        "--rank",
        "8",
        "--batch-size",
        "4",
        "--accumulation",
        "1",
        "--device",
        "cpu",
        "--method",
        "plain",
    ]

    def run(*words):
        assert main([*map(str, words), "--quiet"]) == 0

    def build(verb):
        importance, adapter = tmp_path / "i.safetensors", tmp_path / "run" / "final"
        if verb in ("convert", "shrink"):
            run("record", model, "--general", general, "--estimator", "fisher", "--out", importance)
        if verb in ("shrink", "report", "merge"):
            run(
                "tune",
                model,
                *training_words,
                "--max-steps",
                "2",
                "--out",
                tmp_path / "run",
                "--general",
                general,
            )
        if verb == "compare":
            texts = {"wide": general, "other": general}
            given = {
                "model": model,
                "device": "cpu",
                "general": texts,
                "domains": {"domain": str(tmp_path / "domain.jsonl")},
                "methods": {"plain": {}, "kl": {"method": "kl", "replay": "recorded"}},
                "seeds": {"validation": [0], "test": []},
            }
            (tmp_path / "e.yaml").write_text(json.dumps(given))
        return {
            "record": [
                "record",
                model,
                "--general",
                general,
                "--estimator",
                "path",
                "--rank",
                "8",
                "--save-steps",
                "2",
                "--batch-size",
                "4",
            ],
            "tune": ["tune", model, *training_words, "--max-steps", "4", "--save-steps", "2"],
            "compare": ["compare", str(tmp_path / "e.yaml")],
            "convert": ["convert", str(importance), "--tier", "bf16"],
            "shrink": ["shrink", str(adapter), "--importance", str(importance), "--mu", "1"],
            "merge": ["merge", str(adapter)],
            "report": ["report", str(tmp_path / "run")],
        }[verb]

    return build


@pytest.mark.parametrize(
    ("verb", "target"),
    [
        ("record", "new.safetensors"),
        ("convert", "new.safetensors"),
        ("report", "page.html"),
        ("tune", "new"),
        ("shrink", "new"),
        ("merge", "new"),
        ("compare", "new"),
    ],
)
def test_a_full_disk_is_one_sentence_and_harms_nothing(words, tmp_path, capsys, verb, target):
    command, out = words(verb), tmp_path / "place" / target
    out.parent.mkdir()
    if "." in target:
        # One of ours, which may be replaced.
        assert main([*command, "--out", str(out), "--quiet"]) == 0
    if verb == "record":
        command = [*command, "--overwrite"]  # a finished recording is refused without
    before = out.read_bytes() if out.exists() else None
    capsys.readouterr()
    with little_room():
        status = main([*command, "--out", str(out), "--quiet"])
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 1 and said[-1].startswith(
        f"forgetless {verb}: cannot write '{tmp_path / 'place'}"
    ), said
    assert (
        "make room there, or give another --out" in said[-1]
        and "run again with --debug" not in said[-1]
    )
    assert HIDDEN(out.parent) == []
    if "." in target:
        assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]
    else:
        assert not list(out.glob("checkpoints/checkpoint-*")) and not any(
            (out / name).exists() for name in ("final", "run.json", "compare.json", "config.json")
        )


def test_a_disk_that_fills_up_while_training_leaves_what_it_was_going_on_from(
    words, tmp_path, capsys, monkeypatch
):
    """The second checkpoint does not fit any more: the first is whole, and the run goes on from it
    once there is room.
    """
    from transformers import TrainerState

    command, out = words("tune"), tmp_path / "new"
    assert main([*command, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    original = TrainerState.save_to_json

    def full(self, path):
        if self.global_step == 4:
            with open(path, "w") as file:
                file.write('{"best')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", full)
    assert main([*command, "--out", str(out), "--quiet"]) == 1
    assert f"cannot write '{out}': No space left on device" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(TrainerState, "save_to_json", original)
    assert main([*command, "--out", str(out), "--resume", "--quiet"]) == 0
    a, b = (
        load_file(folder / "final" / "adapter_model.safetensors")
        for folder in (tmp_path / "whole", out)
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_replaced_stays_until_the_new_one_is_whole(words, tmp_path, capsys):
    """tune --overwrite onto a finished run, with no room for a new adapter."""
    command, out = words("tune"), tmp_path / "run"
    assert main([*command, "--out", str(out), "--quiet"]) == 0
    before = (out / "final" / "adapter_model.safetensors").read_bytes()
    with little_room():
        assert main([*command, "--out", str(out), "--overwrite", "--quiet"]) == 1
    assert (out / "final" / "adapter_model.safetensors").read_bytes() == before and HIDDEN(
        out
    ) == []
    assert not (out / "run.json").exists()  # it described the run that was to be replaced


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"a": torch.zeros(5000)}, str(path)),
        lambda path: torch.save(torch.zeros(5000), path),
        lambda path: path.write_text("x" * 20000),
    ],
)
def test_every_library_that_writes_is_understood(tmp_path, write):
    with (
        little_room(),
        pytest.raises(ValueError, match=r"cannot write '.*new'") as raised,
        runs.atomic_path(tmp_path / "new") as temporary,
    ):
        write(temporary)
    assert raised.value.__cause__ is not None and list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        ValueError("a reason"),
    ):
        with pytest.raises(type(error)) as raised, runs.atomic_path(tmp_path / "new"):
            raise error
        assert raised.value is error


@pytest.fixture(params=["under a file", "read-only"])
def closed(request, tmp_path):
    """A folder into which nothing can be written, also by root."""
    place = tmp_path / "closed"
    if request.param == "under a file":
        place.write_text("a file")
        yield place
        return
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "verb", ["record", "tune", "compare", "convert", "shrink", "merge", "report"]
)
def test_a_folder_that_cannot_be_written_is_refused_before_any_long_work(
    words, closed, capsys, monkeypatch, verb
):
    command = words(verb)
    for module in (models, precision, adapter_files):
        monkeypatch.setattr(module, "load_model", lambda *arguments: pytest.fail("loaded a model"))
    assert main([*command, "--out", str(closed / "new"), "--quiet"]) == 1
    assert f"forgetless {verb}: cannot write into '{closed}" in capsys.readouterr().err
