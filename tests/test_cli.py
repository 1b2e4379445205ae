"""The command line: help without torch, exit codes, nearest names, precedence of flags, YAML and
presets.
"""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from forgetless import __version__
from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.options.option import MEASURED, RUNNING, deciding, flag, read_yaml
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import VERBS, resolve


@pytest.mark.parametrize("verb", ["", *sorted(VERBS)])
def test_help_answers_without_importing_torch(verb):
    code = f"""
import sys
from forgetless import __version__
from forgetless.cli import main
try:
    main({[verb, "--help"] if verb else ["--help"]!r})
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: forgetless" in done.stdout


def test_python_m_forgetless_is_the_command_line():
    command = [sys.executable, "-m", "forgetless", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"forgetless {__version__}\n" and done.returncode == 0


def test_options_of_every_verb_may_stand_in_a_file(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("out: nowhere\ntier: u8\n")
    assert main(["convert", str(tmp_path / "none.safetensors"), "--config", str(file)]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tuen"], "did you mean 'tune'"),
        (["tune", "m", "--dat", "x"], "did you mean '--data'"),
        (["tune", "m", "--data", "x"], "missing --out"),
        (
            ["record", "m", "--general", "x", "--out", "y", "--gradient", "exactly"],
            "did you mean 'exact'",
        ),
        (
            ["record", "m", "--general", "x", "--out", "y", "--rank", "eight"],
            "--rank expects int, found 'eight'",
        ),
        (["eval", "m"], "nothing to measure"),
        (["record", "m", "--estimator", "fisher"], "missing --out"),
        (["record"], "missing MODEL"),
        (["convert", "f"], "missing --tier, --out; for example: forgetless convert"),
        (["inspect"], "missing FILE; for example: forgetless inspect"),
        (["merge", "a", "--out", "b", "--dtype", "half"], "--dtype expects one of auto, float32"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1"),
        (["tune", "m", "--data", "x", "--out", "y", "--anchor", "recorded"], "needs --importance"),
    ],
)
def test_wrong_options_exit_with_2_and_say_what_to_do(words, expected, capsys):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert expected in capsys.readouterr().err


def test_bad_input_exits_with_1_without_a_traceback(model_folder, tmp_path, capsys):
    words = ["tune", str(model_folder), "--data", "nothing.jsonl", "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert "'nothing.jsonl' is not a file" in capsys.readouterr().err
    assert (
        main(
            ["record", "./no-model", "--general", "x.txt", "--out", str(tmp_path / "i.safetensors")]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "model './no-model' does not exist" in error and "Traceback" not in error
    assert main(["inspect", str(tmp_path / "none.safetensors")]) == 1
    assert "forgetless record MODEL" in capsys.readouterr().err


def test_precedence_is_flag_then_yaml_then_preset_then_default(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("preset: paper\nlearning-rate: 1e-4\nrank: 4\n")
    options = resolve(TuneOptions, {**read_yaml(config), "rank": "2"})
    assert (options.rank, options.learning_rate, options.strength, options.weight_decay) == (
        2,
        1e-4,
        1e-3,
        0.0,
    )


def test_the_paper_preset_holds_the_authors_settings():
    record, tune = (
        resolve(RecordOptions, {"preset": "paper"}),
        resolve(TuneOptions, {"preset": "paper"}),
    )
    assert (
        record.targets,
        record.rank,
        record.alpha,
        record.dropout,
        record.xi,
        record.gradient,
    ) == ("q_proj,v_proj", 8, 32.0, 0.1, 1e-9, "effective")
    assert (
        record.epochs,
        record.batch_size,
        record.accumulation,
        record.documents,
        record.length,
    ) == (5, 20, 4, 2000, 800)
    assert (tune.strength, tune.tau, tune.layers, tune.anchor, tune.learning_rate) == (
        1e-3,
        1e-8,
        "softmax",
        "recorded",
        8e-4,
    )


def test_a_reader_that_goes_away_ends_the_output_quietly(tmp_path):
    from forgetless.importance.entries import DenseEntry
    from forgetless.importance.importance import Importance

    rows = {
        f"model.layers.{i}.self_attn.q_proj.weight": DenseEntry(torch.ones(2, 2))
        for i in range(1200)
    }
    Importance(rows).save(tmp_path / "i.safetensors")
    command = [sys.executable, "-m", "forgetless", "inspect", str(tmp_path / "i.safetensors")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as running:
        assert running.stdout.readline().startswith("file")
        running.stdout.close()  # as head does
        assert running.stderr.read() == "" and running.wait() == 141


@pytest.mark.parametrize("text", ["a: [", "- 1", "1: 2"])
def test_broken_yaml_is_an_option_error(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"c\.yaml"):
        read_yaml(path)
    with pytest.raises(OptionError, match="did you mean 'learning_rate'"):
        resolve(TuneOptions, {"learnin_rate": 1})


def bounds(spec):
    return [spec.metadata[name] for name in ("at_least", "above", "below")]


@pytest.mark.parametrize("verb", VERBS)
def test_every_bound_is_kept_with_every_preset(verb):
    kind, presets = VERBS[verb].options, VERBS[verb].presets
    bounded = [spec for spec in dataclasses.fields(kind) if bounds(spec) != [None] * 3]
    assert bounded or verb in ("report", "convert", "inspect", "merge")
    for preset in presets or [None]:
        given = {} if preset is None else {"preset": preset}
        for spec in bounded:
            at_least, above, below = bounds(spec)
            wrong = [at_least - 1] if at_least is not None else []
            wrong += [value for value in (above, below) if value is not None]
            for value in [*wrong, -1]:
                with pytest.raises(OptionError, match=f"{flag(spec.name)} must be"):
                    resolve(kind, {**given, spec.name: value})


def test_what_an_option_decides():
    """An interrupted run may change what only says how it runs, and what it is measured on."""
    assert set(deciding(TuneOptions, RUNNING)) == {
        "against_plain",
        "allow_recorded_text",
        "device",
        "eval_steps",
        "keep_all",
        "log_steps",
        "offload_importance",
        "out",
        "overwrite",
        "private",
        "push_to_hub",
        "report_to",
        "resume",
        "save_steps",
        "threads",
    }
    assert set(deciding(TuneOptions, MEASURED)) == {
        "behaviours",
        "eval_data",
        "eval_split",
        "general",
        "general_split",
        "limit",
        "tasks",
        "text_column",
    }
    assert set(deciding(RecordOptions, RUNNING)) == {
        "device",
        "groups",
        "offload",
        "out",
        "overwrite",
        "private",
        "push_to_hub",
        "resume",
        "save_steps",
        "threads",
    }


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_are_for_terminals(
    model_folder, text_file, tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    common = [
        "--max-steps",
        "2",
        "--batch-size",
        "2",
        "--accumulation",
        "1",
        "--rank",
        "2",
        "--device",
        "cpu",
    ]
    importance = str(tmp_path / "i.safetensors")
    assert (
        main(
            [
                "record",
                str(model_folder),
                "--general",
                str(text_file),
                "--out",
                importance,
                "--estimator",
                "path",
                *common,
            ]
        )
        == 0
    )
    recording = capsys.readouterr().err
    assert (
        "2/2 steps" in recording and "loss" in recording and "tokens/s" in recording
    ) is terminal
    words = [
        "tune",
        str(model_folder),
        "--data",
        str(text_file),
        "--importance",
        importance,
        "--out",
        str(tmp_path / "run"),
        "--log-steps",
        "1",
    ]
    assert main([*words, *common]) == 0
    tuning = capsys.readouterr().err
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", tuning)
    lines = [line.split() for line in plain.splitlines()]
    assert ["step", "loss", "rate", "energy", "tokens/s", "left"] in lines
    assert any(line[:1] == ["2/2"] for line in lines) and "{'loss'" not in tuning
    assert ("2/2 steps" in tuning) is terminal
    assert ("\x1b" in tuning or "\r" in tuning) is terminal
    assert main([*words, *common, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_verbs_that_do_not_share_work_are_refused_under_a_launcher(monkeypatch, tmp_path, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert (
        main(["report", str(tmp_path)]) == 2
        and "report works in one process, found 2" in capsys.readouterr().err
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (
        main(["report", str(tmp_path)]) == 1
        and "works in one process" not in capsys.readouterr().err
    )
