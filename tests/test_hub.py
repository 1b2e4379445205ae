"""The Hub: what is uploaded, what a name means, and what the cards say.

The network is a fake that keeps what it is given.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from forgetless import Importance
from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.files.atomic import read_json
from forgetless.files.hub import IMPORTANCE_FILE, hub_name, importance_path, shareable
from forgetless.files.provenance import sha256_file
from forgetless.importance.entries import DenseEntry
from forgetless.options.option import as_dict
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.report.card_words import code
from forgetless.report.cards import extended, section_of
from forgetless.report.run_card import command

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub in a folder:

    HfApi and hf_hub_download with the signatures of the real ones as far as forgetless uses them.
    """
    root, asked = tmp_path / "hub", []

    class Api:
        def create_repo(self, repo_id, *, private=None, token=None, exist_ok=False):
            assert exist_ok
            full = repo_id if "/" in repo_id else f"me/{repo_id}"
            (root / full).mkdir(parents=True, exist_ok=True)
            asked.append(("create", full, private, token))
            return SimpleNamespace(repo_id=full)

        def upload_folder(
            self,
            *,
            repo_id,
            folder_path,
            token=None,
            revision=None,
            commit_message=None,
            create_pr=None,
        ):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            asked.append(("upload", repo_id, commit_message, token))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(
        repo_id, filename, *, revision=None, token=None, cache_dir=None, local_files_only=False
    ):
        asked.append(("download", repo_id, filename, revision))
        if not (root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(
                f"no {filename} in {repo_id}\nmore"
            )
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(root=root, asked=asked)


@pytest.fixture
def recorded(model_folder, text_file, tmp_path):
    file = tmp_path / "i.safetensors"
    assert (
        main(
            [
                "record",
                str(model_folder),
                "--general",
                str(text_file),
                "--out",
                str(file),
                "--cov-rank",
                "4",
                "--quiet",
            ]
        )
        == 0
    )
    return file


def test_push_and_from_pretrained_bring_back_the_same_importance(hub, recorded):
    importance = Importance.load(recorded)
    address = importance.push_to_hub("llama-importance", private=True, token="secret")
    assert address == "https://hub/me/llama-importance/commit/1"
    assert hub.asked == [
        ("create", "me/llama-importance", True, "secret"),
        ("upload", "me/llama-importance", "Upload importance", "secret"),
    ]
    back = Importance.from_pretrained("me/llama-importance", revision="v1")
    assert hub.asked[-1] == ("download", "me/llama-importance", IMPORTANCE_FILE, "v1")
    for name in importance:
        torch.testing.assert_close(back[name].dense(), importance[name].dense(), rtol=0, atol=0)
    assert (
        back.tier == importance.tier
        and back.info["model"]["fingerprint"] == importance.info["model"]["fingerprint"]
    )


def test_nothing_of_this_machines_folders_is_uploaded(hub, recorded, tmp_path):
    importance = Importance.load(recorded)
    assert str(tmp_path) in json.dumps(
        importance.info
    )  # it is in the file itself, for whoever recorded it
    importance.push_to_hub("me/it")
    for file in (hub.root / "me/it").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert Importance.from_pretrained("me/it").info["data"]["source"] == "general.jsonl"


def test_the_importance_card_says_where_it_came_from_and_how_to_use_it(hub, tmp_path):
    info = {
        "estimator": "fisher",
        "unit": "nats per squared weight",
        "model": {"name": "meta-llama/Llama-3.2-1B", "fingerprint": "ab" * 32},
        "data": {
            "source": "wikimedia/wikipedia:20231101.en",
            "documents": 7,
            "tokens": 12345,
            "sha256": "cd" * 32,
        },
        "settings": {"labels": "empirical"},
        "versions": {"versions": {"torch": "2.13.0"}},
    }
    importance = Importance({NAME: DenseEntry(torch.rand(8, 16))}, info=info).to_tier("u8")
    importance.save_pretrained(tmp_path / "folder")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert (
        card.data.base_model == "meta-llama/Llama-3.2-1B" and card.data.library_name == "forgetless"
    )
    assert card.data.datasets == ["wikimedia/wikipedia"] and {"forgetless", "importance"} <= set(
        card.data.tags
    )
    for said in (
        "`fisher`",
        "12,345 tokens",
        "`u8`",
        "against f32",
        "forgetless tune meta-llama/Llama-3.2-1B",
        "Importance.from_pretrained",
    ):
        assert said in card.text, said
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_card_that_is_written_again_keeps_what_people_wrote(tmp_path):
    importance = Importance({NAME: DenseEntry(torch.rand(8, 16))}, info={"estimator": "fisher"})
    importance.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(
        card.read_text().replace("---\n\n", "license: mit\n---\n\n", 1)
        + "\n## Licence\n\nAsk Ann.\n"
    )
    once = card.read_text()
    importance.save_pretrained(tmp_path)
    assert (
        ModelCard.load(card).data.license == "mit"
        and card.read_text().count("# Importance of") == 1
    )
    assert "Ask Ann." in card.read_text()
    importance.save_pretrained(tmp_path)
    assert card.read_text().split("---\n")[2] == once.split("---\n")[2]


@pytest.mark.parametrize(
    "hostile",
    [
        "a | b\n# c",
        "`` ` ``",
        "<script>alert(1)</script>",
        "\x1b[31m<!-- /forgetless -->",
        "---\nlicense: mit\n---",
    ],
)
def test_names_from_strangers_stay_text(hostile, tmp_path):
    info = {
        "estimator": hostile,
        "model": {"name": hostile, "revision": hostile},
        "data": {"source": hostile},
        "unit": hostile,
        "settings": {"x": hostile},
    }
    importance = Importance({NAME: DenseEntry(torch.rand(8, 16))}, info=info)
    for _ in range(2):
        importance.save_pretrained(tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert "\x1b" not in text and text.count("\n<!-- /forgetless -->\n") == 1
    head = yaml.safe_load(text.split("---\n")[1])
    assert "license" not in head and "base_model" not in head and "datasets" not in head
    outside = [part for i, part in enumerate(text.replace("```", "`").split("`")) if i % 2 == 0]
    assert not any("<script>" in part for part in outside)


def test_a_local_file_comes_before_the_hub(hub, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model := tmp_path / "model", tmp_path / "other")
    Importance.load(recorded).save_pretrained("me/it")
    assert importance_path("me/it") == Path("me/it") / IMPORTANCE_FILE
    assert importance_path("i.safetensors") == Path("i.safetensors")
    assert not hub.asked
    with pytest.raises(
        ValueError, match=r"without importance\.safetensors \(found model\.safetensors\)"
    ):
        importance_path(model)
    for missing in (
        "gone.safetensors",
        "me/gone.safetensors",
        "/a/b",
        "a/b/c",
        "gone",
        "../x/y",
        "a--b/c..d",
    ):
        if missing != "a--b/c..d":
            with pytest.raises(ValueError, match="does not exist"):
                Importance.from_pretrained(missing)
    assert not hub.asked
    with pytest.raises(
        ValueError,
        match=(
            r"is no file here, and cannot be had from the Hub.*no importance\.safetensors in "
            r"you/none; expected"
        ),
    ):
        Importance.from_pretrained("you/none")


def test_the_cache_is_read_without_a_network(recorded, tmp_path):
    """With the real hf_hub_download, from a cache laid out as it lays it out."""
    commit, repo = "0" * 40, tmp_path / "cache" / "models--me--it"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    Importance.load(recorded).save_pretrained(repo / "snapshots" / commit)
    assert len(
        Importance.from_pretrained("me/it", cache_dir=tmp_path / "cache", local_files_only=True)
    ) == len(Importance.load(recorded))


def test_record_and_tune_push_and_take_names(hub, model_folder, text_file, tmp_path):
    words = [
        "record",
        str(model_folder),
        "--general",
        str(text_file),
        "--out",
        str(tmp_path / "i.safetensors"),
        "--cov-rank",
        "4",
        "--quiet",
    ]
    assert main([*words, "--push-to-hub", "me/imp", "--private"]) == 0
    assert hub.asked == [
        ("create", "me/imp", True, None),
        *[("create", "me/imp", None, None)],
        ("upload", "me/imp", "Upload importance", None),
    ]
    assert main(["inspect", "me/imp"]) == 0
    domain = [
        "--data",
        str(text_file),
        "--max-steps",
        "2",
        "--batch-size",
        "2",
        "--accumulation",
        "1",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert (
        main(
            [
                "tune",
                str(model_folder),
                "--importance",
                "me/imp",
                "--out",
                str(tmp_path / "run"),
                *domain,
                "--push-to-hub",
                "adapter",
            ]
        )
        == 0
    )
    run = read_json(tmp_path / "run" / "run.json")
    assert run["importance"] == {
        "file": "me/imp",
        "sha256": sha256_file(hub.root / "me/imp" / IMPORTANCE_FILE),
    }
    pushed = hub.root / "me" / "adapter"
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        p.name for p in pushed.iterdir()
    }
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), pushed)


def test_a_wrong_name_or_a_refusal_stops_before_the_work(
    hub, model_folder, text_file, tmp_path, monkeypatch, capsys
):
    words = ["--out", str(tmp_path / "x.safetensors"), "--general", str(text_file), "--quiet"]
    assert main(["record", "./no-model", *words, "--push-to-hub", "a/b/c"]) == 2
    assert "'a/b/c' cannot be the name of a Hub repository" in capsys.readouterr().err
    assert main(["record", "./no-model", *words, "--private"]) == 2

    def refuse(*_, **__):
        raise OSError("401 Client Error\nlong text")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert main(["record", str(model_folder), *words, "--push-to-hub", "a/b"]) == 1
    assert (
        "the Hub does not let us write to 'a/b': 401 Client Error; log in with hf auth login"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("verdict", ["not shown", "exceeded", "met", None])
def test_an_adapter_that_broke_its_budget_is_not_pushed(hub, verdict, tmp_path, caplog):
    from forgetless.tune.result import push_result

    (tmp_path / "final").mkdir()
    (hub.root / "me").mkdir(parents=True)
    push_result("me/adapter", tmp_path / "final", verdict)
    assert (hub.root / "me/adapter").exists() == (verdict in (None, "met"))
    assert ("nothing is pushed" in caplog.text) == (verdict in ("not shown", "exceeded"))


def test_the_adapters_card_says_what_was_kept_and_lost(recorded, model_folder, text_file, tmp_path):
    out, data = tmp_path / "run", str(text_file)
    words = [
        "tune",
        str(model_folder),
        "--data",
        data,
        "--general",
        data,
        "--eval-data",
        data,
        "--importance",
        str(recorded),
        "--out",
        str(out),
        "--max-steps",
        "3",
        "--batch-size",
        "2",
        "--accumulation",
        "1",
        "--learning-rate",
        "0.01",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main(words) == 0
    run, text = read_json(out / "run.json"), (out / "final" / "README.md").read_text()
    # What PEFT's card says is kept, and what it asks for and nobody wrote is not.
    assert "### Framework versions" in text
    assert "[optional]" not in text and "Model Card Contact" not in text
    section = section_of(text)
    lost, before = run["forgetting"], run["before"]["general"]
    assert f"rose by {lost['nats']:.4f}" in section or f"rose by {lost['nats']:.3f}" in section
    assert f"{before['nats']:.3f} ± {before['standard_error']:.3f}" in section
    for said in (
        "domain loss",
        "`hold`",
        "strength: 10",
        sha256_file(recorded),
        "none: nothing bounds",
        "--learning-rate 0.01",
        "--max-steps 3",
    ):
        assert said in section, said
    assert str(tmp_path) not in text
    head = ModelCard.load(out / "final" / "README.md").data
    assert (
        head.base_model is None
        and head.library_name == "peft"
        and "forgetless" in head.tags
        and not any(t.startswith("base_model:") for t in head.tags)
    )

    assert main(["merge", str(out / "final"), "--out", str(tmp_path / "merged")]) == 0
    merged = (tmp_path / "merged" / "README.md").read_text()
    assert "merged in, made by forgetless" in merged and section.split("| |")[1] in merged
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"

    small = [
        "shrink",
        str(out / "final"),
        "--importance",
        str(recorded),
        "--mu",
        "1",
        "--general",
        data,
        "--out",
        str(tmp_path / "small"),
        "--quiet",
    ]
    assert main(small) == 0
    section = section_of((tmp_path / "small" / "final" / "README.md").read_text())
    assert "forgetless `shrink`" in section and "--mu 1" in section and "`tune`" not in section


def test_the_command_in_the_card_means_the_same_options():
    import shlex

    from forgetless.options.command_line import verb_parser

    given = dict(
        model="me/base",
        data="my data.jsonl",
        out="x",
        importance="i.safetensors",
        strength=3.0,
        method="hold,kl",
        replay="wiki.jsonl",
        rank=16,
        completion_only=False,
        gradient_checkpointing=True,
        learning_rate=3e-4,
        seed=5,
    )
    options = resolve(TuneOptions, given)
    words = shlex.split(command("tune", as_dict(options)))
    assert words[:3] == ["forgetless", "tune", "me/base"]
    again = resolve(TuneOptions, vars(verb_parser("tune").parse_args(words[2:])))
    assert as_dict(again) == {**as_dict(options), "out": "run"}
    assert len(words) < 40  # only what differs


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/wiki.jsonl", "wiki.jsonl"),
        ("sciq=/data/a.jsonl,piqa=~/b.jsonl", "sciq=a.jsonl,piqa=b.jsonl"),
        ("me/base", "me/base"),
        ("/models/llama/", "llama"),
        ({"a": ["~/x/y"]}, {"a": ["y"]}),
        (3, 3),
    ],
)
def test_shareable(value, expected):
    assert shareable(value) == expected


def test_names_and_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "local").mkdir(parents=True)
    assert hub_name("me/base") == "me/base" and hub_name("gpt2") == "gpt2"
    for no in ("me/local", "/a", "a/b/c", "x.jsonl", "", None, "a b", "a\nb", "../b", "a/b\n"):
        assert hub_name(no) is None, no
    assert code("a`b") == "`` a`b ``" and code("x\ny") == "`x y`"


def test_front_matter_that_is_broken_is_kept_as_text():
    card = extended(
        "---\n: [\n---\nhello\n", {"base_model": None, "tags": ["forgetless"]}, "## Ours"
    )
    assert "hello" in card and yaml.safe_load(card.split("---\n")[1]) == {"tags": ["forgetless"]}


def test_push_needs_a_real_name():
    with pytest.raises(OptionError, match="cannot be the name"):
        Importance({NAME: DenseEntry(torch.rand(8, 16))}).push_to_hub("../up")
