"""`tune` holds by itself: by importance that it finds in the cache, or records there first."""

import fcntl
import json
import logging
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, load_file

from forgetless.cli import main
from forgetless.importance.importance import Importance
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.holding import AUTO, HOLDING
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record import cached, recording
from forgetless.record.cached import default_recording, recorded_for

SMALL = ["--answers", "24", "--answer-length", "8"]


@pytest.fixture
def chats(tmp_path):
    """Chats about little, to train on."""
    rows = [
        [
            {"role": "user", "content": f"the cat {letter} ?"},
            {"role": "assistant", "content": f"a b a {letter}"},
        ]
        for letter in "abcd" * 4
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}) for turns in rows))
    return str(path)


@pytest.fixture
def tuned(chat_folder, chats, tmp_path):
    """A function: words of a command line -> what is in the folder of the run."""

    def run(name, *words):
        out = tmp_path / name
        command = ["tune", chat_folder, "--data", chats, "--out", str(out), *SMALL, *words]
        command += ["--rank", "2", "--batch-size", "4", "--accumulation", "1", "--max-steps", "3"]
        command += ["--log-steps", "1"]
        assert main([*command, "--device", "cpu"]) == 0
        return json.loads((out / "run.json").read_text()), out

    return run


def adapter(out):
    return load_file(out / "final" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recorded_files(cache):
    return sorted((cache / "importance").glob("*.safetensors"))


def test_tune_records_once_then_finds_it_and_gives_what_a_file_gives(
    tuned, chat_folder, cache, tmp_path, caplog, capsys
):
    with caplog.at_level(logging.INFO, "forgetless"):
        run, out = tuned("first")
    [file] = recorded_files(cache)
    assert "no importance of this base is in the cache, so it is recorded now" in caplog.text
    assert "this takes about" in caplog.text and str(file) in caplog.text
    assert "what is lost is measured on the model's own answers" in caplog.text
    assert run["method"] == ["hold", "kl"] and run["importance"]["file"] == str(file)
    assert run["configuration"]["importance"] == AUTO and run["configuration"]["general"] == "chat"
    assert run["configuration"]["strength"] == HOLDING["strength"] and run["energy"] > 0
    assert run["replay"]["sequences"] == 24 and run["forgetting"]["of"] == "divergence"

    caplog.clear()
    with caplog.at_level(logging.INFO, "forgetless"):
        tuned("second")
    assert "importance of this base is in the cache, recorded on 20" in caplog.text
    assert "sampling" not in caplog.text and recorded_files(cache) == [file]
    assert same(adapter(out), adapter(tmp_path / "second"))

    by_hand = str(tmp_path / "i.safetensors")
    words = ["record", chat_folder, "--keep-answers", "256", "--out", by_hand, *SMALL]
    assert main([*words, "--device", "cpu"]) == 0
    assert same(load_file(by_hand), load_file(file))
    given = ["--importance", by_hand, "--method", "hold,kl", "--replay", "kept", "--strength", "30"]
    tuned("given", *given)
    assert same(adapter(out), adapter(tmp_path / "given"))
    shown = capsys.readouterr().out
    assert "lost on its own answers (chat)" in shown and "forgetless chat" in shown
    assert max(map(len, shown.split("next:")[0].splitlines())) <= 80


def test_plain_is_plain_and_a_method_without_importance_stays_as_asked(tuned, cache, tmp_path):
    run, _ = tuned("plain", "--method", "plain", "--general", "none")
    assert run["importance"] is None and run["forgetting"] is None and "own" not in run["before"]
    assert not cache.exists() or not recorded_files(cache)
    run, _ = tuned("kl", "--method", "kl", "--replay", "chat", "--replay-documents", "12")
    assert run["method"] == ["kl"] and run["importance"] is None and not recorded_files(cache)
    run, _ = tuned("hold", "--method", "hold", "--importance", "auto")
    assert run["method"] == ["hold"] and run["configuration"]["strength"] == 10.0
    run, _ = tuned("weight", "--kl-weight", "3", "--general", "none")
    assert run["configuration"]["kl_weight"] == 3.0 and run["method"] == ["hold", "kl"]


def test_record_without_out_writes_what_tune_looks_for(chat_folder, cache, caplog, capsys):
    with caplog.at_level(logging.INFO, "forgetless"):
        assert main(["record", chat_folder, *SMALL]) == 0
    [file] = recorded_files(cache)
    assert f"wrote {file}" in caplog.text
    before = file.read_bytes()
    with caplog.at_level(logging.INFO, "forgetless"):
        assert main(["record", chat_folder, *SMALL]) == 0
    assert "importance of this base is in the cache" in caplog.text
    assert file.read_bytes() == before
    assert main(["record", chat_folder, "--estimator", "fisher", "--answers", "9"]) == 2
    assert (
        "tune looks for what is recorded by default; found --estimator" in capsys.readouterr().err
    )
    assert main(["record", chat_folder, "--general", "chat", "--calibrate"]) == 2
    assert "found --general, --calibrate" in capsys.readouterr().err


def test_the_file_belongs_to_this_base_and_these_prompts(
    chat_model, chat_tokenizer, chat_folder, cache, tmp_path
):
    given = {"model": chat_folder, "data": "d", "out": "o", "answers": 12, "answer_length": 4}
    options = resolve(TuneOptions, given)

    def place(options=options, model=chat_model, tokenizer=chat_tokenizer):
        return recorded_for(default_recording(options, tokenizer), model, tokenizer)[1]

    first = place()
    assert place(replace(options, seed=7)) == first == place(replace(options, model="another"))
    assert place(replace(options, answers=14)) != first
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"the cat {i}"}) for i in range(9)))
    assert place(replace(options, prompts=str(prompts))) != first
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(" . ", " ! ")
    assert place() != first
    chat_tokenizer.chat_template = None
    recording_of_base = default_recording(options, chat_tokenizer)
    assert recording_of_base.general == "self" and place() != first
    with torch.no_grad():
        chat_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert place() not in (first, place(model=load_model(resolve(TuneOptions, given))))


def test_a_damaged_file_and_a_state_that_does_not_fit_are_made_again(
    chat_folder, cache, caplog, monkeypatch
):
    tokenizer = load_tokenizer(RecordOptions(chat_folder))
    options = default_recording(
        RecordOptions(chat_folder, answers=12, answer_length=4, device="cpu"), tokenizer
    )
    model = load_model(options)
    whole, file = recorded_for(options, model, tokenizer)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    before = load(file.read_bytes())
    file.write_bytes(file.read_bytes()[:-9])
    (file.parent / f"{file.name}.state").write_bytes(b"nothing")
    with caplog.at_level(logging.INFO, "forgetless"):
        again, _ = recorded_for(options, model, tokenizer)
    assert "is not a whole safetensors file" in caplog.text and "recorded again" in caplog.text
    assert "is not a whole saved state" in caplog.text and "begins again" in caplog.text
    assert same(before, load_file(file)) and len(again) == len(whole)


def test_an_interrupted_recording_goes_on(chat_folder, cache, monkeypatch):
    from forgetless.record.kronecker import Kronecker

    tokenizer = load_tokenizer(RecordOptions(chat_folder))
    options = default_recording(
        RecordOptions(chat_folder, answers=24, answer_length=4, device="cpu"), tokenizer
    )
    options = replace(options, save_steps=1)
    model = load_model(options)
    observe, calls = Kronecker.observe, []

    def interrupted(self, **batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return observe(self, **batch)

    monkeypatch.setattr(Kronecker, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorded_for(options, model, tokenizer)
    assert not recorded_files(cache)
    _, file = recorded_for(options, model, tokenizer)
    assert len(calls) == 4 + 3 and recorded_files(cache) == [file]
    assert {path.name for path in file.parent.iterdir()} <= {file.name, f".{file.name}.lock"}


def test_a_second_process_waits_for_the_first(chat_folder, cache, caplog, monkeypatch):
    tokenizer = load_tokenizer(RecordOptions(chat_folder))
    options = default_recording(
        RecordOptions(chat_folder, answers=12, answer_length=4, device="cpu"), tokenizer
    )
    model = load_model(options)
    _, file = recorded_for(options, model, tokenizer)
    whole = file.read_bytes()
    file.unlink()
    lock = open(file.with_name(f".{file.name}.lock"), "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)

    def finish():
        file.write_bytes(whole)
        lock.close()

    timer = threading.Timer(0.3, finish)
    monkeypatch.setattr(cached, "record_on", None)
    monkeypatch.setattr(cached, "check_cache", lambda kind: timer.start())
    with caplog.at_level(logging.INFO, "forgetless"):
        recorded_for(options, model, tokenizer)
    assert "another process records the importance of this base" in caplog.text
    timer.join()


def test_what_cannot_be_done_is_said_before_long_work(
    tuned, chat_folder, chats, cache, tmp_path, capsys, monkeypatch
):
    words = ["tune", chat_folder, "--data", chats, *SMALL, "--out", str(tmp_path / "run")]
    cache.write_text("a file")
    assert main(words) == 1
    assert "cache of forgetless: Not a directory" in capsys.readouterr().err
    cache.unlink()
    assert main([*words, "--method", "hold"]) == 2
    assert "--importance auto takes that of the cache" in capsys.readouterr().err

    def fails(*arguments):
        raise ValueError("'x.weight' has non-finite importance; record again with --dtype float32")

    monkeypatch.setattr(recording, "by_observing", fails)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "cannot be recorded: 'x.weight' has non-finite importance" in said
    assert "Give --importance FILE of another recording, or --method plain" in said


def test_a_budget_is_kept_on_own_answers_with_what_the_cache_has(tuned, cache):
    run, _ = tuned("budget", "--budget", "5%", "--learning-rate", "0.02")
    assert run["verdict"] == "met" and run["method"] == ["hold", "kl"]
    assert run["configuration"]["strength"] is None and len(recorded_files(cache)) == 1


def test_a_sequence_and_the_paper_are_held_by_a_file_alone():
    given = {"model": "m", "out": "o"}
    several = resolve(TuneOptions, {**given, "data": ["a", "b"]})
    assert (several.method, several.importance, several.general) == ("plain", None, None)
    after = resolve(TuneOptions, {**given, "data": "a", "after": "run"})
    assert (after.method, after.importance) == ("hold", None)
    paper = resolve(TuneOptions, {**given, "data": "a", "preset": "paper"})
    assert (paper.method, paper.importance, paper.general) == ("plain", None, AUTO)
    none = resolve(TuneOptions, {**given, "data": "a", "general": None})
    assert none.general is None and none.method == HOLDING["method"]


def test_a_later_domain_goes_on_from_a_held_run_with_its_answers(tuned, tmp_path, capsys):
    """The importance of the first domain is added, and the answers of the base stay."""
    _, first = tuned("first")
    run, _ = tuned("second", "--after", str(first), "--method", "hold,kl", "--replay", "kept")
    assert run["method"] == ["hold", "kl"]
    assert Importance.load(run["importance"]["file"]).answers is not None


def test_a_run_against_plain_has_both_and_the_report_shows_them(tuned, chats, capsys):
    run, out = tuned("both", "--against-plain", "--eval-data", chats)
    plain = json.loads((out / "plain" / "run.json").read_text())
    assert run["method"] == ["hold", "kl"] and plain["importance"] is None
    assert plain["configuration"]["max_steps"] == run["configuration"]["max_steps"] == 3
    assert plain["before"] == run["before"]
    assert main(["report", str(out)]) == 0
    assert "of what plain fine-tuning" in (out / "report.html").read_text()
