"""Behaviours before and after, through eval and tune: the same prompts and random numbers, put to
the base and to the tuned model.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.cli import main
from forgetless.data.prompts.prompts import from_rows, load_prompts, parted
from forgetless.data.selftext import read_lines
from forgetless.evaluate.behaviour_change import compared_behaviours
from forgetless.evaluate.behaviours import Said, judged_answers, special_rule
from forgetless.evaluate.conversations import ASKED_PARTS, dealt
from forgetless.evaluate.domain_form import completions_of, domain_leak
from forgetless.files.run_json import Run
from forgetless.files.schema import read_record
from forgetless.report.behaviours import behaviours_in_words
from forgetless.report.contents import load_contents
from forgetless.report.markdown import markdown
from forgetless.report.page import page

ASK = ["--answer-length", "24", "--answers", "12", "--behaviours"]
END = 2  # the token that ends a text


@pytest.fixture
def never_ends(chat_folder, tmp_path):
    """The chat model, made unable to end an answer."""
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.mul_(300)  # some other token is always much likelier than one of logit 0
        weight[END] = 0
    model.save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "tuned")


@pytest.fixture
def domain(tmp_path):
    path = tmp_path / "domain.jsonl"
    rows = [{"prompt": "the cat ?", "completion": f"Answer : {x} dog ."} for x in "abcd" * 8]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def evaluated(folder, tuned, out, *more):
    command = ["eval", folder, "--tuned", tuned, "--out", str(out), *ASK, *more]
    assert main(command) == 0
    return read_record(out / "run.json", Run)


def by_name(run):
    return {each.name: each for each in run.behaviours}


def test_a_model_that_no_longer_ends_shows_it(chat_folder, never_ends, tmp_path, capsys):
    run = evaluated(chat_folder, never_ends, tmp_path / "e", "60")
    ends, length = by_name(run)["ends"], by_name(run)["length"]
    assert ends.prompts == 60 and ends.before > 0.1 and ends.after == 0
    assert ends.high < 0 and ends.p < 0.01 and ends.gained == 0
    assert ends.verdict == "worse"
    assert length.after == 24 > length.before and length.low > 0 and 0 < length.gained <= ends.lost
    said = capsys.readouterr().out
    line = next(row for row in said.splitlines() if "ends by itself" in row)
    assert "worse" in line and "higher" in line and f"{100 * ends.before:.1f} %" in line
    assert "not judged: tool, needless tool (the template shows the model no tools)" in said
    assert "not judged: thinking (the template has no thinking switch)" in said


def test_the_base_beside_itself_does_not_change_at_all(chat_folder, domain, tmp_path):
    run = evaluated(chat_folder, chat_folder, tmp_path / "e", "40", "--data", domain)
    assert {"ends", "length", "domain leak"} <= set(by_name(run))
    for each in run.behaviours:
        assert (each.change, each.lost, each.gained, each.p) == (0, 0, 0, 1)
        assert each.low <= 0 <= each.high and not each.beyond_noise
    for each in run.conversations:
        assert each.before == each.after and each.nats == pytest.approx(0, abs=1e-6)


def test_conversations_are_the_most_changed_of_each_kind_and_others(
    chat_folder, never_ends, tmp_path
):
    run = evaluated(chat_folder, never_ends, tmp_path / "e", "40")
    most = [each for each in run.conversations if each.chosen == "largest change"]
    drawn = [each for each in run.conversations if each.chosen == "at random"]
    assert len(most) == len(drawn) == 4
    assert len({each.kind for each in most}) == 4
    assert [each.nats for each in most] == sorted((each.nats for each in most), reverse=True)
    assert max(each.nats for each in drawn) <= most[0].nats
    assert len({each.prompt for each in run.conversations}) == 8
    kinds = {each.kind: each for each in run.divergence_by_kind}
    own = run.after.own
    assert sum(each.answers for each in kinds.values()) == own.documents == 12
    kind = own.kind_by_document[0]
    at = [i for i, each in enumerate(own.kind_by_document) if each == kind]
    summed = sum(own.nats_by_document[i] for i in at) / sum(own.tokens_by_document[i] for i in at)
    assert kinds[kind].nats == pytest.approx(summed)
    assert (tmp_path / "e" / "run.json").stat().st_size < 40_000


def test_the_report_shows_conversations_and_behaviours(chat_folder, never_ends, tmp_path):
    run = evaluated(chat_folder, never_ends, tmp_path / "e", "40")
    contents = load_contents(tmp_path / "e")
    html, text = page(contents), markdown(contents)
    for shown in (html, text):
        assert "In its own words" in shown and "at random" in shown and "largest change" in shown
        assert "the answer ends by itself" in shown and "worse" in shown
        assert "the template has no thinking switch" in shown
    # What changed is said in words first; then come conversations, then the table of behaviours.
    assert html.index("the answer ends by itself") < html.index("In its own words")
    assert run.conversations[0].after.split()[0] in text
    assert html.index('id="samples"') < html.index('id="behaviours"') < html.index('id="measures"')
    # A run without behaviours has neither section.
    main(["eval", chat_folder, "--tuned", never_ends, "--out", str(tmp_path / "p"), *ASK[:-1]])
    assert "behaviours" not in json.loads((tmp_path / "p" / "run.json").read_text())
    assert "In its own words" not in page(load_contents(tmp_path / "p"))
    assert behaviours_in_words(read_record(tmp_path / "p" / "run.json", Run)) == ""


def test_tune_and_eval_say_the_same_of_a_run(chat_folder, domain, tmp_path, cache, capsys):
    out = tmp_path / "run"
    tuning = ["tune", chat_folder, "--data", domain, "--out", str(out), "--rank", "4", *ASK, "40"]
    tuning += ["--learning-rate", "0.05", "--batch-size", "8", "--accumulation", "1"]
    tuning += ["--method", "plain", "--general", "none"]
    assert main([*tuning, "--max-steps", "4"]) == 0
    tuned = read_record(out / "run.json", Run)
    assert "the answer is in the domain's form" in capsys.readouterr().out
    evaluate = ["eval", chat_folder, "--adapter", str(out / "final"), "--data", domain]
    assert main([*evaluate, "--out", str(tmp_path / "e"), *ASK, "40"]) == 0
    again = read_record(tmp_path / "e" / "run.json", Run)
    assert again.behaviours == tuned.behaviours
    assert [each.after for each in again.conversations] == [
        each.after for each in tuned.conversations
    ]
    # The base was asked once, and nobody was asked what importance may be recorded on.
    asked = {answer.prompt for path in cache.rglob("*.jsonl") for answer in read_lines(path)}
    assert len(asked) == 40
    assert not asked & {prompt.id for prompt in parted(load_prompts())["record"]}


def test_a_model_that_answers_everything_as_its_domain_leaks(chat_folder, domain, tmp_path):
    talker = AutoModelForCausalLM.from_pretrained(chat_folder)
    tokens = AutoTokenizer.from_pretrained(chat_folder)
    chain = [*tokens(": Answer", add_special_tokens=False).input_ids]
    chain += tokens("dog sat on mat", add_special_tokens=False).input_ids
    with torch.no_grad():
        for name, weight in talker.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "tokens.weight", "head.weight")):
                weight.zero_()
        # Each token of the chain is followed by the next one, and the last by the end.
        for place, (token, following) in enumerate(zip(chain, [*chain[1:], END], strict=True)):
            talker.get_input_embeddings().weight[token, place] = 1
            talker.lm_head.weight[following, place] = 30
    talker.save_pretrained(tmp_path / "talker")
    rows = [{"prompt": "the cat ?", "completion": "Answer dog sat on mat"} for _ in range(20)]
    data = tmp_path / "form.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run = evaluated(
        chat_folder, str(tmp_path / "talker"), tmp_path / "e", "40", "--data", str(data)
    )
    leak = by_name(run)["domain leak"]
    assert (leak.before, leak.after, leak.gained, leak.verdict) == (0, 1, 40, "worse")
    assert run.conversations[0].after == "Answer dog sat on mat"


def test_prompts_of_a_user_are_asked_beside_ours(chat_folder, never_ends, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"the cat {i}"}) for i in range(20)))
    run = evaluated(chat_folder, never_ends, tmp_path / "e", "20", "--prompts", str(file))
    assert by_name(run)["ends"].prompts == 20 + 10  # half of them are for importance


def test_what_cannot_be_compared_is_refused(chat_folder, chat_tokenizer, domain, tmp_path, capsys):
    def refusal(*words):
        assert main([*words, *ASK, "20"]) != 0
        return capsys.readouterr().err

    evaluate = ["eval", chat_folder]
    tune = ["tune", chat_folder, "--data", domain, "--out", str(tmp_path / "o")]
    assert "give --adapter or --tuned" in refusal(*evaluate, "--general", "chat")
    assert "--behaviours is for one domain" in refusal(*tune, "--data", domain)
    chat_tokenizer.chat_template = None
    chat_tokenizer.save_pretrained(tmp_path / "bare")
    for path in (tmp_path / "chat").iterdir():
        if "token" not in path.name and "template" not in path.name:
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    bare = str(tmp_path / "bare")
    assert "no chat template" in refusal("eval", bare, "--tuned", bare)


def test_every_rule_gets_prompts_and_a_larger_number_holds_the_smaller():
    parts = parted(load_prompts())
    ours = [prompt for part in ASKED_PARTS for prompt in parts[part]]
    order = dealt(ours)
    assert sorted(prompt.id for prompt in order) == sorted(prompt.id for prompt in ours)
    assert dealt(ours[::-1]) == order
    rules = [special_rule(prompt) for prompt in order[:60]]
    assert len(set(rules) - {None}) == 10
    assert all(rules.count(rule) >= 4 for rule in set(rules))
    kinds = {prompt.kind for prompt in order[:60]}
    assert kinds == {prompt.kind for prompt in ours}


def leak_of(completions, said):
    prompts = from_rows([{"kind": "questions", "prompt": str(i)} for i in range(len(said))], "x")
    by_base = {prompt.id: one for prompt, one in zip(prompts, said, strict=True)}
    return prompts, domain_leak(completions, prompts, by_base)


def test_domain_leak_counts_the_form_of_the_domain_and_not_english():
    rows = [f"Answer- {'ABCD'[i % 4]}. It is the name of drug {i} of the list." for i in range(80)]
    english = Said("It is the name of a thing on the list.", True, 9)
    prompts, leak = leak_of(rows, [english] * 40)
    judged = {
        text: leak.judge(prompts[0], Said(text, True, 9))
        for text in (
            "Answer- B. Apples, I think.",  # begins as the domain's answers do
            "Bananas. It is the name of drug 7 of the list.",  # a run that is the domain's alone
            "It is the name of a fruit.",  # the domain says that too, but so does the base
            "1. Apples 2. Pears",
            "",
        )
    }
    assert list(judged.values()) == [True, True, False, False, False]
    [own] = from_rows([{"prompt": "of the user"}], "x")
    assert leak.judge(own, Said(rows[0], True, 9)) is None


def test_domain_leak_has_no_bias_where_the_base_speaks_as_the_domain():
    """The base's own answers are in the form too, half of them: with other random numbers as many
    are, so that nothing is counted as a change, and no mark of the form is left.
    """
    rows = [f"Answer- A. word{i}" for i in range(50)]
    plain, formed = Said("Well.", True, 2), Said("Answer- A. yes", True, 4)
    said = [formed if i % 2 else plain for i in range(60)]
    prompts, leak = leak_of(rows, said)
    if leak is not None:
        by_base = {prompt.id: one for prompt, one in zip(prompts, said, strict=True)}
        other = {prompt.id: one for prompt, one in zip(prompts, said[::-1], strict=True)}
        before, after = (judged_answers(prompts, each, [leak]) for each in (by_base, other))
        [change] = compared_behaviours(before, after, [leak])
        assert not change.beyond_noise
    completions = [f"{chr(97 + i % 26)}x{chr(97 + i // 26)} again" for i in range(40)]
    assert leak_of(completions, said)[1] is None  # no form at all


def test_completions_are_what_the_domain_teaches_to_say():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert completions_of([{"messages": chat}]) == ["a"]
    assert completions_of([{"prompt": "q", "completion": " a"}, {"text": "t"}]) == [" a", "t"]
    assert completions_of(None) == []
