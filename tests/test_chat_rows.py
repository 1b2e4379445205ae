"""Chats as people have them: tools, ShareGPT, Alpaca, and templates that leave out a turn."""

import json
import logging

import pytest

from chat_rows import TOOLS, asked, bytes_tokenizer, call, lines, scored_text, templates
from forgetless.data.chats import Chat
from forgetless.data.documents import load_documents
from forgetless.data.domain import encode_rows, load_training_data, row_answers, row_text
from forgetless.data.encoding import encode_chat, encode_documents
from forgetless.data.prompts.prompts import from_rows

# Families of the templates that TRL ships which write tool calls with tools.
WITH_TOOLS = ("deepseekv3", "diffusion", "gemma4", "glm4moe", "gptoss", "lfm2_2", "lfm2_v2")
WITH_TOOLS += ("llama3_1", "llama3_2", "muse", "nemotron", "qwen2_5", "qwen3")
# Templates that want the text of a turn in a list of parts, which TRL's trainer leaves out.
IN_PARTS = ("idefics3", "smolvlm", "llava_next")
CHATS = {
    "plain": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    "empty": asked(""),
    "null": asked(None),
    "several": asked(None, several=True),
    "thought": asked("", reasoning_content="Ulm, so"),
    "text": asked("Let me see."),
}


def by_trl(tokenizer, messages, tools):
    """(token ids, mask) as SFTTrainer._prepare_dataset tokenises a row; None where it fails."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.data_utils import _tokenize

    template = tokenizer.chat_template
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            template = None
    how = {"chat_template": template, "tools": tools}
    try:
        row = _tokenize(tokenizer, messages, return_assistant_tokens_mask=bool(template), **how)
    except Exception:
        return None
    return list(row["input_ids"]), row.get("assistant_masks")


@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_tokenised_as_trl_does_by_each_template_that_it_ships(kind):
    tokenizer, messages = bytes_tokenizer(), CHATS[kind]
    tools = None if kind == "plain" else TOOLS
    written = set()
    for name, template in templates().items():
        tokenizer.chat_template = template
        theirs = by_trl(tokenizer, messages, tools)
        try:
            ids, scored = encode_chat(Chat(messages, tools), tokenizer)
        except ValueError:
            # TRL fails too, or knows no mask, or leaves out the call or the text beside it.
            said = tokenizer.decode(theirs[0]).partition("weather in Ulm?")[2] if theirs else ""
            unmasked = theirs is None or theirs[1] is None
            assert kind != "plain", name
            assert unmasked or "Ulm" not in said or "Let me" not in said, name
            continue
        written.add(name)
        if theirs and not name.startswith(IN_PARTS):
            assert ids == theirs[0], name
            assert theirs[1] is None or scored == [bool(bit) for bit in theirs[1]], name
    families = {name for name in templates() if name.startswith(WITH_TOOLS)}
    families -= {name for name in families if "qwen2_5_vl" in name}
    if kind in ("empty", "null", "thought"):
        assert written == families
    assert kind != "plain" or written == set(templates())


def test_rows_with_tools_are_those_of_trls_trainer(tiny, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = bytes_tokenizer(templates()["qwen2_5"])
    row = {"messages": asked(), "tools": json.dumps(TOOLS)}
    theirs = SFTTrainer(
        model=tiny(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_length=4000,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            assistant_only_loss=True,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    ).train_dataset[0]
    data = load_training_data(lines(tmp_path / "a.jsonl", [row]))
    ids, scored = encode_rows(data, tokenizer)[0]
    assert ids == list(theirs["input_ids"])
    labels = [i if counts else -100 for i, counts in zip(ids, scored, strict=True)]
    assert labels == list(theirs["labels"])


def test_what_is_scored_is_what_the_file_says_without_other_rows_arguments(tmp_path):
    """Case 01: in one table of Arrow each call gets the arguments of the others as nulls."""
    tokenizer = bytes_tokenizer(templates()["qwen2_5"])
    chat = lambda name, **arguments: [
        {"role": "user", "content": "do it"},
        {"role": "assistant", "content": "", "tool_calls": [call(name, arguments)]},
    ]
    rows = [
        {"messages": chat("weather", city="Ulm"), "tools": TOOLS},
        {"messages": chat("add", a=2, b=None), "tools": TOOLS},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    data = load_training_data(path)
    for encoded, row in zip(encode_rows(data, tokenizer), rows, strict=True):
        function = row["messages"][1]["tool_calls"][0]["function"]
        assert json.dumps(function) in scored_text(tokenizer, encoded)
        assert '"description": "The town"' in tokenizer.decode(encoded[0])
    documents = load_documents(path)
    assert encode_documents(documents, tokenizer) == encode_rows(data, tokenizer)
    assert "Ulm" in row_text(data[0]) and row_answers(data[0]) == [
        json.dumps(rows[0]["messages"][1]["tool_calls"][0]["function"])
    ]


def test_spellings_of_the_same_chat_become_one(tmp_path):
    """JSON text where a list or a mapping is meant, bare calls, and what OpenAI wrote in 2023."""
    messages = asked(None)
    text = asked(None)
    text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Ulm", "days": 3}'
    text[1]["name"] = None
    bare = asked(None)
    bare[1]["tool_calls"] = [bare[1]["tool_calls"][0]["function"]]
    old = asked(None)
    old[1]["function_call"] = old[1].pop("tool_calls")[0]["function"]
    old[2]["role"] = "function"
    parts = asked(None)
    parts[0]["content"] = [
        {"type": "text", "text": "weather in "},
        {"type": "text", "text": "Ulm?"},
    ]
    rows = [
        {"messages": messages, "tools": TOOLS},
        {"messages": json.dumps(messages), "tools": json.dumps(TOOLS)},
        *({"messages": other, "tools": TOOLS} for other in (text, bare, old, parts)),
    ]
    data = load_training_data(lines(tmp_path / "a.jsonl", rows))
    first, *others = encode_rows(data, bytes_tokenizer(templates()["qwen3"]))
    assert all(encoded == first for encoded in others)


PLAIN_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_turn_that_the_template_leaves_out_is_refused_with_its_row(tmp_path):
    """Case 02: the model would learn to answer with nothing."""
    tokenizer = bytes_tokenizer(PLAIN_TEMPLATE)
    rows = [{"messages": CHATS["plain"]}, {"messages": asked(), "tools": TOOLS}]
    data = load_training_data(lines(tmp_path / "a.jsonl", rows))
    missing = r"a\.jsonl', row 2: the chat template leaves out what turn 2 \(assistant\) calls \(we"
    with pytest.raises(ValueError, match=missing):
        encode_rows(data, tokenizer)
    with pytest.raises(
        ValueError, match=r"the chat that begins 'weather in Ulm\?': the chat templ"
    ):
        encode_documents(load_documents(str(tmp_path / "a.jsonl")), tokenizer)
    silent = PLAIN_TEMPLATE.replace("{{ m['content'] }}", "{{ m['text'] }}")
    with pytest.raises(ValueError, match=r"row 1: .* leaves out what turn 1 \(user\) says"):
        encode_rows(data, bytes_tokenizer(silent))
    none = [{"messages": asked(None)}]
    with pytest.raises(ValueError, match=r"row 1: the chat template leaves out"):
        encode_rows(none, tokenizer)


def test_what_a_template_raises_has_the_row(tmp_path):
    template = "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}"
    data = load_training_data(
        lines(tmp_path / "a.jsonl", [{"messages": CHATS["plain"]}, {"messages": asked()}])
    )
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses the chat \(two turns"):
        encode_rows(data, bytes_tokenizer(template + PLAIN_TEMPLATE))


@pytest.mark.parametrize(
    ("calls", "written"),
    [
        # A template that joins arguments as text, as DeepSeek's, and one that prints a mapping.
        ("{{ c['name'] + c['arguments'] }}", 'weather{"city": "Ulm", "days": 3}'),
        ("{{ c['name'] }}{{ c['arguments'] }}", 'weather{"city": "Ulm", "days": 3}'),
    ],
)
def test_templates_that_want_arguments_as_text_get_text(calls, written):
    loop = "{% for t in m['tool_calls'] %}{% set c = t['function'] %}" + calls + "{% endfor %}"
    template = PLAIN_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}" + loop)
    tokenizer = bytes_tokenizer(template)
    for content in ("", None):
        ids, _ = encode_chat(Chat(asked(content)), tokenizer)
        assert written in tokenizer.decode(ids) and "None" not in tokenizer.decode(ids)


def test_what_was_thought_and_left_out_is_said(caplog):
    tokenizer = bytes_tokenizer(templates()["qwen2_5"])
    rows = [{"messages": asked("", reasoning_content="Ulm, so"), "tools": TOOLS}]
    encode_rows(rows, tokenizer)
    assert "leaves out what the assistant thought in 1 turns" in caplog.text
    caplog.clear()
    tokenizer.chat_template = templates()["qwen3"]
    encode_rows(rows, tokenizer)
    assert caplog.text == ""
    tokenizer.chat_template = PLAIN_TEMPLATE
    encode_rows([{"messages": CHATS["plain"], "tools": TOOLS}], tokenizer)
    assert "shows the model no tools, which the rows have" in caplog.text


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be kind."}]])
def test_a_chat_that_begins_with_the_assistant_is_scored_from_its_words_on(system):
    """The system prompt, which the template adds by itself, is not."""
    template = "{% if messages[0]['role'] != 'system' %}<system>Be kind.\n{% endif %}"
    tokenizer = bytes_tokenizer(template + PLAIN_TEMPLATE)
    chat = [*system, {"role": "assistant", "content": "Hello."}, *asked()[:1]]
    assert scored_text(tokenizer, encode_chat(chat, tokenizer)) == "Hello.\n"
    # Templates without words that open an answer: from where another answer would differ.
    tokenizer.chat_template = (template + PLAIN_TEMPLATE).partition("{% if add_gen")[0]
    assert scored_text(tokenizer, encode_chat(chat, tokenizer)) == "Hello.\n"


def test_chats_as_prompt_and_completion_are_trls(tmp_path):
    """The completion alone is scored, from where it differs from the prompt for it."""
    tokenizer = bytes_tokenizer(PLAIN_TEMPLATE)
    chat = [*CHATS["plain"], *asked()[:1], {"role": "assistant", "content": "Rain."}]
    row = {"prompt": chat[:3], "completion": chat[3:]}
    data = load_training_data(lines(tmp_path / "a.jsonl", [row]))
    encoded = encode_rows(data, tokenizer)[0]
    assert scored_text(tokenizer, encoded) == "Rain.\n"
    assert "Hello." in tokenizer.decode(encoded[0])
    again = load_training_data(lines(tmp_path / "b.jsonl", list(data)))
    assert encode_rows(again, tokenizer)[0] == encoded and row_answers(data[0]) == ["Rain."]


def test_share_gpt_is_read_as_it_is(tmp_path):
    function = {"name": "weather", "arguments": {"city": "Ulm", "days": 3}}
    said = [
        {"from": "human", "value": "weather in Ulm?"},
        {"from": "function_call", "value": json.dumps(function)},
        {"from": "observation", "value": '{"rain": true}'},
        {"from": "gpt", "value": "It rains."},
    ]
    bare = [tool["function"] for tool in TOOLS]
    rows = [
        {"conversations": said, "tools": json.dumps(bare), "system": "Be kind."},
        {"conversations": [{"from": "system", "value": "Be kind."}, *said], "tools": bare},
        {"conversations": json.dumps(said), "tools": "", "system": ""},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    first, second, third = load_training_data(path)
    assert first == second and first["tools"] == TOOLS
    calls = [{"type": "function", "function": function}]
    assert third == {
        "messages": [
            {"role": "user", "content": "weather in Ulm?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": '{"rain": true}'},
            {"role": "assistant", "content": "It rains."},
        ]
    }
    assert [document.messages for document in load_documents(path)][2] == third["messages"]
    for turn, expected in [
        ({"from": "narrator", "value": "x"}, "row 1: a turn is from 'narrator'; known: human"),
        (
            {"from": "function_call", "value": "weather()"},
            "row 1: expected a function call as JSON",
        ),
        ({"from": "gpt", "value": None}, "row 1: expected chat turns"),
    ]:
        with pytest.raises(ValueError, match=expected):
            load_training_data(lines(tmp_path / "b.jsonl", [{"conversations": [turn]}]))


def test_prompts_may_be_share_gpt_with_tools_as_text():
    row = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    (prompt,) = from_rows([row | {"tools": json.dumps(TOOLS)}], "a.jsonl")
    assert prompt.messages == ({"role": "user", "content": "x"},) and prompt.tools == tuple(TOOLS)


def test_alpaca_is_read_as_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="forgetless")
    rows = [
        {"instruction": "Add.", "input": "2 3", "output": "5", "system": "Be kind.", "id": 7},
        {"instruction": "Hi", "input": "", "output": "Hello.", "history": [["a", "b"]]},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    turns = [
        [(turn["role"], turn["content"]) for turn in row["messages"]]
        for row in load_training_data(path)
    ]
    assert turns == [
        [("system", "Be kind."), ("user", "Add.\n2 3"), ("assistant", "5")],
        [("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Hello.")],
    ]
    assert "a.jsonl': not read: id" in caplog.text
    with pytest.raises(ValueError, match="row 1: instruction and output must not be empty"):
        load_training_data(lines(tmp_path / "b.jsonl", [{"instruction": "x", "output": " "}]))


def test_columns_of_other_names(tmp_path):
    rows = [{"question": "Q?", "answer": " yes", "text": "other"}]
    path = lines(tmp_path / "a.jsonl", rows)
    data = load_training_data(path, columns="prompt=question, completion=answer")
    assert list(data) == [{"prompt": "Q?", "completion": " yes"}]
    dialog = lines(tmp_path / "b.jsonl", [{"dialog": CHATS["plain"], "text": "other"}])
    assert load_training_data(dialog, columns="messages=dialog")[0]["messages"] == CHATS["plain"]
    with pytest.raises(ValueError, match="row 1: --columns names 'answr', found the columns quest"):
        load_training_data(path, columns="prompt=question,completion=answr")
    with pytest.raises(ValueError, match=r"unknown column 'promt'; did you mean 'prompt'\?"):
        load_training_data(path, columns="promt=question")
    with pytest.raises(ValueError, match="expects one name of yours for each"):
        load_training_data(path, columns="prompt")
