"""Every method by one contract, a table row each: trains, resumes to the same result, reports, leaves frozen weights alone, changes nothing when off."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from holdfast import training
from holdfast.config import METHOD_SETTINGS, RECORD_PRESETS, TUNE_PRESETS, OptionError, RecordOptions, TuneOptions, resolve
from holdfast.methods import terms
from holdfast.methods.divergence import kl_gradient, kl_reference
from holdfast.methods.table import METHODS
from holdfast.recording import record
from holdfast.training import tune

# Options of each row, and those that switch the method off (None: it has no zero). "FILE" and "TEXT" stand for an importance file and general text.
ROWS = [
    ("plain", {}, None),
    ("holdfast", {"importance": "FILE", "strength": 1.0}, {"strength": 0.0}),
    ("kl", {"replay": "TEXT"}, {"kl_weight": 0.0}),
    ("replay", {"replay": "TEXT", "replay_share": 0.5}, {"replay_share": 0.0}),
    ("holdfast,kl,replay", {"importance": "FILE", "strength": 1.0, "replay": "TEXT"}, {"strength": 0.0, "kl_weight": 0.0, "replay_share": 0.0}),
]
IDS = [row[0] for row in ROWS]


@pytest.fixture
def world(model_folder, text_file, tmp_path):
    """A function: options -> the run of tuning the tiny model; FILE and TEXT are put in place, and the importance file is recorded once."""
    rng = random.Random(7)
    data = tmp_path / "domain.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Question {rng.choice('abcd')} ?", "completion": " yes no " + rng.choice("abcd")}) for _ in range(32)))
    file = tmp_path / "i.safetensors"

    def run(name, **given):
        if "FILE" in given.values() and not file.exists():
            record(resolve(RecordOptions, {"model": str(model_folder), "general": str(text_file), "out": str(file), "device": "cpu"}, RECORD_PRESETS))
        given = {key: {"FILE": str(file), "TEXT": str(text_file)}.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
        options = {"model": str(model_folder), "data": str(data), "out": str(tmp_path / name), "rank": 2, "batch_size": 4, "accumulation": 1, "max_steps": 4,
                   "learning_rate": 1e-2, "log_steps": 1, "device": "cpu", **given}  # fmt: skip
        return tune(resolve(TuneOptions, options, TUNE_PRESETS))

    run.folder = tmp_path
    return run


def tensors(folder):
    return {name: value for file in sorted((folder / "final").glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "given", "off"), ROWS, ids=IDS)
def test_every_method_trains_and_reports_and_resumes(world, monkeypatch, name, given, off):
    run = world("whole", method=name, save_steps=2, **given)
    assert run["method"] == name.split(",") and run["configuration"]["method"] == name
    losses = [entry["loss"] for entry in run["log"] if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (run["replay"] is not None) == ("replay" in given)
    written = json.loads((world.folder / "whole" / "run.json").read_text())
    assert written["method"] == run["method"] and written["configuration"] == json.loads(json.dumps(run["configuration"]))

    original = training.StopOnNonFinite.on_pre_optimizer_step

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.StopOnNonFinite, "on_pre_optimizer_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world("parted", method=name, save_steps=2, **given)
    monkeypatch.setattr(training.StopOnNonFinite, "on_pre_optimizer_step", original)
    world("parted", method=name, save_steps=2, resume=True, **given)
    assert same(tensors(world.folder / "whole"), tensors(world.folder / "parted"))


@pytest.mark.parametrize(("name", "given", "off"), ROWS, ids=IDS)
def test_no_method_touches_frozen_weights(world, monkeypatch, name, given, off):
    """What is not trained is the same bit for bit after training."""
    frozen, models = {}, []
    prepared = training._prepared

    def watched(*arguments):
        model = prepared(*arguments)
        models.append(model)
        frozen.update({key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad})
        return model

    monkeypatch.setattr(training, "_prepared", watched)
    world("run", method=name, **given)
    after = dict(models[0].named_parameters())
    assert frozen and all(torch.equal(value, after[key]) for key, value in frozen.items())
    assert all(p.grad is None for key, p in after.items() if key in frozen)


@pytest.mark.parametrize(("name", "given", "off"), [row for row in ROWS if row[2] is not None], ids=[row[0] for row in ROWS if row[2] is not None])
def test_a_method_that_is_off_changes_nothing(world, name, given, off):
    world("plain")
    world("on", method=name, **given)
    world("off", method=name, **{**given, **off})
    assert same(tensors(world.folder / "plain"), tensors(world.folder / "off"))
    assert not same(tensors(world.folder / "plain"), tensors(world.folder / "on"))


@pytest.mark.parametrize("name", ["kl", "replay"])
def test_terms_do_not_depend_on_gradient_accumulation(world, name):
    """4 x 1 against 1 x 4, with clipping: the same factors to 1e-5."""
    world("a", method=name, replay="TEXT", batch_size=4, accumulation=1)
    world("b", method=name, replay="TEXT", batch_size=1, accumulation=4)
    a, b = tensors(world.folder / "a"), tensors(world.folder / "b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_kl_is_in_the_log_and_holds_the_model_to_its_base(world):
    run = {
        weight: world(f"w{weight}", method="kl", replay="TEXT", kl_weight=weight, kl_sequences=8, max_steps=24, learning_rate=3e-3) for weight in (0.01, 100.0)
    }
    ends = {weight: [entry["kl"] for entry in r["log"] if "kl" in entry][-1] for weight, r in run.items()}
    first = run[0.01]["log"][0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # a fresh adapter is the base
    assert ends[100.0] < 0.3 * ends[0.01]


@pytest.mark.parametrize("kind", ["self", "domain"])
def test_kl_needs_no_general_text(world, kind):
    run = world("run", method="kl", replay=kind, **({"replay_documents": 6} if kind == "self" else {}))
    assert run["replay"]["source"] == kind and run["replay"]["sequences"] == (6 if kind == "self" else 32)
    assert [entry for entry in run["log"] if entry.get("kl", 0) > 0]
    assert (world.folder / "run" / "self.jsonl").is_file() == (kind == "self")


def test_kl_with_full_fine_tuning_compares_with_the_weights_before(world):
    run = world("run", method="kl", replay="TEXT", full=True)
    kl = [entry["kl"] for entry in run["log"] if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-4


@pytest.mark.parametrize("at_a_time", [1, 3, 256])
def test_the_gradient_of_kl_is_that_of_autograd(at_a_time):
    g = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(7, 31, generator=g), torch.randn(7, 31, generator=g, requires_grad=True)
    slow = kl_reference(tuned, base)
    slow.backward()
    nats, gradient = kl_gradient(tuned.detach(), base, at_a_time=at_a_time)
    assert nats == pytest.approx(float(slow), rel=1e-6)
    torch.testing.assert_close(gradient, tuned.grad, rtol=1e-5, atol=1e-6)


def test_the_term_is_the_loss_that_it_says(tiny, batch):
    """KL.add puts the gradient of weight * mean KL per token into .grad; Replay's the cross-entropy over the domain's tokens."""
    from holdfast.weights import add_adapter

    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=4)
    factors = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in factors:
            p.normal_(generator=torch.Generator().manual_seed(3))
    text = [(row.tolist()[: 5 + i], [True] * (5 + i)) for i, row in enumerate(batch)]
    expected = 0.0
    for ids, _ in text:
        tokens = torch.tensor([ids])
        with model.disable_adapter(), torch.no_grad():
            base = model(tokens).logits[0, :-1]
        expected = expected + kl_reference(model(tokens).logits[0, :-1], base)
    gradients = torch.autograd.grad(2.0 * expected / sum(len(ids) - 1 for ids, _ in text), factors)
    terms.KL(model, text, weight=2.0, sequences=4, batch_size=3).add(0)
    for p, gradient in zip(factors, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_sequences_of_a_step_depend_on_seed_and_step_alone():
    assert sorted(terms.places(10, 0, 10, 1)) == list(range(10)) == sorted(terms.places(10, 10, 20, 1))
    assert terms.places(10, 0, 20, 1) == [one for step in range(10) for one in terms.places(10, 2 * step, 2 * step + 2, 1)]
    assert terms.places(10, 0, 10, 1) != terms.places(10, 0, 10, 2) and terms.places(10, 0, 10, 1) != terms.places(10, 10, 20, 1)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 1.0])
def test_replay_mixes_in_its_share(tiny, share):
    text = [([1] * n, [True] * n) for n in (5, 9, 12, 20)]
    term = terms.Replay(tiny(), text, share=share, tokens_per_step=100.0)
    sequences = sum(len(terms.places(4, int(t * term.rate), int((t + 1) * term.rate), 0)) for t in range(400))
    assert sequences * terms.scored_tokens(text) / 4 == pytest.approx(share * 400 * 100, abs=terms.scored_tokens(text) / 4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "kk"}, "did you mean 'kl'"),
        ({"method": "kl"}, "--method kl needs --replay"),
        ({"method": "holdfast"}, "--method holdfast needs --importance"),
        ({"method": "kl", "replay": "TEXT", "importance": "FILE"}, "--importance is not used by --method kl; it is for holdfast"),
        ({"method": "replay", "replay": "TEXT", "kl_weight": 1.0}, "--kl-weight is not used by --method replay; it is for kl"),
        ({"replay": "TEXT"}, "--replay is not used by --method plain"),
        ({"method": "kl", "replay": "TEXT", "general": "TEXT"}, "give two files"),
        ({"method": "replay", "replay": "domain"}, "--replay domain is for --method kl"),
        ({"method": "plain,kl", "replay": "TEXT"}, "plain is tuning without a method"),
    ],
)
def test_wrong_methods_and_needs_are_refused_before_training(world, given, expected):
    with pytest.raises(OptionError, match=expected):
        world("run", **given)
    assert not (world.folder / "run" / "checkpoints").exists()


def test_settings_and_help_name_real_methods():
    assert set(METHOD_SETTINGS) <= set(METHODS)
    help_text = next(f.metadata["help"] for f in TuneOptions.__dataclass_fields__.values() if f.name == "method")
    assert set(METHODS) <= set(help_text.replace(";", ",").replace(" ", "").split(","))
