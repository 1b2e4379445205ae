"""Behaviours of chat models are judged by stated rules, and compared answer by answer."""

import pytest
from scipy.stats import binomtest

from forgetless.data.prompts.prompts import from_rows, load_prompts
from forgetless.errors import FileError
from forgetless.evaluate.behaviour_change import (
    compared_behaviours,
    mcnemar,
    paired_interval,
)
from forgetless.evaluate.behaviours import BEHAVIOURS, Said, judged_answers
from forgetless.evaluate.language import language_of

RULES = {behaviour.name: behaviour.judge for behaviour in BEHAVIOURS}
WEATHER = {
    "function": {
        "name": "get_weather",
        "parameters": {"properties": {"city": {}, "unit": {}}, "required": ["city"]},
    }
}
NEEDED = {"tools": [WEATHER], "expects": {"call": "get_weather"}}
NOT_NEEDED = {"tools": [WEATHER], "expects": {"no_call": True}}
AS_JSON = {"kind": "json", "expects": {"json": ["a"]}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>'


def judged(rule, text, *, ended=True, **row):
    [prompt, *_] = from_rows([{"prompt": "x", **row}], "rows")
    return RULES[rule](prompt, Said(text, ended, len(text.split())))


@pytest.mark.parametrize(
    ("rule", "text", "row", "expected"),
    [
        ("json", '{"a": 1, "b": 2}', AS_JSON, True),
        (
            "json",
            'Sure:\n```json\n{"a": 1}\n```',
            AS_JSON,
            True,
        ),
        ("json", '{"a": 1,}', AS_JSON, False),
        ("json", '{"b": 1}', AS_JSON, False),
        ("json", "anything", {"kind": "questions"}, None),
        ("code", "```python\ndef f(x):\n    return x\n```", {"expects": {"code": "python"}}, True),
        ("code", "```python\ndef f(x)\n```", {"expects": {"code": "python"}}, False),
        ("code", "Answer- A. A function is a thing.", {"expects": {"code": "python"}}, False),
        ("arithmetic", "17 + 26 = **43**.", {"expects": {"answer": "43"}}, True),
        ("arithmetic", "It is 1,024.", {"expects": {"answer": "1024"}}, True),
        ("arithmetic", "43 or rather 44", {"expects": {"answer": "43"}}, False),
        ("arithmetic", "That is a Saturday.", {"expects": {"answer": "Saturday"}}, True),
        ("arithmetic", "At 22:00.", {"expects": {"answer": "22:00"}}, True),
        ("arithmetic", "13/4", {"expects": {"answer": "3/4"}}, False),
        (
            "tool",
            CALL % '{"city": "Oslo"}',
            NEEDED,
            True,
        ),
        (
            "tool",
            CALL % '{"unit": "celsius"}',
            NEEDED,
            False,
        ),
        (
            "tool",
            CALL % '{"city": "Oslo", "day": 1}',
            NEEDED,
            False,
        ),
        ("tool", "It is sunny.", NEEDED, False),
        (
            "needless tool",
            CALL % '{"city": "Oslo"}',
            NOT_NEEDED,
            True,
        ),
        (
            "needless tool",
            "Rain falls {from} clouds.",
            NOT_NEEDED,
            False,
        ),
        ("system", "OSLO, OF COURSE.", {"kind": "system", "expects": {"uppercase": True}}, True),
        ("system", "Oslo.", {"kind": "system", "expects": {"uppercase": True}}, False),
        ("system", "It is far. OVER.", {"kind": "system", "expects": {"ends_with": "OVER"}}, True),
        ("system", "- a\n- b", {"kind": "system", "expects": {"lines_start": "- "}}, True),
        ("system", "Paris is far away", {"kind": "system", "expects": {"max_words": 3}}, False),
        ("system", "marmalade", {"kind": "system", "expects": {"lacks": "marmalade"}}, False),
        ("system", "anything", {"kind": "system", "expects": {}}, None),
        ("thinking", "<think>hm</think>5", {"thinking": True}, True),
        ("thinking", "hm</think>5", {"thinking": True}, True),
        ("thinking", "<think>hm", {"thinking": True}, False),
        ("refuses harm", "I'm sorry, but I can't help with that.", {"kind": "refusing"}, True),
        ("refuses harm", "First, find a ladder.", {"kind": "refusing"}, False),
        ("refuses harmless", "I cannot help you kill anything.", {"kind": "harmless"}, True),
        ("repeats", "a b c d " * 9, {}, True),
        ("repeats", "one two three", {}, None),
    ],
)
def test_rules(rule, text, row, expected):
    assert judged(rule, text, **row) is expected


def test_the_thinking_switch_off_wants_no_thinking():
    _, off = from_rows([{"prompt": "x", "thinking": True}], "rows")
    rule = RULES["thinking"]
    assert rule(off, Said("5", True, 1)) and rule(off, Said("<think>\n\n</think>5", True, 3))
    assert not rule(off, Said("<think>well</think>5", True, 3))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Der Unterschied ist, dass das Wetter sich schnell ändert.", "de"),
        ("La capitale est Ottawa, dans la province de l'Ontario.", "fr"),
        ("El cielo es azul por la luz que llega del Sol.", "es"),
        ("Il cielo è azzurro per la luce che arriva dal Sole.", "it"),
        ("O céu é azul por causa da luz, que não chega toda.", "pt"),
        ("De zee is zout omdat het water zout uit de bodem meeneemt.", "nl"),
        ("Niebo jest niebieskie, bo światło się rozprasza na cząstkach.", "pl"),
        ("Himlen är blå för att ljuset sprids i luften och det syns.", "sv"),
        ("Gökyüzü mavi, çünkü ışık bir çok kez saçılır ve bu böyle.", "tr"),
        ("Небо голубое, потому что свет рассеивается и это видно.", "ru"),
        ("Небо блакитне, тому що світло розсіюється і це видно, як і вода.", "uk"),
        ("天空是蓝色的，因为光在空气中散射。", "zh"),
        ("空が青いのは、光が空気で散乱するからです。", "ja"),
        ("하늘은 빛이 흩어지기 때문에 파랗습니다.", "ko"),
        ("السماء زرقاء لأن الضوء يتشتت.", "ar"),
        ("आसमान नीला है क्योंकि प्रकाश बिखरता है।", "hi"),
        ("The sky is blue because of the light.", "en"),
    ],
)
def test_languages_of_the_prompts_are_told_apart(text, expected):
    among = "en de fr es it pt nl pl sv tr ru uk zh ja ko ar hi".split()
    assert language_of(text, among) == expected


def test_every_rule_applies_to_prompts_of_ours():
    prompts = load_prompts()
    said = {
        prompt.id: Said("Well, this is an answer of a few words. " * 3, True, 27)
        for prompt in prompts
    }
    counted = judged_answers(prompts, said)
    assert set(counted) == set(RULES) and all(len(judged) >= 20 for judged in counted.values())


def test_changes_are_paired_and_have_intervals():
    before = {"ends": {str(i): i % 2 == 0 for i in range(60)}}
    after = {"ends": {str(i): i % 2 == 0 and i > 23 for i in range(60)} | {"other": True}}
    [change] = compared_behaviours(before, after, BEHAVIOURS)
    assert (change.prompts, change.lost, change.gained) == (60, 12, 0)
    assert change.before == 0.5 and change.change == pytest.approx(-0.2)
    assert change.low < -0.2 < change.high < 0 and change.p == mcnemar(12, 0) < 0.001
    low, high = paired_interval(0, 0, 60)
    assert low < 0 < high  # nothing changed, but 60 answers don't show that nothing will


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 3), (1, 7), (9, 2)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, expected))


@pytest.mark.parametrize(
    "row",
    [
        {"language": ["de"]},
        {"expects": ["json"]},
        {"expects": {"max_words": "3"}},
        {"expects": {"json": 5}},
        {"expects": {"json": [["a"]]}},
        {"expects": {"answer": 12}},
        {"expects": {"lines_start": None}},
        {"expects": {"no_call": "yes"}},
    ],
)
def test_what_no_answer_can_be_judged_by_is_refused(row):
    with pytest.raises(FileError, match=r"prompts\.jsonl, row 1: '(language|expects)"):
        from_rows([{"prompt": "one ?", **row}], "prompts.jsonl")


def test_answers_and_schemas_of_any_form_are_judged():
    deep = ["[" * 9000, '{"a":' * 9000, "-" * 9000 + "1", "(" * 9000, "1.2.3"]
    tools = [{"function": "f"}, {"function": {"name": "g", "parameters": [1]}}, {"name": "g"}]
    tools.append({"name": "f", "parameters": {"required": [["a"]], "properties": None}})
    wanted = {"json": ["a"], "code": "python", "answer": "1.2.3", "call": "f", "no_call": True}
    for kind in ("json", "system", "tools"):
        row = {"prompt": "one ?", "kind": kind, "tools": tools, "expects": wanted}
        [prompt] = from_rows([row], "prompts.jsonl")
        calls = ['{"name": "f", "arguments": {}}', '{"name": "g", "arguments": "[["}']
        for text in (*deep, *calls):
            for behaviour in BEHAVIOURS:
                behaviour.judge(prompt, Said(text, True, 9))
