"""A budget that sets the weight of the divergence on the base's own answers."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import PLAIN, SMALL, interrupt_after, words_tokenizer
from forgetless.budget.controller import Controller
from forgetless.cli import main
from forgetless.evaluate.divergence import stored_kl
from forgetless.methods import kl


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A function: a budget and more words -> the run, on few words, of a tiny chat model whose
    answers an importance file keeps.
    """
    folder = tmp_path_factory.mktemp("kl-budget")
    chat, file, domain = (str(folder / name) for name in ("chat", "i.safetensors", "d.jsonl"))
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "max_position_embeddings": 256})
    AutoModelForCausalLM.from_config(config).save_pretrained(chat)
    tokenizer = words_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = PLAIN, 256
    tokenizer.save_pretrained(chat)
    rng = random.Random(7)
    rows = [
        [
            {"role": "user", "content": f"the cat {rng.choice('abcd')} ?"},
            {"role": "assistant", "content": "a b a " + rng.choice("abcd")},
        ]
        for _ in range(32)
    ]
    Path(domain).write_text("\n".join(json.dumps({"messages": turns}) for turns in rows))
    small = ["--answers", "24", "--answer-length", "12"]
    assert main(["record", chat, "--out", file, *small, "--keep-answers", "16"]) == 0
    words = ["tune", chat, "--data", domain, "--rank", "2", "--learning-rate", "0.005"]
    words += ["--batch-size", "8", "--accumulation", "1", "--max-steps", "25", "--log-steps", "1"]
    words += ["--general", "chat", "--save-steps", "12", *small]

    def tune(name, budget, *more, method="kl", replay="kept", code=0):
        using = ["--method", method, "--replay", replay, "--budget", budget]
        if replay == "kept":
            using += ["--importance", file]
        assert main([*words, *using, "--out", str(folder / name), *more]) == code
        if code:
            return None
        run = json.loads((folder / name / "run.json").read_text())
        return SimpleNamespace(**run, looks=run["budget"]["trajectory"])

    tune.folder = folder
    return tune


@pytest.fixture(scope="module")
def tight(world):
    return world("tight", "0.1%")


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_tight_budget_raises_the_weight_and_a_loose_one_lets_go(world, tight, caplog):
    loose = world("loose", "30%")
    for run in (tight, loose):
        assert run.verdict == "met"
        assert run.forgetting["nats"] < run.budget["budget_nats"]
        assert all(look["strength"] is None for look in run.looks)  # no pull
        assert "budget/strength" not in run.log[0] and "budget/kl_weight" in run.log[0]
    assert "uniform importance" not in caplog.text
    assert tight.log[0]["budget/kl_weight"] == loose.log[0]["budget/kl_weight"] == 1.0
    # At every fifth step, and at those that are probed.
    assert [look["step"] for look in tight.looks] == [5, 9, 10, 15, 18, 20, 25]
    assert tight.looks[-1]["kl_weight"] > 10 and loose.looks[-1]["kl_weight"] < 0.1
    assert loose.budget["learning"]["nats"] > 1.2 * tight.budget["learning"]["nats"] > 0
    # The update as it was trained had lost less by the larger weight, and some of it is left.
    assert tight.log[-2]["kl"] < 0.9 * loose.log[-2]["kl"]
    assert tight.budget["share"] > 0.2 and loose.budget["share"] == 1


def test_one_number_moves_pull_and_divergence_in_their_ratio(world):
    run = world("both", "0.1%", "--strength", "20", "--kl-weight", "2", method="hold,kl")
    assert run.verdict == "met" and len(run.looks) == 7
    for look in run.looks:
        assert look["kl_weight"] == pytest.approx(look["strength"] / 10)
    assert run.looks[-1]["strength"] > 20
    assert run.log[0]["budget/strength"] == 20 and run.log[0]["budget/kl_weight"] == 2


def test_a_resumed_run_goes_on_with_the_weight_bit_for_bit(world, monkeypatch):
    whole = world("whole", "0.1%", "--kl-every", "2", replay="chat")
    interrupt_after(monkeypatch, 12)
    world("parted", "0.1%", "--kl-every", "2", replay="chat", code=130)
    parted = world("parted", "0.1%", "--kl-every", "2", "--resume", replay="chat")
    assert parted.looks == whole.looks and len(whole.looks) == 7
    assert parted.budget["checks"] == whole.budget["checks"]
    a, b = (factors(world.folder / name / "unscaled") for name in ("whole", "parted"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [entry["kl"] for entry in parted.log if "kl" in entry][-1] == whole.log[-3]["kl"]


def test_the_slow_twin_of_the_gradient_and_the_law_written_out_agree_step_by_step(
    world, tight, monkeypatch
):

    def by_autograd(tuned, base, said):
        logits = tuned.detach().requires_grad_()
        with torch.enable_grad():
            nats = stored_kl(base, logits, said).sum()
        return float(nats.detach()), torch.autograd.grad(nats, logits)[0]

    monkeypatch.setattr(kl, "stored_gradient", by_autograd)
    slow = world("slow", "0.1%")
    for one, other in zip(tight.looks, slow.looks, strict=True):
        assert one["kl_weight"] == pytest.approx(other["kl_weight"], rel=0.01)
    a, b = (factors(world.folder / name / "unscaled") for name in ("tight", "slow"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0.02, atol=2e-3)

    target, integral, gain = math.log(1.001), 0.0, Controller.GAIN
    for number, look in enumerate(tight.looks):
        error = min(3.0, max(-1.0 - number, math.log(look["rise"] / target)))
        integral += 0.3 * min(1.5, max(-0.7, error)) + 0.3 * max(0.0, error - 0.7)
        integral = min(4.6, integral)
        over, unused = max(error, -0.4), min(0.0, error + 0.4)
        weight = math.exp(integral + gain * over + 1.5 * unused)
        assert look["kl_weight"] == pytest.approx(weight, rel=1e-6)


def test_a_weight_of_nothing_cannot_be_raised(world, capsys):
    world("no", "1%", "--kl-weight", "0", code=2)
    assert "--kl-weight on, found 0; give a weight above 0" in capsys.readouterr().err
