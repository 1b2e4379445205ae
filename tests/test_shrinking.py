"""forgetless shrink end to end on a tiny model: what is written, that the input is never touched,
verdicts and exit codes, refusals with their reason.
"""

import hashlib
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from forgetless.budget.ways import fraction_of, mu_of, shrinker
from forgetless.cli import main
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.model.update import Update

WORDS = "the cat sat on mat and dog then too yes no one two three".split()


def documents(count, seed=0):
    rng = random.Random(seed)
    return "\n".join(
        json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(8, 20)))})
        for _ in range(count)
    )


@pytest.fixture
def adapter(tiny, tokenizer, model_folder, tmp_path):
    """A rank-3 rsLoRA adapter, trained by a plain PyTorch loop on four sentences, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tiny()
    base.config._name_or_path = base.name_or_path = str(model_folder)
    model = get_peft_model(
        base,
        LoraConfig(
            r=3,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2},
        ),
    )
    ids = torch.tensor(
        [tokenizer(f"Question {letter} ? a b a {letter}")["input_ids"] for letter in "abcd"]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(15):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def importance(model_folder, tmp_path):
    (tmp_path / "record.jsonl").write_text(documents(24, seed=1))
    path = tmp_path / "model.importance.safetensors"
    words = [
        "record",
        model_folder,
        "--general",
        tmp_path / "record.jsonl",
        "--out",
        path,
        "--cov-rank",
        "4",
        "--length",
        "32",
        "--device",
        "cpu",
    ]
    assert run(words) == 0
    return path


@pytest.fixture
def words(adapter, importance, tmp_path):
    """The command line of a shrinking run."""
    (tmp_path / "wide.jsonl").write_text(documents(200))
    (tmp_path / "domain.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Question {letter} ? a b a {letter}"}) for letter in "abcd")
    )
    return [
        "shrink",
        adapter,
        "--importance",
        importance,
        "--general",
        tmp_path / "wide.jsonl",
        "--data",
        tmp_path / "domain.jsonl",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    ]


def run(words, *more):
    return main([str(word) for word in (*words, *more)])


def without(words, *flags):
    """The command line without some options and their values."""
    drop = {place + i for flag in flags for place in [words.index(flag)] for i in (0, 1)}
    return [word for place, word in enumerate(words) if place not in drop]


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_budget_is_met_beside_plain_scaling_and_plain_peft_loads_the_result(
    words, adapter, model_folder, tmp_path, capsys
):
    before = digest(adapter)
    assert run(words, "--budget", "1%") == 0
    assert digest(adapter) == before
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    report = saved["budget"]
    assert (
        saved["verdict"] == report["verdict"] == "met"
        and report["way"] == "shrink"
        and 0 < report["share"] < 1
    )
    assert report["mu"] == pytest.approx(mu_of(report["share"]))
    assert {point["way"] for point in report["curve"]} == set(report["each"]) == {"shrink", "scale"}
    assert saved["learning"]["nats"] > 0 and saved["forgetting"]["nats"] < report["budget_nats"]
    printed = capsys.readouterr().out
    assert "budget 1%" in printed and ": met" in printed
    assert (
        "shrunk along importance at mu" in printed
        and "each way within this budget" in printed
        and "; scale: scaled by" in printed
    )
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), str(tmp_path / "out" / "final")
    )
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), str(adapter)
    )
    for ours, whole in zip(target_weights(model), target_weights(theirs), strict=True):
        assert ours.A.shape == whole.A.shape and ours.scale == whole.scale
        assert 0 < ours.update().norm() < whole.update().norm()


def test_scaling_needs_no_importance(words, adapter, tmp_path):
    assert run(without(words, "--importance"), "--budget", "1%", "--method", "scale") == 0
    report = json.loads((tmp_path / "out" / "run.json").read_text())["budget"]
    assert (
        report["way"] == "scale"
        and {point["way"] for point in report["curve"]} == {"scale"}
        and report["mu"] is None
    )
    whole, made = tensors(adapter), tensors(tmp_path / "out" / "final")
    for name in whole:
        torch.testing.assert_close(
            made[name], whole[name] * report["share"] if "lora_B" in name else whole[name]
        )


def test_a_fixed_mu_is_taken_without_a_verdict(words, adapter, tmp_path):
    assert run(words, "--mu", "1", "--method", "scale") == 0
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        "budget" not in saved and "verdict" not in saved and saved["forgetting"]["nats"] is not None
    )
    whole, made = tensors(adapter), tensors(tmp_path / "out" / "final")
    assert all(
        torch.equal(made[name], whole[name] / 2 if "lora_B" in name else whole[name])
        for name in whole
    )
    assert (
        run(without(words, "--general", "--data", "--out"), "--mu", "1", "--out", tmp_path / "more")
        == 0
    )
    more = tensors(tmp_path / "more" / "final")
    assert all(not torch.equal(more[name], whole[name]) for name in whole)


def test_mu_and_fraction_stand_for_one_another():
    for mu in (0.0, 0.3, 1.0, 50.0):
        assert mu_of(fraction_of(mu, "shrink")) == pytest.approx(mu)
    assert fraction_of(1.0, "scale") == 0.5


def test_the_shrinker_lowers_energy_and_brings_the_update_back(tiny, importance):
    torch.manual_seed(0)
    model = add_adapter(tiny(), names="q_proj,down_proj", rank=2, alpha=4)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B)
    held, update = Importance.load(importance), Update(model)
    energy = lambda: sum(
        float(held[weight.name].energy(weight.update())) for weight in update.weights
    )
    whole, kept, apply, energies = (
        energy(),
        [weight.update() for weight in update.weights],
        shrinker(update, held),
        [],
    )
    for share in (0.9, 0.5, 0.2, 0.0):
        apply(share)
        energies.append(energy())
    assert whole > energies[0] > energies[1] > energies[2] > energies[3] == 0
    apply(1.0)
    assert all(
        torch.equal(weight.update(), U) for weight, U in zip(update.weights, kept, strict=True)
    )


@pytest.mark.parametrize(
    ("drop", "more", "expected"),
    [
        (["--importance"], ["--budget", "1%"], "give --importance FILE"),
        ([], [], "give --budget (1%, 0.01nats), which chooses mu, or --mu X"),
        ([], ["--budget", "1%", "--mu", "1"], "one of them"),
        ([], ["--budget", "one"], "found 'one'"),
        (["--general"], ["--budget", "1%"], "give --general TEXT"),
        ([], ["--mu", "-1"], "--mu"),
        ([], ["--budget", "1%", "--method", "shrnk"], "did you mean 'shrink'"),
    ],
)
def test_wrong_options_exit_with_2(words, tmp_path, capsys, drop, more, expected):
    assert run(without(words, *drop), *more) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "sub", "..", "../theirs"])
def test_the_input_is_never_written_to(words, adapter, capsys, out):
    before = digest(adapter)
    assert run(without(words, "--out"), "--mu", "1", "--out", adapter / out) == 2
    assert "the input is never changed" in capsys.readouterr().err and digest(adapter) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "OFT"}, "is a OFT adapter"),
        ({"use_dora": True}, "has DoRA"),
        ({"modules_to_save": ["lm_head"]}, "has whole modules trained beside it"),
        ({"bias": "all"}, "has trained biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "starts away from the base model"),
        ({"base_model_name_or_path": "./nowhere"}, "model './nowhere' does not exist"),
    ],
)
def test_adapters_that_are_more_than_two_factors_are_refused_with_the_reason(
    words, adapter, capsys, change, expected
):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    assert run(words, "--mu", "1") == 1
    assert expected in capsys.readouterr().err


def test_importance_of_other_weights_is_refused(words, importance, capsys):
    held = Importance.load(importance)
    Importance(
        {name: entry for name, entry in held.entries.items() if "q_proj" in name},
        {},
        {k: v for k, v in held.info.items() if k != "norms"},
    ).save(importance)
    assert run(words, "--mu", "1") == 1
    assert "does not cover 2 of 4 target weights" in capsys.readouterr().err


def test_a_folder_that_is_no_adapter_and_one_that_is_full_are_refused(
    words, model_folder, tmp_path, capsys
):
    assert run(["shrink", model_folder, *words[2:]], "--mu", "1") == 1
    assert "is not an adapter folder" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.txt").write_text("keep me")
    assert run(words, "--mu", "1") == 1
    assert "is not empty" in capsys.readouterr().err


def test_tune_with_a_budget_keeps_the_way_that_learns_more(
    model_folder, importance, words, tmp_path, capsys
):
    more = [
        "tune",
        model_folder,
        "--data",
        tmp_path / "domain.jsonl",
        "--general",
        tmp_path / "wide.jsonl",
        "--importance",
        importance,
        "--budget",
        "1%",
    ]
    size = [
        "--rank",
        "2",
        "--batch-size",
        "4",
        "--accumulation",
        "1",
        "--epochs",
        "20",
        "--learning-rate",
        "3e-2",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    ]
    assert run(more, *size) == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())["budget"]
    assert {point["way"] for point in report["curve"]} == {"shrink", "scale"} == set(report["each"])
    assert report["learning"]["nats"] == max(point["learning"] for point in report["each"].values())
    assert report["way"] == max(report["each"], key=lambda way: report["each"][way]["learning"])
    assert "each way within this budget" in capsys.readouterr().out


def test_adapters_of_other_kinds_are_scaled_along_their_path(tiny, model_folder, tmp_path, capsys):
    """OFT by its generators: the result is an adapter of its kind."""
    from peft import OFTConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny(), OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0))
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "wide.jsonl").write_text(documents(8))
    words = ["shrink", tmp_path / "theirs", "--model", model_folder, "--device", "cpu"]
    words += ["--general", tmp_path / "wide.jsonl", "--mu", "1", "--out", tmp_path / "out"]
    assert run(words) == 2
    assert run(words, "--method", "scale") == 0
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved["forgetting"]["nats"] != 0
    small, all_of_it = tensors(tmp_path / "out" / "final"), tensors(tmp_path / "theirs")
    for name, tensor in all_of_it.items():
        torch.testing.assert_close(small[name], 0.5 * tensor)
    assert PeftModel.from_pretrained(tiny(), tmp_path / "out" / "final") is not None
