"""Text and tasks in: files of every kind, broken input, chats, named tasks."""

import json

import pytest

from holdfast.config import OptionError
from holdfast.tasks import TASKS, load_task, load_training_data
from holdfast.texts import batches, encode, load_documents, load_rows


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
    with pytest.raises(ValueError, match="has the columns body, id; expected text or content or messages"):
        load_documents(str(path))
    with pytest.raises(ValueError, match="columns body, id; expected text, or prompt and completion"):
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
    from holdfast.texts import Document

    encoded = encode([Document("the cat sat on the mat and then the dog sat too", None, "x"), Document("the cat", None, "x")], tokenizer, length=4)
    assert all(2 <= len(ids) <= 4 for ids, _ in encoded)
    for batch in batches(encoded, batch_size=3, pad_id=0, shuffle_seed=1):
        padding = batch["attention_mask"] == 0
        assert (batch["labels"][padding] == -100).all() and (batch["labels"][~padding] == batch["input_ids"][~padding]).all()


def test_chats_score_assistant_turns_only(tokenizer):
    from holdfast.texts import Document

    chat = Document(None, [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}], "x")
    with pytest.raises(ValueError, match="no chat template"):
        encode([chat], tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' . ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    ids, scored = encode([chat], tokenizer)[0]
    said = tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s])
    assert said.replace(" ", "").startswith("satonthemat") and "user" not in said


ROWS = {
    "sciq": {"question": "Q?", "correct_answer": "yes", "distractor1": "a", "distractor2": "b", "distractor3": "c", "support": "S."},
    "piqa": {"goal": "open a jar", "sol1": "twist", "sol2": "cry", "label": 0},
    "medmcqa": {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2},
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_from_local_files(name, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    task, rows = load_task(f"{name}={path}")
    answer = task.choices(rows[0])[task.gold(rows[0])]
    assert answer == {"sciq": "yes", "piqa": "twist", "medmcqa": "C"}[name]
    data = load_training_data(f"{name}={path}")
    assert data[0] == {"prompt": task.prompt(rows[0]), "completion": " " + answer} and data[0]["prompt"].endswith("Answer:")
    path.write_text(json.dumps({"question": "Q?"}) + "\n")
    with pytest.raises(ValueError, match=r"row 1: task .* missing"):
        load_task(f"{name}={path}")


def test_unknown_tasks_name_the_nearest(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'sciq'"):
        load_task("scqi=x.jsonl")
