"""`forgetless check`: bounds as they are written, verdicts from intervals, what is refused before a
model is loaded, and the whole verb on the tiny chat model.
"""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import forgetless
from forgetless.budget.budget import parse
from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.evaluate import own_answers as own
from forgetless.evaluate.behaviour_change import paired_interval
from forgetless.files.behaviours_json import BehaviourChange
from forgetless.files.gate_json import Gate, JudgedBound
from forgetless.files.measured_json import DIVERGENCE, Interval, Measured, ScoreChange, Scores
from forgetless.files.run_json import Run
from forgetless.files.schema import read_record
from forgetless.gate import check as gate_check
from forgetless.gate.bounds import Bound, behaviour_bound, read_bounds, task_bounds
from forgetless.gate.judge import judge_bounds, verdict_over
from forgetless.model.adapters import add_adapter
from forgetless.model.loading import load_model
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import VERBS
from forgetless.report.contents import load_contents
from forgetless.report.gate import gate_in_words, gate_sentences
from forgetless.report.gate_files import gate_junit, gate_markdown
from forgetless.report.markdown import markdown
from forgetless.report.page import page

END = 2  # the token that ends a text
FEW = ["--answers", "12", "--answer-length", "12", "--behaviours", "20"]


def options(**given):
    return VERBS["check"].resolve({"model": "base", "tuned": "tuned", **given})


# Bounds as they are written


def test_bounds_are_read_with_the_way_that_is_worse(tmp_path):
    file = tmp_path / "bounds.yaml"
    file.write_text("budget: 2%\nbehaviours: {json: -4%, needless-tool: 1%}\ntasks: {sciq: -1%}\n")
    [budget, js, tool, sciq, ends] = read_bounds(
        options(bounds=str(file), budget="5%", behaviour=["json=-2%", "ends = -5 %"])
    )
    assert budget == Bound("divergence", "", "5%", parse("5%").nats)
    assert js == Bound("behaviour", "json", "-2%", -0.02) and not js.in_file
    assert (tool.name, tool.allowed, tool.in_file) == ("needless tool", 0.01, True)
    assert (sciq.of, sciq.name, sciq.allowed, sciq.metric) == ("task", "sciq", -0.01, None)
    assert ends.text == "-5%" and ends.allowed == -0.05
    assert behaviour_bound("length", "-20%").allowed == -0.2
    assert behaviour_bound("length", "+20%").allowed == 0.2
    assert task_bounds("sciq:acc_norm", "1%")[0].metric == "acc_norm"
    chat = task_bounds("chat", "-2%")
    assert len(chat) == 5 and {each.allowed for each in chat} == {-0.02}


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "nothing to check: give bounds, for example --budget 5%"),
        ({"budget": "five"}, "--budget expects a rise of perplexity like 1%"),
        ({"behaviour": "jason=-2%"}, "did you mean 'json'\\? known: arithmetic, code, domain leak"),
        ({"behaviour": "json"}, "expected a name with its bound, like --behaviour json=-2%"),
        ({"behaviour": "json=+2%"}, "wanted higher, so its bound is on a fall: json=-2%"),
        ({"behaviour": "repeats=-2%"}, "wanted lower, so its bound is on a rise: repeats=\\+2%"),
        ({"behaviour": "json=-0%"}, "expected a change above 0% and of at most 100%"),
        ({"behaviour": "json=-2"}, "expected a change in points like -2%, found '-2'"),
        ({"behaviour": "length=20%"}, "expected a sign, since answers may become shorter"),
        ({"task": "sciq=+1%"}, "an accuracy is wanted higher, so its bound is on a fall: sciq=-1%"),
        ({"budget": "1%", "fast": True, "behaviour": "json=-2%"}, "--fast samples nothing"),
        ({"budget": "1%", "own_answers": "a", "general": "chat"}, "give one of the two"),
    ],
)
def test_bounds_that_cannot_be_are_refused(given, said):
    with pytest.raises(OptionError, match=said):
        read_bounds(options(**given))


def test_files_of_bounds_that_cannot_be_are_refused(tmp_path):
    file = tmp_path / "bounds.yaml"
    for text, said in (
        ("behaviour: {json: -2%}", "unknown key 'behaviour'; did you mean 'behaviours'"),
        ("behaviours: -2%", "expected names with bounds below 'behaviours', found '-2%'"),
        ("tasks: {}", "expected budget, behaviours, tasks, found no bound"),
        ("tasks: {sciq: -1}", "task sciq: expected a change in points like -2%, found '-1'"),
    ):
        file.write_text(text)
        with pytest.raises(OptionError, match=said):
            read_bounds(options(bounds=str(file)))


# Verdicts


def behaviour(lost, gained, prompts, name="json", better="higher"):
    low, high = paired_interval(lost, gained, prompts)
    before = 0.9
    after = before + (gained - lost) / prompts
    return BehaviourChange(
        name=name,
        better=better,
        prompts=prompts,
        before=before,
        after=after,
        low=low,
        high=high,
        lost=lost,
        gained=gained,
    )


def judged_rate(lost, gained, prompts, text="-2%", **more):
    change = behaviour(lost, gained, prompts, **more)
    [each] = judge_bounds(Run(behaviours=[change]), [behaviour_bound(change.name, text)])
    return each


@pytest.mark.parametrize("name, better, sign", [("json", "higher", "-"), ("repeats", "lower", "+")])
def test_a_rate_is_judged_in_the_way_that_is_worse(name, better, sign):
    for worse, bettered, prompts, verdict in (
        (0, 0, 2000, "met"),
        (0, 60, 100, "met"),  # it became better
        (0, 0, 17, "not shown"),
        (50, 0, 100, "exceeded"),
    ):
        lost, gained = (worse, bettered) if sign == "-" else (bettered, worse)
        each = judged_rate(lost, gained, prompts, f"{sign}2%", name=name, better=better)
        assert each.verdict == verdict and (each.more is not None) == (verdict == "not shown")


@pytest.mark.parametrize(
    "lost, gained, prompts", [(0, 0, 17), (2, 2, 100), (3, 1, 120), (9, 2, 90), (1, 0, 30)]
)
def test_so_many_more_prompts_would_decide_and_one_fewer_would_not(lost, gained, prompts):
    each = judged_rate(lost, gained, prompts, "-3.5%")
    assert each.verdict == "not shown"
    for more, verdict in ((each.more, {"met", "exceeded"}), (each.more - 1, {"not shown"})):
        times = (prompts + more) / prompts
        low, high = paired_interval(lost * times, gained * times, prompts * times)
        kept = "met" if low >= -0.035 else "exceeded" if high < -0.035 else "not shown"
        assert kept in verdict


def test_a_length_is_judged_as_a_part_of_the_base():
    change = BehaviourChange("length", unit="tokens", prompts=50, before=100.0, after=85.0)
    for low, high, text, verdict in (
        (-19.0, -11.0, "-20%", "met"),
        (-19.0, -11.0, "-10%", "exceeded"),
        (-25.0, -5.0, "-20%", "not shown"),
        (-25.0, -5.0, "+5%", "met"),
    ):
        run = Run(behaviours=[replace(change, low=low, high=high)])
        [each] = judge_bounds(run, [behaviour_bound("length", text)])
        assert each.verdict == verdict and abs(each.allowed) == float(text.strip("+-%"))


def interval(nats, half, **more):
    return Interval(nats=nats, low=nats - half, high=nats + half, documents=64, **more)


def test_a_budget_is_judged_on_each_text_and_says_how_many_answers_would_decide():
    bound = Bound("divergence", "", "5%", parse("5%").nats)
    run = Run(forgetting=interval(0.04, 0.02, of=DIVERGENCE), general=interval(0.001, 0.002))
    answers, text = judge_bounds(run, [bound])
    assert (answers.name, answers.counted, answers.verdict) == (
        "own answers",
        "answers",
        "not shown",
    )
    assert answers.more == pytest.approx(64 * ((0.02 / (bound.allowed - 0.04)) ** 2 - 1), abs=1)
    assert (text.name, text.counted, text.verdict) == ("general text", "documents", "met")
    assert verdict_over([answers, text]) == "not shown"
    [each] = judge_bounds(Run(forgetting=interval(0.3, 0.02, of=DIVERGENCE)), [bound])
    assert each.verdict == "exceeded" and each.more is None
    [lost] = judge_bounds(Run(forgetting=Interval(nats=0.01, of=DIVERGENCE)), [bound])
    assert lost.verdict == "not shown" and lost.why == "there are too few for an interval"


def run_of_task(**changes):
    known = {name: ScoreChange(*values) for name, values in changes.items()}
    numbers = dict.fromkeys(changes, 0.5)
    return Run(
        before=Measured(tasks={"sciq": Scores(numbers)}),
        after=Measured(tasks={"sciq": Scores(numbers, changes=known)}),
    )


def test_a_task_is_judged_by_the_accuracy_that_is_named_or_the_first():
    run = run_of_task(
        acc=(0.0, 0.001, -0.002, 0.002, 4000, 5, 5, 1.0),
        acc_norm=(-0.1, 0.01, -0.12, -0.08, 4000, 410, 10, 0.0),
    )
    [first] = judge_bounds(run, task_bounds("sciq", "-1%"))
    [norm] = judge_bounds(run, task_bounds("sciq:acc_norm", "-1%"))
    [missing] = judge_bounds(run, task_bounds("sciq:f1", "-1%"))
    assert (first.name, first.verdict) == ("sciq acc", "met")
    assert (norm.name, norm.verdict) == ("sciq acc_norm", "exceeded")
    assert missing.verdict == "not shown" and "there are: acc, acc_norm" in missing.why
    written = replace(
        run_of_task(**{"exact_match,strict": (0.0, 0.01, -0.02, 0.02, 100)}), behaviours=[]
    )
    [each] = judge_bounds(written, task_bounds("sciq:strict", "-1%"))
    assert each.verdict == "not shown" and each.more == 300
    [asked] = judge_bounds(written, [behaviour_bound("json", "-2%")])
    assert asked.why == "no answer could be judged by it"


# What people and pipelines are told


@pytest.fixture
def mixed():
    """A run with a bound of each verdict."""
    met = judged_rate(0, 0, 2000)
    open_one = replace(judged_rate(1, 1, 100, name="refuses harmless", better="lower", text="+2%"))
    worse = JudgedBound(
        "task",
        "arc_challenge acc_norm",
        "-1%",
        "exceeded",
        -0.01,
        0.4,
        0.3,
        -0.1,
        -0.14,
        -0.06,
        500,
    )
    nats = JudgedBound(
        "divergence", "own answers", "0.05nats", "met", 0.05, None, None, 0.01, 0.005, 0.015, 64
    )
    bounds = [met, open_one, replace(worse, counted="questions"), replace(nats, counted="answers")]
    gate = Gate("<tuned>", "exceeded", False, False, bounds)
    return Run(configuration={"model": "base"}, gate=gate, verdict="exceeded", seconds=2.0)


def test_the_terminal_shows_a_table_of_80_columns(mixed):
    lines = gate_in_words(mixed).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "NOT SHOWN" in text and "EXCEEDED" in text and "+0.0100" in text
    assert "EXCEEDED: 2 met, 1 not shown, 1 exceeded; not passed, exit code 3" in text
    [told] = [line for line in gate_sentences(mixed.gate) if line.startswith("refuses harmless")]
    assert "more prompts would decide (--behaviours, or --prompts FILE with yours)" in told


def test_junit_and_markdown_say_the_same(mixed):
    suite = ElementTree.fromstring(gate_junit(mixed)).find("testsuite")
    counts = {key: suite.get(key) for key in ("tests", "failures", "skipped", "errors")}
    assert counts == {"tests": "4", "failures": "1", "skipped": "1", "errors": "0"}
    cases = {case.get("name"): case for case in suite}
    assert cases["arc_challenge acc_norm -1%"].find("failure") is not None
    assert cases["refuses harmless +2%"].find("skipped") is not None
    assert cases["json -2%"].find("system-out").text.startswith("how often an answer does it")
    strict = replace(mixed, gate=replace(mixed.gate, strict=True))
    assert ElementTree.fromstring(gate_junit(strict)).find("testsuite").get("failures") == "2"
    said = gate_markdown(mixed)
    assert said.startswith("### forgetless check: exceeded\n\n\\<tuned\\> against base\n")
    assert "| json |" in said and "* refuses harmless: not shown" in said


# The verb


@pytest.fixture
def spoiled(chat_folder, tmp_path):
    """The chat model, made unable to end an answer, merged."""
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
        model.lm_head.weight[END] = 0
    model.save_pretrained(tmp_path / "spoiled")
    return str(tmp_path / "spoiled")


def save_adapter(folder, out, size=0.0):
    torch.manual_seed(3)
    base = load_model(ModelOptions(folder))
    base.config._name_or_path = folder
    model = add_adapter(base, names="all-linear", rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    model.save_pretrained(str(out))
    return str(out)


@pytest.fixture
def run_folder(chat_folder, tmp_path):
    """A run whose adapter changes nothing."""
    save_adapter(chat_folder, tmp_path / "run" / "final")
    return str(tmp_path / "run")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"the cat {x} :", "choices": ["a b", "dog"], "gold": 0} for x in "abcd" * 6]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_run_that_changed_nothing_passes_and_everything_is_written(
    chat_folder, run_folder, questions, tmp_path, capsys
):
    out = tmp_path / "checked"
    words = ["check", chat_folder, run_folder, "--budget", "1%", "--behaviour", "ends=-30%"]
    words += ["--task", "choices=-40%", "--tasks", f"choices={questions}", "--out", str(out)]
    assert main([*words, *FEW]) == 0
    said = capsys.readouterr()
    assert "met: 3 met, 0 not shown, 0 exceeded; passed, exit code 0" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    run = read_record(out / "run.json", Run)
    assert run.verdict == "met" and run.gate.passed
    assert {each.of for each in run.gate.bounds} == {"divergence", "behaviour", "task"}
    assert [each.change for each in run.gate.bounds] == pytest.approx([0, 0, 0], abs=1e-6)
    assert (out / "summary.md").read_text().startswith("### forgetless check: met")
    assert ElementTree.parse(out / "junit.xml").getroot().find("testsuite").get("tests") == "3"
    html = (out / "report.html").read_text()
    assert "The bounds" in html and len(html) < 200_000  # no figure, so no script for figures
    assert page(load_contents(out)).count("own answers") == html.count("own answers")
    assert "| own answers |" in markdown(load_contents(out))
    # The same answers from the file, with nothing sampled, and the same verdict.
    given = str(out / "answers.json")
    again = ["check", chat_folder, run_folder, "--budget", "1%", "--fast", "--own-answers", given]
    assert main([*again, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "met" and told["bounds"][0]["number"] == 12


def test_a_spoiled_model_does_not_pass(chat_folder, spoiled, capsys):
    words = ["check", chat_folder, spoiled, "--budget", "5%", "--behaviour", "ends=-2%"]
    assert main([*words, "--behaviour", "json=-2%", "--behaviour", "length=+10%", *FEW]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "own answers: exceeded: on 12 answers none of the interval keeps the bound of 5%" in said
    assert "json: not shown: on 17 prompts" in said and "not passed, exit code 3" in said
    assert "> 9999 %" in said and "length" in said and "not judged" not in said


def test_what_is_not_shown_passes_unless_strict(chat_folder, run_folder, capsys):
    words = ["check", chat_folder, "--behaviour", "json=-2%", run_folder, *FEW]
    assert main(words) == 0
    assert "passed, exit code 0 (3 with --strict)" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--strict"]) == 3
    assert "not passed, exit code 3 (--strict)" in " ".join(capsys.readouterr().out.split())


def test_python_does_what_the_verb_does(chat_folder, spoiled, tmp_path, capsys):
    few = {"answers": 12, "answer_length": 12, "behaviours": 20}
    run = forgetless.check(
        chat_folder, spoiled, budget="0.2nats", behaviour={"ends": "-2%"}, out=tmp_path / "o", **few
    )
    assert run.gate.verdict == "exceeded" and not run.gate.passed
    assert capsys.readouterr().out == ""
    assert read_record(tmp_path / "o" / "run.json", Run).gate == run.gate
    with pytest.raises(OptionError, match="unknown option 'budgte' of check"):
        forgetless.check(chat_folder, spoiled, budgte="1%")


def test_fast_uses_the_cache_and_leaves_out_what_is_sampled(
    chat_folder, run_folder, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "bounds.yaml"
    file.write_text("budget: 1%\nbehaviours: {ends: -5%}\n")
    words = ["check", chat_folder, run_folder, "--bounds", str(file), "--answers", "12"]
    words += ["--answer-length", "8", "--fast"]
    assert main(words) == 2
    assert "12 of 12 answers of this base are not in the cache" in capsys.readouterr().err
    assert main(["check", chat_folder, run_folder, "--budget", "1%", *words[5:-1]]) == 0
    monkeypatch.setattr(own, "sample", None)
    capsys.readouterr()
    assert main(words) == 0
    assert "not judged: ends (--fast samples nothing)" in capsys.readouterr().out


def test_general_text_is_judged_too(chat_folder, spoiled, text_file, capsys):
    words = ["check", chat_folder, spoiled, "--budget", "5%", "--general", f"chat,{text_file}"]
    assert main([*words, "--json", *FEW]) == 3
    bounds = json.loads(capsys.readouterr().out)["bounds"]
    assert [each["of"] for each in bounds] == ["divergence", "loss"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--behaviour", "tool=-2%"], "cannot be judged: the template shows the model no tools"),
        (["--behaviour", "thinking=-2%"], "cannot be judged: the template has no thinking switch"),
        (["--behaviour", "domain leak=2%"], "give the domain with --data DATA"),
        (
            ["--task", "sciq=-1%", "--tasks", "piqa"],
            "sciq has a bound and is not asked: --tasks na",
        ),
        (["--task", "sciq:f1=-1%"], "task sciq has no accuracy 'f1'; known: acc, acc_norm"),
        (["--tasks", "sciq", "--budget", "1%"], "task sciq is asked and has no bound"),
        (
            ["--behaviour", "json=-2%", "--general", "self"],
            "--general is what a budget is judged on",
        ),
        (["--budget", "1%", "--data", "x"], "--data is what behaviour 'domain leak' looks for"),
        (["--budget", "1%", "--own-answers", "gone.json"], "gone.json: expected a JSON file"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_a_model_is_loaded(
    more, said, chat_folder, run_folder, monkeypatch, capsys
):
    monkeypatch.setattr(gate_check, "load_model", None)
    assert main(["check", chat_folder, run_folder, *more]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_tuned_model_of_another_base_is_refused_before_a_model_is_loaded(
    chat_folder, run_folder, model_folder, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gate_check, "load_model", None)
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    other = save_adapter(str(tmp_path / "gpt2"), tmp_path / "other")
    for tuned, said in (
        (other, "was trained on another model: '" + chat_folder + "' has no layer transformer"),
        (str(tmp_path / "gpt2"), "was tuned from another model: it is of type gpt2 with 48 tokens"),
        (str(tmp_path / "nowhere"), "no tuned model: expected a folder with adapter_config.json"),
        (str(tmp_path), "found neither of them there"),
    ):
        assert main(["check", chat_folder, tuned, "--budget", "1%"]) == 1
        assert said in capsys.readouterr().err
    assert main(["check", chat_folder, run_folder, "--budget", "1%", "--out", run_folder]) == 2
    assert "an input is never written" in capsys.readouterr().err


def test_answers_of_another_base_are_refused(chat_folder, spoiled, run_folder, tmp_path, capsys):
    out = tmp_path / "o"
    words = ["--budget", "1%", "--answers", "12", "--answer-length", "8"]
    assert main(["check", chat_folder, run_folder, *words, "--out", str(out)]) == 0
    stored = json.loads((out / "answers.json").read_text())
    (out / "answers.json").write_text(json.dumps({**stored, "weights": "0"}))
    given = ["--own-answers", str(out / "answers.json")]
    assert main(["check", chat_folder, run_folder, "--budget", "1%", *given]) == 1
    assert "has the answers of another base" in capsys.readouterr().err
    stored["answers"][3]["ids"][0] = 4800
    (out / "answers.json").write_text(json.dumps(stored))
    assert main(["check", chat_folder, run_folder, "--budget", "1%", *given]) == 1
    assert "answer 3 is not of the 48 tokens of this model" in capsys.readouterr().err
