"""Text and tasks in: files of every kind, broken input, chats, named tasks."""

import json
import re

import pytest

from conftest import PLAIN
from forgetless.data.documents import load_documents, load_rows
from forgetless.data.domain import encode_rows, load_training_data, truncation_report
from forgetless.data.encoding import (
    batches,
    encode_chat,
    encode_documents,
    encode_prompted,
    text_ids,
)
from forgetless.data.tasks import TASKS, load_task
from forgetless.errors import OptionError


def test_every_file_kind_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    texts = ["One two.", 'Three, "four"\nfive.']
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in texts]))
    (tmp_path / "a.csv").write_text('text\nOne two.\n"Three, ""four""\nfive."\n')
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "json", "csv", "parquet"):
        assert [d.text for d in load_documents(str(tmp_path / f"a.{kind}"))] == texts, kind


def test_broken_empty_and_foreign_files_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "brok\n')
    with pytest.raises(ValueError, match=r"a\.jsonl', line 2: not valid JSON"):
        load_rows(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        load_rows(str(path))
    path.write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(
        ValueError, match="has the columns body, id; expected text or content or messages"
    ):
        load_documents(str(path))
    with pytest.raises(
        ValueError, match="columns body, id; expected text, or prompt and completion"
    ):
        load_training_data(str(path))
    assert load_documents(str(path), column="body")[0].text == "x"
    path.write_text('{"text": "x"}\n{"text": ""}\n')
    with pytest.raises(ValueError, match="row 2"):
        load_documents(str(path))


def test_a_dataset_that_is_not_there_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither a local file nor a dataset that can be loaded"):
        load_rows("nobody/nothing-here")


def test_pieces_and_padding(tokenizer):
    from forgetless.data.documents import Document

    encoded = encode_documents(
        [
            Document("the cat sat on the mat and then the dog sat too", None, "x"),
            Document("the cat", None, "x"),
        ],
        tokenizer,
        length=4,
    )
    assert all(2 <= len(ids) <= 4 for ids, _ in encoded)
    for batch in batches(encoded, batch_size=3, pad_id=0, shuffle_seed=1):
        padding = batch["attention_mask"] == 0
        assert (batch["labels"][padding] == -100).all() and (
            batch["labels"][~padding] == batch["input_ids"][~padding]
        ).all()


def test_chats_score_assistant_turns_only(tokenizer):
    from forgetless.data.documents import Document

    chat = Document(
        None,
        [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "sat on the mat"},
        ],
        "x",
    )
    with pytest.raises(ValueError, match="no chat template"):
        encode_documents([chat], tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' . "
        "' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' "
        "}}{% endif %}"
    )
    ids, scored = encode_documents([chat], tokenizer)[0]
    said = tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s])
    assert said.replace(" ", "").startswith("satonthemat") and "user" not in said


ROWS = {
    "sciq": {
        "question": "Q?",
        "correct_answer": "yes",
        "distractor1": "a",
        "distractor2": "b",
        "distractor3": "c",
        "support": "S.",
    },
    "piqa": {"goal": "open a jar", "sol1": "twist", "sol2": "cry", "label": 0},
    "medmcqa": {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2},
    "choices": {"prompt": "Q? Answer:", "choices": ["no", "yes", "perhaps"], "gold": 1},
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_from_local_files(name, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    task, rows = load_task(f"{name}={path}")
    answer = task.choices(rows[0])[task.gold(rows[0])]
    assert answer == {"sciq": "yes", "piqa": "twist", "medmcqa": "C", "choices": "yes"}[name]
    data = load_training_data(f"{name}={path}")
    assert data[0] == {"prompt": task.prompt(rows[0]), "completion": " " + answer} and data[0][
        "prompt"
    ].endswith("Answer:")
    path.write_text(json.dumps({"question": "Q?"}) + "\n")
    with pytest.raises(ValueError, match=r"row 1: task .* missing"):
        load_task(f"{name}={path}")


def test_unknown_tasks_name_the_nearest(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'sciq'"):
        load_task("scqi=x.jsonl")


def test_line_separators_inside_strings_and_byte_order_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "four"}\n')
    assert [row["text"] for row in load_rows(str(path))] == ["one\u2028two\x85three", "four"]
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext\n"one\x0btwo"\n'.encode())
    assert load_rows(str(path)) == [{"text": "one\x0btwo"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "  "}, "row 1: text must not be empty"),
        (
            {"prompt": "x", "completion": ""},
            "row 1: prompt and completion must not be empty, 'completion' is",
        ),
        (
            {"prompt": [{"role": "user", "content": "x"}], "completion": "y"},
            "'prompt' holds list, expected text",
        ),
        ({"messages": []}, "row 1: messages must not be empty"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "expected chat turns {'role': ..., 'content': ...}",
        ),
    ],
)
def test_empty_or_malformed_rows_are_named(tmp_path, row, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_training_data(str(path))
    if "messages" in row:
        with pytest.raises(ValueError, match="row 1"):
            load_documents(str(path))


CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "too"},
]
MARKED = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}{% "
    "generation %}{{ m['content'] + ' .' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' .' }}{% endif %}{{ ' ' }}{% endfor %}"
)
REWRITING = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + (' ? ' if loop.last else ' . ')"
    " }}{% endfor %}"
)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_chats_are_scored_alike_with_and_without_generation_markers(tokenizer, template):
    tokenizer.chat_template = template
    ids, scored = encode_chat(CHAT, tokenizer)
    assert tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s]) == "sat on . too ."
    assert (
        tokenizer.decode(ids)
        == "user : the cat . assistant : sat on . user : and . assistant : too ."
    )
    assert all(encode_chat(CHAT, tokenizer, assistant_only=False)[1])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = REWRITING
    with pytest.raises(ValueError, match="writes turn 2 differently once the chat goes on"):
        encode_chat(CHAT, tokenizer)


def test_rows_are_tokenised_as_trl_does(tiny, tokenizer, tmp_path):
    """The same token ids and labels as TRL's own preparation, for each kind of data."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = MARKED
    config = dict(
        output_dir=str(tmp_path),
        max_length=9,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        shuffle_dataset=False,
    )
    kinds = {
        "text": [{"text": "the cat sat on the mat and then"}, {"text": "the dog"}],
        "prompt": [
            {"prompt": "Question ?", "completion": " the cat sat on the mat"},
            {"prompt": "a", "completion": " b"},
        ],
        "messages": [{"messages": CHAT[:2]}, {"messages": CHAT}],
    }
    for kind, rows in kinds.items():
        data = Dataset.from_list(rows)
        theirs = SFTTrainer(
            model=tiny(),
            args=SFTConfig(**config, assistant_only_loss=kind == "messages"),
            train_dataset=data,
            processing_class=tokenizer,
        )
        ours = encode_rows(data, tokenizer, end=tokenizer.eos_token)
        for (ids, scored), row in zip(ours, theirs.train_dataset, strict=True):
            assert ids[:9] == list(row["input_ids"])
            assert [i if s else -100 for i, s in zip(ids, scored, strict=True)][:9] == list(
                row["labels"]
            )


def test_what_length_cuts_off_is_reported_and_refused_where_nothing_is_left():
    row = lambda prompt, completion: (
        [5] * (prompt + completion),
        [False] * prompt + [True] * completion,
    )
    rows = [row(3, 2)] * 17 + [row(10, 2)] + [row(6, 4)] * 2
    assert truncation_report(rows, 12, 32) is None
    assert truncation_report(rows, 8, 32) == (
        "3 of 20 rows are longer than --length 8: 1 lose all that is scored and are left out, 2 "
        "lose the end of it; "
        "--length 10 would keep 95% of the rows whole (the model takes at most 32 tokens)"
    )
    assert "--length 9 would keep 85% of the rows whole" in truncation_report(rows, 8, 9)
    assert (
        truncation_report([row(3, 2), row(3, 0)], 12, 32)
        == "1 of 2 rows have nothing to score and are left out"
    )
    with pytest.raises(
        ValueError,
        match=(
            r"within --length 3 no row keeps a token to score, since prompts fill it; --length "
            r"10 would keep 95%"
        ),
    ):
        truncation_report(rows, 3, 32)
    with pytest.raises(ValueError, match="no row has a token to score"):
        truncation_report([row(3, 0)], 12, 32)


def test_the_length_that_is_advised_is_longer_than_the_one_given():
    row = lambda tokens: ([5] * tokens, [True] * tokens)
    rows = [row(5)] * 97 + [row(20), row(30), row(40)]
    assert "--length 20 would keep 98% of the rows whole" in truncation_report(rows, 10, 64)
    assert "--length 30 would keep 99%" in truncation_report(rows, 20, 64)
    report = truncation_report(rows, 24, 24)
    assert "the model takes at most 24 tokens, so shorten these rows" in report


class Adding:
    """A word tokenizer that puts <s> before and </s> behind every text, as some do."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, *, add_special_tokens=True, **settings):
        ids = self.inner(text)["input_ids"]
        if add_special_tokens:
            ids = [self.inner.bos_token_id, *ids, self.inner.eos_token_id]
        return {"input_ids": ids}

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_texts_begin_and_end_once_where_the_tokenizer_adds_both(tokenizer):
    adding = Adding(tokenizer)
    words = lambda ids: tokenizer.decode(ids)
    for text in ("the cat", "<s> the cat", "<s> the cat </s>"):
        assert words(text_ids(text, adding)) == "<s> the cat </s>"
    assert words(text_ids("<s> <s> the cat", tokenizer)) == "<s> <s> the cat"
    rows = [{"prompt": "Question ?", "completion": " yes"}, {"text": "the cat"}]
    trained = encode_rows(rows, adding, end=" </s>")
    assert [words(ids) for ids, _ in trained] == ["<s> Question ? yes </s>", "<s> the cat </s>"]
    # A choice of a task is ranked without an end, as by tokenizers that add none.
    ids, scored = encode_prompted("Question ?", " yes", adding)
    assert words(ids) == "<s> Question ? yes"
    assert words([i for i, counts in zip(ids, scored, strict=True) if counts]) == "yes"


def test_a_task_row_without_a_published_answer_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**ROWS["medmcqa"], "cop": -1}) + "\n")
    with pytest.raises(
        ValueError,
        match=r"row 1: cop is -1, which names no choice; use a split with answers \(validation\)",
    ):
        load_task(f"medmcqa={path}")


def test_a_bare_word_that_is_nearly_a_task_names_it():
    with pytest.raises(ValueError, match="as a task: did you mean 'sciq'"):
        load_training_data("sciqq")


@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.hub))
def test_prompts_datasets_and_splits_are_those_of_lm_eval(name):
    from forgetless.evaluate.harness import _task_manager

    settings = _task_manager().task_index[name].cfg
    assert TASKS[name].hub == settings["dataset_path"] and TASKS[name].held_out == (
        settings["test_split"] or settings["validation_split"]
    )
