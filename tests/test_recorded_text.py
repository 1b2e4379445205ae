"""Text that importance was recorded on is known again where forgetting is measured: that is warned
of, and with a budget refused unless asked for.
"""

import json
import random
from types import SimpleNamespace

import pytest

from conftest import unheld
from forgetless import hold
from forgetless.budget import keeper
from forgetless.cli import main
from forgetless.data.documents import load_documents
from forgetless.data.traces import MOST_HASHES, Traces, read_traces, traces_of
from forgetless.errors import FileError, OptionError
from forgetless.files.hub import shareable
from forgetless.importance.importance import Importance, convert
from forgetless.importance.recorded_on import check_measured, check_recorded_text, recorded_on

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]


def texts(count, seed, words=40):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def written(path, documents):
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return path


def reworded(text):
    """The text with a word changed here and there, in capitals and with commas."""
    words = text.split()
    words[20] = "otherwise"
    return ", ".join(words).upper()


@pytest.fixture
def recorded(model_folder, tmp_path):
    """The text that importance was recorded on, and the file."""
    text = written(tmp_path / "recorded.jsonl", texts(60, seed=0))
    file = tmp_path / "model.importance.safetensors"
    words = ["record", model_folder, "--general", text, "--estimator", "fisher", "--out", file]
    assert main([str(word) for word in (*words, "--length", "32", "--quiet")]) == 0
    return text, file


def test_the_same_text_and_near_duplicates_are_known_again():
    known = texts(300, seed=1)
    traces = read_traces(json.loads(json.dumps(traces_of(known).plain())))
    again = [reworded(known[0]), *texts(50, seed=2), known[1], known[2][: len(known[2]) // 2]]
    found = traces.overlap(again)
    assert (found.exact, found.near, found.documents) == ([51], [0, 52], 53)


def test_of_much_text_a_sample_is_kept_by_which_it_is_known_again():
    known = texts(500, seed=3, words=200)
    traces = traces_of(known)
    assert len(traces.runs) == MOST_HASHES < 500 * 190
    assert len(traces.overlap(known).exact) == 500
    assert len(traces.overlap([reworded(text) for text in known]).near) > 480
    assert not traces.overlap(texts(500, seed=4, words=200)).describe()


def test_a_budget_on_recorded_text_is_refused_unless_asked_for(
    recorded, model_folder, tmp_path, caplog, capsys, monkeypatch
):
    text, file = recorded

    def stops(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(keeper.Keeper, "bind", stops)
    domain = written(tmp_path / "domain.jsonl", texts(30, seed=5, words=8))
    words = ["tune", model_folder, "--data", domain, "--importance", file, "--device", "cpu"]
    words += ["--rank", "2", "--out", tmp_path / "run", "--max-steps", "2", "--method", "hold"]
    same = unheld([*words, "--budget", "5%", "--general", text])
    assert main(same) == 2
    message = "importance was recorded on 60 of the 60 general documents that are measured"
    assert message in (error := capsys.readouterr().err) and "--allow-recorded-text" in error
    assert main([*same, "--allow-recorded-text"]) == 130
    assert message in caplog.text
    # In turn, before anything is written.
    words[words.index(tmp_path / "run")] = tmp_path / "turns"
    both = [*words, "--data", domain, "--eval-data", domain, "--eval-data", domain]
    assert main(unheld([*both, "--budget", "5%", "--general", text])) == 2
    assert not list((tmp_path / "turns").glob("*.yaml"))


def test_whatever_measures_by_an_importance_file_asks_for_its_text(recorded, tmp_path, caplog):
    text, file = recorded
    importance, documents = Importance.load(file), load_documents(str(text))
    given = SimpleNamespace(budget="1%", allow_recorded_text=False)
    with pytest.raises(OptionError, match="recorded on 60 of the 60"):
        check_recorded_text(given, importance, documents)  # as shrink and tune ask
    trainer = SimpleNamespace(
        processing_class=SimpleNamespace(batch_decode=None),
        train_dataset=None,
        callback_handler=SimpleNamespace(callbacks=[]),
    )
    with pytest.raises(OptionError, match="recorded on 60 of the 60"):
        hold(trainer, importance, budget="1%", general=str(text))
    check_measured(importance, documents)  # nothing but a warning without a budget
    assert "recorded on 60 of the 60" in caplog.text
    caplog.clear()
    # A page that stands everywhere is warned of, and no more.
    mixed = [*texts(199, seed=6), reworded(texts(1, seed=0)[0])]
    check_measured(importance, load_documents(str(written(text, mixed))), budget=True)
    assert "on 0 of the 200 general documents that are measured, and nearly on 1" in caplog.text
    caplog.clear()
    check_measured(importance, load_documents(str(written(text, texts(60, seed=8)))), budget=True)
    check_measured(None, documents, budget=True)
    assert not caplog.text


def test_forms_keep_the_traces_and_programs_are_not_shown_them(recorded, tmp_path, capsys):
    text, file = recorded
    convert(file, "u8", tmp_path / "small.safetensors")
    info = Importance.load(tmp_path / "small.safetensors").info
    assert len(recorded_on(info, load_documents(str(text))).exact) == 60
    assert shareable(info)["data"]["traces"] == info["data"]["traces"]  # as it goes to the Hub
    capsys.readouterr()
    assert main(["inspect", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["info"]["data"]
    assert "sha256" in shown and "traces" not in shown
    # A file of before knows the whole text alone.
    del info["data"]["traces"]
    documents = load_documents(str(text))
    assert len(recorded_on(info, documents).exact) == 60
    assert not recorded_on(info, documents[:59]).exact


@pytest.mark.parametrize(
    "traces",
    [
        "none",
        {},
        {"documents": "AAAA", "runs": ""},
        {"documents": "", "runs": "no base64!"},
        {"documents": [], "runs": ""},
        {"documents": "", "runs": "AAAA" * (MOST_HASHES + 3)},
    ],
)
def test_traces_that_cannot_be_are_refused(traces, recorded, tmp_path):
    _, file = recorded
    importance = Importance.load(file)
    importance.info["data"]["traces"] = traces
    importance.save(tmp_path / "tampered.safetensors")
    with pytest.raises(FileError, match="hashes of"):
        Importance.load(tmp_path / "tampered.safetensors")


def test_traces_of_nothing_hold_nothing():
    assert traces_of(["", "!?", "one two"]).overlap(["?", ""]).describe() is None
    assert Traces(frozenset(), frozenset()).overlap(["one two"]).describe() is None
