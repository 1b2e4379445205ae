"""Promises: every YAML file resolves and runs end to end on small models, the scripts run, and so
do the blocks of README and examples/README.
"""

import json
import random
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

from forgetless.cli import main
from forgetless.files.atomic import read_json
from forgetless.options.option import as_dict, read_yaml
from forgetless.options.verbs import VERBS, resolve
from pages import ROOT, blocks, check_shell, shell_lines

EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared"
YAMLS = sorted(
    path for path in EXAMPLES.rglob("*.yaml") if path.parent.name not in ("compare", "accelerate")
)  # test_compare.py, test_distributed.py
MODELS = sorted(path for path in (EXAMPLES / "paper").iterdir() if path.is_dir())
TASKS = ("sciq", "piqa", "medmcqa")
ROWS = {
    "sciq": {
        "question": "the cat ?",
        "correct_answer": "yes",
        "distractor1": "no",
        "distractor2": "one",
        "distractor3": "two",
        "support": "the cat sat .",
    },
    "piqa": {"goal": "the dog ?", "sol1": "yes", "sol2": "no", "label": 1},
    "medmcqa": {
        "question": "the mat ?",
        "opa": "one",
        "opb": "two",
        "opc": "three",
        "opd": "no",
        "cop": 2,
    },
}
SHORT = [
    "--quantize",
    "none",
    "--batch-size",
    "2",
    "--accumulation",
    "1",
    "--max-steps",
    "2",
    "--device",
    "cpu",
    "--quiet",
]
named = lambda path: str(path.relative_to(EXAMPLES))


def test_there_is_a_file_for_each_model_and_domain_of_the_paper():
    assert [path.name for path in MODELS] == ["gpt-j-6b", "llama-3.2-3b"]
    for folder in MODELS:
        assert {path.name for path in folder.iterdir()} == {
            "record.yaml",
            *(f"tune-{task}.yaml" for task in TASKS),
        }


@pytest.mark.parametrize("path", YAMLS, ids=named)
def test_every_yaml_resolves_and_holds_only_what_differs(path):
    verb = path.stem.split("-")[0]
    kind = VERBS[verb].options
    given = read_yaml(path)
    options = as_dict(resolve(kind, given))
    assert options["preset"] == (
        "paper" if path.is_relative_to(EXAMPLES / "paper") else "default"
    ) and all(options[name] for name in VERBS[verb].needed)
    for name in given:
        assert (
            as_dict(resolve(kind, {k: v for k, v in given.items() if k != name}))[name]
            != options[name]
        ), f"{name} repeats a default"


def run_paper(folder, model, general, tasks, out, *more):
    """record, then tune on each domain, with only model, data and size replaced."""
    importance = str(out / "paper.safetensors")
    small = [*SHORT, *more]
    assert (
        main(
            [
                "record",
                str(model),
                "--config",
                str(folder / "record.yaml"),
                "--general",
                str(general),
                "--out",
                importance,
                *small,
            ]
        )
        == 0
    )
    for task, file in tasks.items():
        local = f"{task}={file}"
        words = [
            "tune",
            str(model),
            "--config",
            str(folder / f"tune-{task}.yaml"),
            "--importance",
            importance,
            "--data",
            local,
            "--tasks",
            local,
        ]
        assert (
            main(
                [
                    *words,
                    "--general",
                    str(general),
                    "--out",
                    str(out / task),
                    "--limit",
                    "2",
                    "--log-steps",
                    "1",
                    *small,
                ]
            )
            == 0
        )
        run = read_json(out / task / "run.json")
        assert (run["configuration"]["anchor"], run["configuration"]["strength"]) == (
            "recorded",
            1e-3,
        )
        assert (
            run["energy"] is not None
            and run["forgetting"]["nats"] is not None
            and 0 <= run["after"]["tasks"][task]["acc"] <= 1
        )
        assert load_file(out / task / "final" / "adapter_model.safetensors")


@pytest.mark.parametrize("folder", MODELS, ids=named)
def test_the_papers_experiments_run_on_tiny_models(folder, tiny, tokenizer, text_file, tmp_path):
    tiny("gptj" if folder.name.startswith("gpt-j") else "llama").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    files = {}
    for task in TASKS:
        files[task] = tmp_path / f"{task}.jsonl"
        files[task].write_text("\n".join([json.dumps(ROWS[task])] * 6))
    run_paper(folder, tmp_path / "tiny", text_file, files, tmp_path)


def wide(path):
    """Enough general text for a budget: 200 documents of random words."""
    rng, words = (
        random.Random(0),
        "the cat sat on mat and dog then too yes no one two three".split(),
    )
    path.write_text(
        "\n".join(json.dumps({"text": " ".join(rng.choices(words, k=12))}) for _ in range(200))
    )
    return path


def test_the_budgets_example_runs_on_a_tiny_model(model_folder, tmp_path):
    general, rows, importance = (
        wide(tmp_path / "wide.jsonl"),
        tmp_path / "sciq.jsonl",
        tmp_path / "i.safetensors",
    )
    rows.write_text("\n".join([json.dumps(ROWS["sciq"])] * 16))
    assert (
        main(
            [
                "record",
                str(model_folder),
                "--general",
                str(general),
                "--out",
                str(importance),
                "--documents",
                "20",
                "--quiet",
            ]
        )
        == 0
    )
    small = [
        "--data",
        f"sciq={rows}",
        "--eval-data",
        f"sciq={rows}",
        "--general",
        str(general),
        "--importance",
        str(importance),
        "--out",
        str(tmp_path / "kept"),
    ]
    code = main(
        [
            "tune",
            str(model_folder),
            "--config",
            str(EXAMPLES / "budget/tune-budget.yaml"),
            *small,
            "--budget",
            "5%",
            "--allow-recorded-text",
            *SHORT,
        ]
    )
    verdict = read_json(tmp_path / "kept" / "run.json")["verdict"]
    assert (code == 0) == (verdict == "met") and load_file(
        tmp_path / "kept" / "final" / "adapter_model.safetensors"
    )


@pytest.mark.lab
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the lab models and data in ../shared")
@pytest.mark.parametrize("folder", MODELS, ids=named)
def test_the_papers_experiments_run_on_the_lab_model(folder, tmp_path):
    def few(file, count):
        """The first rows of a data file, their long texts cut: the point is that they run."""
        rows = [
            json.loads(line)
            for line in (SHARED / "data" / file).read_text(encoding="utf-8").split("\n")[:count]
        ]
        out = tmp_path / file.replace("/", "-")
        out.write_text(
            "\n".join(
                json.dumps({k: v[:600] if isinstance(v, str) else v for k, v in row.items()})
                for row in rows
            )
        )
        return out

    files = {task: few(f"{task}/train.jsonl", 4) for task in TASKS}
    general = few("general/train.jsonl", 4)
    run_paper(folder, SHARED / "models/lab-english-5m", general, files, tmp_path, "--length", "128")


def test_plain_pytorch_script(run_script, model_folder, text_file, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "\n".join(json.loads(line)["text"] for line in text_file.read_text().splitlines())
    )
    words = [model_folder, lines, lines, "--out", tmp_path / "adapter"]
    out = run_script(EXAMPLES / "plain_pytorch.py", *words)
    before, after = map(float, re.search(r"domain: ([\d.]+) -> ([\d.]+) nats", out).groups())
    assert after < before and load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def test_trl_script(run_script, model_folder, text_file, tmp_path):
    importance = tmp_path / "i.safetensors"
    assert (
        main(
            [
                "record",
                str(model_folder),
                "--general",
                str(text_file),
                "--out",
                str(importance),
                "--quiet",
            ]
        )
        == 0
    )
    words = [model_folder, text_file, importance, "--out", tmp_path / "sft", "--steps", "2"]
    out = run_script(EXAMPLES / "trl_sft.py", *words)
    assert "'pull_norm'" in out and load_file(tmp_path / "sft" / "adapter_model.safetensors")


def test_the_python_of_readme_and_pages_runs(tiny, tokenizer, batch, tmp_path, monkeypatch):
    """In order, with the reader's model, optimizer and trainer at hand, and a few steps in the
    place of `...`.
    """
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from forgetless import Kronecker
    from forgetless.model.adapters import add_adapter

    monkeypatch.chdir(tmp_path)
    wide(tmp_path / "held-out.jsonl")
    wide(tmp_path / "general.jsonl")
    model = add_adapter(tiny(), names="all-linear", rank=2, alpha=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train():
        for _ in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    batches = [{"input_ids": batch}]
    recorder = Kronecker(model)
    recorder.observe(batch)
    recorder.finish().save("model.importance.safetensors")
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in batch.tolist()])
    args = TrainingArguments(
        output_dir="out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    reader = {
        "peft_model": model,
        "model": model,
        "tokenizer": tokenizer,
        "optimizer": optimizer,
        "train": train,
        "batches": batches,
        "trainer": Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer),
    }
    for page in ("README.md", "docs/jobs/own-loop.md", "docs/jobs/preferences.md"):
        found = blocks(ROOT / page, "python")
        assert found
        for block in found:
            steps = re.sub(r"^(\s*)\.\.\.", r"\1train()", block, flags=re.MULTILINE)
            exec(compile(steps, page, "exec"), reader)
    assert reader["penalty"].pull_norm is not None


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", EXAMPLES / "README.md"], ids=["README", "examples"]
)
def test_every_shell_line_of_the_readmes_is_valid(path):
    lines = shell_lines(path)
    assert len([line for line in lines if line.startswith("forgetless ")]) >= 3
    for line in lines:
        check_shell(line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("name", ["chat_model", "trainer"])
def test_notebooks_run_from_top_to_bottom(name, chat_folder, tmp_path, monkeypatch):
    """Each cell in its turn; a line that begins with ! is a command, with names of Python in
    braces, as notebooks have it.
    """
    turns = lambda at: [
        {"role": "user", "content": f"the cat {at} ?"},
        {"role": "assistant", "content": f"the dog {at}"},
    ]
    rows = [json.dumps({"messages": turns(at)}) for at in "abcd" * 4]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    small = "--answers 12 --answer-length 8 --device cpu"
    more = "--max-steps 3 --batch-size 2 --accumulation 1 --length 64 --rank 2"
    given = {"MODEL": chat_folder, "DATA": str(tmp_path / "chats.jsonl"), "STEPS": "2"}
    for key, value in {**given, "RECORD": small, "OPTIONS": f"{small} {more}"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    notebook = read_json(EXAMPLES / f"{name}.ipynb")
    assert notebook["nbformat"] == 4 and len(notebook["cells"]) > 6
    known: dict[str, object] = {}
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "committed without what it printed"
        if lines[0].startswith("!"):
            for line in lines:
                words = shlex.split(line[1:].format(**known))
                assert words[0] == "forgetless" and main(words[1:]) == 0, line
        else:
            exec("\n".join(lines), known)
    made = "merged/model.safetensors" if name == "chat_model" else "sft/adapter_model.safetensors"
    assert (tmp_path / made).is_file()
