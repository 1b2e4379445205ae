"""What is shown of the options: help, the option that is meant, completion, what comes next."""

import argparse
import dataclasses
import json
import re
import shlex
import subprocess

import pytest

from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.options.command_line import unknown_option, verb_parser
from forgetless.options.completion import SHELLS, completion
from forgetless.options.help import OFTEN, UNDER
from forgetless.options.option import GROUPS, flag
from forgetless.options.other_names import INSTEAD, SAME_OPTION, SAME_VERB, in_our_words
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import VERBS, resolve

FIELDS = TuneOptions.__dataclass_fields__


def helped(verb, capsys, *more):
    try:
        assert main([verb, *(more or ["--help"])]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_on_a_screen(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = helped(verb, capsys)
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 80
    for name in VERBS[verb].needed:
        line = next(line for line in text.splitlines() if f"  {VERBS[verb].shown(name)}" in line)
        assert "(required)" in text[text.index(line) :][:200], name


def test_help_all_shows_every_option_in_groups_with_its_default(capsys):
    text = helped("tune", capsys, "m", "--help-all")
    groups = [line[:-1] for line in text.splitlines() if re.fullmatch(r"\w[\w ]*:", line)]
    order = list(dict.fromkeys(UNDER.get(group, group) for group in GROUPS))
    assert groups == [*[name for name in order if name in groups], "every verb"]
    assert {"model", "data", "adapter", "holding", "budget", "sequence", "training"} <= set(groups)
    for name, spec in FIELDS.items():
        assert (spec.metadata["metavar"] if name == "model" else flag(name)) in text
    said = " ".join(text.split())
    assert "[8]" in said and "[1024; paper: 800]" in said
    assert "seed of every random choice [0]" in said and "kl (predictions on general text" in said
    assert "--keep-anchor" in helped("record", capsys, "m", "--help-all")


def test_what_help_shows_often_are_options():
    for verb, often in OFTEN.items():
        assert set(often) <= set(VERBS[verb].options.__dataclass_fields__), verb
        assert {*VERBS[verb].needed} <= set(often)


def test_other_names_lead_to_options_and_verbs():
    every = {name for verb in VERBS.values() for name in verb.options.__dataclass_fields__}
    assert set(SAME_OPTION.values()) <= every
    assert {option for option, _ in INSTEAD.values()} <= every | {"debug"}
    assert set(SAME_VERB.values()) <= {*VERBS, "check"}
    assert not set(SAME_VERB) & set(VERBS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr 1e-4", "--learning-rate 1e-4"),
        ("--lr=1e-4", "--learning-rate=1e-4"),
        ("--lora_r 16 --lora-alpha 32", "--rank 16 --alpha 32"),
        ("--model_name_or_path gpt2 --dataset d.jsonl", "gpt2 --data d.jsonl"),
        ("--gradient_checkpointing True --packing False", "--gradient-checkpointing --no-packing"),
        ("--packing --out True", "--packing --out True"),
        ("--no_packing", "--no-packing"),
        ("--max_steps -1 my_file_name", "--max-steps -1 my_file_name"),
        ("--nothing_known x_y", "--nothing_known x_y"),
    ],
)
def test_names_of_other_libraries_are_accepted(typed, meant):
    assert in_our_words(typed.split(), FIELDS) == meant.split()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--load_in_4bit", "give --quantize 4bit"),
        ("--warmup_steps=10", "give --warmup with a fraction of the steps"),
        ("--learnig-rate", "did you mean '--learning-rate'"),
        ("--num-epochs", "did you mean '--epochs'"),
        ("--divergence", "'--kl-weight'"),
        ("--jsn", "did you mean '--json'"),
        ("--mu", "which shrink has"),
        ("--xyzzy", "forgetless tune --help-all shows all"),
        ("stray", "'stray' is one word too many"),
    ],
)
def test_the_option_that_is_meant_is_named(typed, said):
    assert said in unknown_option(typed, "tune")


def test_files_and_python_are_answered_with_their_names_and_no_class():
    with pytest.raises(OptionError, match="unknown option 'lr' of tune; did you mean 'learning_ra"):
        resolve(TuneOptions, {"lr": 1})


@pytest.mark.parametrize(("typed", "verb"), [("train", "tune"), ("evaluate", "eval")])
def test_verbs_of_other_programs_are_answered(typed, verb, capsys):
    assert main([typed]) == 2 and f"did you mean '{verb}'?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_names_every_verb_and_option(shell, capsys):
    assert main(["--completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == completion(shell)
    for verb, row in VERBS.items():
        assert verb in text
        for spec in dataclasses.fields(row.options):
            if not spec.metadata["positional"]:
                assert flag(spec.name).removeprefix("--" if shell == "fish" else "") in text


def test_bash_completes():
    asked = """
eval "$SCRIPT"
COMP_WORDS=(forgetless tu); COMP_CWORD=1; _forgetless; echo "${COMPREPLY[@]}"
COMP_WORDS=(forgetless tune m --learn); COMP_CWORD=3; _forgetless; echo "${COMPREPLY[@]}"
COMP_WORDS=(forgetless tune --dtype bf); COMP_CWORD=3; _forgetless; echo "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, env={"SCRIPT": completion("bash")}
    )
    assert done.stdout.splitlines() == ["tune", "--learning-rate", "bfloat16"], done.stderr


def test_what_comes_next_is_a_command_that_the_verbs_take():
    for name, verb in VERBS.items():
        if verb.then is None:
            continue
        given = {"model": "m", "general": "chat", "adapter": "a", "out": "o", "file": "f"}
        fields = verb.options.__dataclass_fields__
        given |= {"experiment": "e.yaml", "folder": "d"}
        options = verb.options(**{key: given[key] for key in given if key in fields})
        words = shlex.split(verb.then(options))
        if not words:
            continue
        assert words[0] == "forgetless" and words[1] in VERBS, name
        parsed = vars(verb_parser(words[1]).parse_args(words[2:]))
        VERBS[words[1]].resolve(parsed)


def test_results_as_json_stand_alone_on_standard_output(model_folder, text_file, tmp_path, capsys):
    file = str(tmp_path / "i.safetensors")
    words = ["record", str(model_folder), "--general", str(text_file), "--out", file]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    heard = capsys.readouterr()
    recorded = json.loads(heard.out)
    assert recorded["tier"].startswith("kronecker") and recorded["info"]["estimator"] == "kronecker"
    assert f"next: forgetless tune {model_folder} --data DATA --importance {file}" in heard.err
    assert main(["inspect", file, "--json", "--quiet"]) == 0
    heard = capsys.readouterr()
    assert json.loads(heard.out) == recorded and heard.err == ""
    words = ["eval", str(model_folder), "--general", str(text_file), "--device", "cpu"]
    assert main([*words, "--json", "--quiet"]) == 0
    heard = capsys.readouterr()
    assert json.loads(heard.out)["before"]["general"]["tokens"] > 0 and heard.err == ""


def test_a_flag_of_the_parser_is_no_option_of_a_verb():
    for verb, row in VERBS.items():
        own = set(row.options.__dataclass_fields__)
        assert not own & {"config", "quiet", "debug", "help", "help_all"}
        assert not (row.reports is not None and "json" in own)
        assert isinstance(verb_parser(verb), argparse.ArgumentParser)
