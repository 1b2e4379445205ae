"""Every method by one contract, a table row each: trains, resumes to the same result, reports,
leaves frozen weights alone, changes nothing when off.
"""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from conftest import interrupt_after, unheld
from forgetless.demo.world import MODEL_FOLDER, build, documents
from forgetless.errors import FileError, OptionError
from forgetless.evaluate.evaluate import evaluate
from forgetless.methods import orthogonal, terms
from forgetless.methods.callback import TermCallback
from forgetless.methods.divergence import kl_gradient, kl_reference
from forgetless.methods.kl import KL
from forgetless.methods.laplace import FactorPenalty, curvature
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.options.finished import EvalOptions
from forgetless.options.methods import METHODS
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record.record import record
from forgetless.tune import adapted
from forgetless.tune.tune import tune

# Options of each row, and those that switch the method off (None: it has no zero). FILE, TEXT and
# EARLIER stand for an importance file, general text and the adapter of plain tuning.
ROWS = [
    ("plain", {}, None),
    ("hold", {"importance": "FILE", "strength": 1.0}, {"strength": 0.0}),
    ("kl", {"replay": "TEXT"}, {"kl_weight": 0.0}),
    ("replay", {"replay": "TEXT", "replay_share": 0.5}, {"replay_share": 0.0}),
    ("rslora", {}, {"rslora": False}),
    ("full", {}, None),
    ("small-lr", {"learning_rate": None}, {"learning_rate": 1e-2}),
    ("wise", {"scale": 0.5}, {"scale": 1.0}),
    ("ewc-lora", {"replay": "TEXT"}, {"strength": 0.0}),
    ("la-lora", {"replay": "TEXT", "strength": 100.0}, {"strength": 0.0}),
    ("l2", {"strength": 0.01}, {"strength": 0.0}),
    ("shuffled", {"importance": "FILE", "strength": 1.0}, {"strength": 0.0}),
    ("o-lora", {"earlier": "EARLIER"}, {"orthogonality": 0.0}),
    ("general-steps", {"replay": "TEXT"}, {"general_steps": 0}),
    ("oft", {}, None),
    ("osf", {}, None),
    ("corda", {"replay": "TEXT"}, None),
    ("lora-fa", {}, None),
    ("project", {"importance": "FILE"}, None),
    (
        "proximal,masked-kl",
        {"importance": "FILE", "strength": 1e4},
        {"strength": 0.0, "masked_weight": 0.0},
    ),
    (
        "hold,eaft,stm,null-start",
        {"importance": "FILE", "strength": 1.0, "stm_perplexity": 48.0},
        None,
    ),
    ("self-dialogues", {"replay": "TEXT"}, None),
    ("dft", {}, None),
    ("full,dg-hard", {"learning_rate": 1e-3}, None),
    ("oft,wise", {"scale": 0.4}, None),
    ("lora-fa,hold", {"importance": "FILE", "strength": 1.0}, None),
    (
        "hold,replay,wise",
        {
            "importance": "FILE",
            "strength": 1.0,
            "replay": "TEXT",
            "replay_share": 0.5,
            "scale": 0.5,
        },
        {"strength": 0.0, "replay_share": 0.0, "scale": 1.0},
    ),
    (
        "hold,kl,replay",
        {"importance": "FILE", "strength": 1.0, "replay": "TEXT"},
        {"strength": 0.0, "kl_weight": 0.0, "replay_share": 0.0},
    ),
]
IDS = [row[0] for row in ROWS]


@pytest.fixture
def world(model_folder, text_file, tmp_path, tmp_path_factory):
    """A function: options -> the run of tuning the tiny model.

    FILE, TEXT and DATA are put in place; importance and plain tuning are made once for all.
    """
    rng = random.Random(7)
    data, shared = tmp_path / "domain.jsonl", tmp_path_factory.getbasetemp()
    data.write_text(
        "\n".join(
            json.dumps(
                {
                    "prompt": f"Question {rng.choice('abcd')} ?",
                    "completion": " yes no " + rng.choice("abcd"),
                }
            )
            for _ in range(32)
        )
    )
    files = {
        "FILE": str(shared / "methods.safetensors"),
        "TEXT": str(text_file),
        "DATA": str(data),
        "EARLIER": str(shared / "plain" / "final"),
    }

    def run(name, **given):
        if "FILE" in given.values() and not Path(files["FILE"]).exists():
            record(
                resolve(
                    RecordOptions,
                    {
                        "model": str(model_folder),
                        "general": str(text_file),
                        "out": files["FILE"],
                        "device": "cpu",
                    },
                )
            )
        if "EARLIER" in given.values():
            plain()
        given = {
            key: files.get(value, value) if isinstance(value, str) else value
            for key, value in given.items()
        }
        options = {
            "model": str(model_folder),
            "data": str(data),
            "out": str(tmp_path / name),
            "rank": 2,
            "batch_size": 4,
            "accumulation": 1,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "log_steps": 1,
            "device": "cpu",
            **given,
        }
        return tune(resolve(TuneOptions, unheld(options)))

    def plain():
        if not (shared / "plain" / "final").exists():
            run("plain", out=str(shared / "plain"))
        return tensors(shared / "plain")

    run.folder, run.plain = tmp_path, plain
    return run


def tensors(folder):
    return {
        name: value
        for file in sorted((folder / "final").glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def watch_frozen(monkeypatch):
    """A function: whether what tuning does not train is the same bit for bit as when the model to
    train was made, and got no gradient.
    """
    seen = []
    prepared = adapted.model_to_train

    def watched(*arguments):
        model = prepared(*arguments)
        seen.append(
            (
                model,
                {
                    key: p.detach().clone()
                    for key, p in model.named_parameters()
                    if not p.requires_grad
                },
            )
        )
        return model

    monkeypatch.setattr(adapted, "model_to_train", watched)

    def untouched():
        model, frozen = seen[0]
        after = dict(model.named_parameters())
        return bool(frozen) and all(
            torch.equal(value, after[key]) and after[key].grad is None
            for key, value in frozen.items()
        )

    return untouched


@pytest.mark.parametrize(("name", "given", "off"), ROWS, ids=IDS)
def test_the_contract_of_every_method(world, monkeypatch, name, given, off):
    untouched = watch_frozen(monkeypatch)
    run = world("whole", method=name, save_steps=2, eval_data="DATA", **given)
    assert (
        run["method"] == name.split(",")
        and run["configuration"]["method"] == name
        and run["prepare_seconds"] > 0
    )
    assert (
        len([entry for entry in run["log"] if "loss" in entry]) == 4 and run["learning"]["nats"] > 0
    )
    assert (run["replay"] is not None) == ("replay" in given)
    written = json.loads((world.folder / "whole" / "run.json").read_text())
    assert written["method"] == run["method"] and written["configuration"] == json.loads(
        json.dumps(run["configuration"])
    )
    assert untouched()

    final, kind = (
        str(world.folder / "whole" / "final"),
        "tuned" if run["configuration"]["full"] else "adapter",
    )
    again = evaluate(
        resolve(
            EvalOptions,
            {
                "model": str(world.folder / "model"),
                kind: final,
                "data": str(world.folder / "domain.jsonl"),
                "device": "cpu",
            },
        )
    )
    assert again["after"]["domain"]["nats"] == pytest.approx(
        run["after"]["domain"]["nats"], abs=1e-5
    )  # what is saved is what was measured

    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        world("parted", method=name, save_steps=2, **given)
    world("parted", method=name, save_steps=2, resume=True, **given)
    assert same(tensors(world.folder / "whole"), tensors(world.folder / "parted"))

    assert same(tensors(world.folder / "whole"), world.plain()) == (name == "plain")
    if off is not None:
        for adds in (
            "add_term",
            "add_penalty",
        ):  # neither a penalty with its importance nor a term with its text is made
            monkeypatch.setattr(adapted, adds, lambda trainer, added: pytest.fail(f"{added} at 0"))
        world("off", method=name, **{**given, **off})
        assert same(tensors(world.folder / "off"), world.plain())


@pytest.mark.parametrize("name", ["kl", "replay"])
def test_terms_do_not_depend_on_gradient_accumulation(world, name):
    """4 x 1 against 1 x 4, with clipping: the same factors to 1e-5."""
    world("a", method=name, replay="TEXT", batch_size=4, accumulation=1)
    world("b", method=name, replay="TEXT", batch_size=1, accumulation=4)
    a, b = tensors(world.folder / "a"), tensors(world.folder / "b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_kl_is_in_the_log_and_holds_the_model_to_its_base(world):
    common = dict(method="kl", replay="TEXT", kl_sequences=8, max_steps=24, learning_rate=3e-3)
    run = {weight: world(f"w{weight}", kl_weight=weight, **common) for weight in (0.01, 100.0)}
    ends = {
        weight: [entry["kl"] for entry in r["log"] if "kl" in entry][-1]
        for weight, r in run.items()
    }
    first = run[0.01]["log"][0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # a fresh adapter is the base
    assert ends[100.0] < 0.3 * ends[0.01]


@pytest.mark.parametrize("kind", ["self", "domain"])
def test_kl_needs_no_general_text(world, kind):
    run = world(
        "run", method="kl", replay=kind, **({"replay_documents": 6} if kind == "self" else {})
    )
    assert run["replay"]["source"] == kind and run["replay"]["sequences"] == (
        6 if kind == "self" else 32
    )
    assert [entry for entry in run["log"] if entry.get("kl", 0) > 0]
    assert (world.folder / "run" / "self.jsonl").is_file() == (kind == "self")


def test_kl_with_full_fine_tuning_compares_with_the_weights_before(world):
    run = world("run", method="kl", replay="TEXT", full=True)
    kl = [entry["kl"] for entry in run["log"] if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-4


@pytest.mark.parametrize("at_a_time", [1, 3, 256])
def test_the_gradient_of_kl_is_that_of_autograd(at_a_time):
    g = torch.Generator().manual_seed(0)
    base, tuned = (
        torch.randn(7, 31, generator=g),
        torch.randn(7, 31, generator=g, requires_grad=True),
    )
    slow = kl_reference(tuned, base)
    slow.backward()
    nats, gradient = kl_gradient(tuned.detach(), base, at_a_time=at_a_time)
    assert nats == pytest.approx(float(slow), rel=1e-6)
    torch.testing.assert_close(gradient, tuned.grad, rtol=1e-5, atol=1e-6)


def test_the_term_is_the_loss_that_it_says(tiny, batch):
    """KL.add puts the gradient of weight * mean KL per token into .grad."""
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
    KL(model, text, weight=2.0, sequences=4, batch_size=3).add(0)
    for p, gradient in zip(factors, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_sequences_of_a_step_depend_on_seed_and_step_alone():
    assert (
        sorted(terms.places(10, 0, 10, 1)) == list(range(10)) == sorted(terms.places(10, 10, 20, 1))
    )
    assert terms.places(10, 0, 20, 1) == [
        one for step in range(10) for one in terms.places(10, 2 * step, 2 * step + 2, 1)
    ]
    assert terms.places(10, 0, 10, 1) != terms.places(10, 0, 10, 2) and terms.places(
        10, 0, 10, 1
    ) != terms.places(10, 10, 20, 1)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 1.0])
def test_replay_mixes_in_its_share(tiny, share):
    text = [([1] * n, [True] * n) for n in (5, 9, 12, 20)]
    term = terms.Replay(tiny(), text, share=share, tokens_per_step=100.0)
    sequences = sum(
        len(terms.places(4, int(t * term.rate), int((t + 1) * term.rate), 0)) for t in range(400)
    )
    assert sequences * terms.count_scored(text) / 4 == pytest.approx(
        share * 400 * 100, abs=terms.count_scored(text) / 4
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "kk"}, "did you mean 'kl'"),
        ({"method": "kl"}, "--method kl needs --replay"),
        ({"method": "hold"}, "--method hold needs --importance"),
        (
            {"method": "kl", "replay": "TEXT", "importance": "FILE"},
            "--importance is used by --method kl where it keeps answers: give --replay kept",
        ),
        (
            {"method": "replay", "replay": "TEXT", "kl_weight": 1.0},
            "--kl-weight is not used by --method replay; it is for kl",
        ),
        ({"replay": "TEXT"}, "--replay is not used by --method plain"),
        ({"method": "kl", "replay": "TEXT", "general": "TEXT"}, "give two files"),
        ({"method": "replay", "replay": "domain"}, "--replay domain is for --method kl"),
        ({"method": "wise"}, "--method wise needs --scale"),
        ({"method": "wise", "max_forgetting": 0.1}, "unknown option 'max_forgetting'"),
        ({"method": "wise", "scale": 0.5, "budget": "1%"}, "wise does not leave to it"),
        ({"method": "ewc-lora"}, "ewc-lora needs --importance FILE .* or --replay TEXT"),
        ({"method": "ewc-lora", "importance": "FILE"}, "found importance of estimator 'kronecker'"),
        ({"method": "l2"}, "--method l2 needs --strength"),
        (
            {"method": "la-lora", "replay": "TEXT", "strength": 1.0, "full": True},
            "--method la-lora is about adapters",
        ),
        ({"method": "hold,l2", "importance": "FILE", "strength": 1.0}, "each brings its own pull"),
        ({"method": "oft,osf"}, "each brings its own adapter"),
        (
            {"method": "oft,hold", "importance": "FILE"},
            "oft and hold cannot be combined: its update is not the product",
        ),
        (
            {"method": "corda,kl", "replay": "TEXT"},
            "corda and kl cannot be combined: corda starts by taking",
        ),
        ({"method": "general-steps,kl", "replay": "TEXT"}, "it is the control"),
        ({"method": "osf", "quantize": "4bit"}, "--quantize does not allow"),
        ({"method": "oft", "rank": 3}, "not divisible by the block size of 4 x --rank = 12"),
        ({"method": "osf", "rank": 30}, "is more than the smallest target has"),
        ({"method": "o-lora"}, "--method o-lora needs --earlier"),
        (
            {"method": "o-lora,lora-fa", "earlier": "nowhere"},
            "o-lora and lora-fa cannot be combined: it freezes A",
        ),
        ({"method": "plain,kl", "replay": "TEXT"}, "plain is tuning without a method"),
    ],
)
def test_wrong_methods_and_needs_are_refused_before_training(world, given, expected):
    with pytest.raises(OptionError, match=expected):
        world("run", **given)
    assert not (world.folder / "run" / "checkpoints").exists()


def test_an_earlier_adapter_that_is_none_is_refused_before_training(world):
    with pytest.raises(FileError, match="'nowhere' is not an adapter folder"):
        world("run", method="o-lora", earlier="nowhere")
    assert not (world.folder / "run" / "checkpoints").exists()


def test_terms_refuse_sharded_training():
    trainer = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP))
    with pytest.raises(ValueError, match="FSDP does not allow"):
        TermCallback(None, trainer=trainer).on_train_begin(None, None, None)


def test_settings_and_help_name_real_methods():
    settings = {option for row in METHODS.values() for option in row.settings}
    assert settings <= set(TuneOptions.__dataclass_fields__)
    help_text = next(
        f.metadata["help"] for f in TuneOptions.__dataclass_fields__.values() if f.name == "method"
    )
    assert set(METHODS) <= set(re.findall(r"[\w-]+", help_text))


def test_a_bound_on_forgetting_is_kept_by_a_budget(world):
    """What `wise --max-forgetting` did: on the embedded model, which has something to forget, the
    finished update is scaled as far as half of plain's forgetting allows.
    """
    facts = build()
    for name, texts in (
        ("general", documents(facts.general, 1, 120, held_out=True)),
        ("herbal", documents(facts.domain, 1, 32)),
    ):
        (world.folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts)
        )
    common = dict(
        model=str(MODEL_FOLDER),
        data=str(world.folder / "herbal.jsonl"),
        general=str(world.folder / "general.jsonl"),
        dtype="float32",
        max_steps=16,
    )
    bound = world("free", **common)["forgetting"]["nats"] / 2
    assert bound > 0.01
    run = world("run", budget=f"{bound}nats", **common)
    assert run["budget"]["verdict"] == "met" and run["budget"]["check"]["high"] <= bound
    assert run["forgetting"]["nats"] <= bound
    assert 0 < run["budget"]["share"] <= 1


def test_wise_scales_the_update(world):
    """The finished adapter of wise is plain's with B times the scale; combined with a penalty and
    full fine-tuning, likewise.
    """
    world("half", method="wise", scale=0.5)
    whole, half = world.plain(), tensors(world.folder / "half")
    assert all(
        torch.equal(half[key], whole[key] * (0.5 if "lora_B" in key else 1.0)) for key in whole
    )
    world("full", method="full", **{"learning_rate": 1e-3})
    world("full half", method="full,wise", scale=0.5, **{"learning_rate": 1e-3})
    base, whole, half = (
        load_file(world.folder / "model" / "model.safetensors"),
        tensors(world.folder / "full"),
        tensors(world.folder / "full half"),
    )
    moved = [key for key in whole if not torch.equal(whole[key], base[key])]
    assert moved
    for key in whole:
        torch.testing.assert_close(half[key], (whole[key] + base[key]) / 2, rtol=0, atol=1e-7)


def test_the_laplace_pull_is_the_gradient_of_its_penalty(tiny, batch):
    """Against autograd, at a point where both factors have moved; a fresh adapter has no curvature
    in A.
    """
    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=4)
    factors = [p for weight in target_weights(model) for p in weight.parameters]
    text = [(row.tolist(), [True] * len(row)) for row in batch]
    assert all(float(F.abs().max()) == 0 for F in curvature(model, factors, text, 0)[::2])
    with torch.no_grad():
        for p in factors:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    penalty, starts, F = (
        FactorPenalty(model, text, strength=3.0),
        [p.detach().clone() for p in factors],
        curvature(model, factors, text, 0),
    )
    with torch.no_grad():
        for p in factors:
            p.add_(0.1)
    value = 3.0 * sum(
        (f * (p - start).square()).sum() for f, p, start in zip(F, factors, starts, strict=True)
    )
    expected = torch.autograd.grad(value, factors)
    penalty.pull()
    for p, g in zip(factors, expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    assert 3.0 * penalty.logs()["energy"] == pytest.approx(float(value), rel=1e-5)


def test_the_gradient_of_o_lora_is_that_of_autograd(tiny):
    """Two earlier adapters of ranks 2 and 3 on q_proj, against A_i A^T squared and summed by
    autograd; weights without an earlier adapter are left alone.
    """
    model = add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=4)
    q = {weight.name: weight.A for weight in target_weights(model) if weight.kind == "q_proj"}
    g = torch.Generator().manual_seed(4)
    earlier = {
        name: [torch.randn(r, A.shape[1], generator=g) for r in (2, 3)] for name, A in q.items()
    }
    value = sum((old @ A.T).square().sum() for name, A in q.items() for old in earlier[name])
    expected = torch.autograd.grad(0.7 * value, list(q.values()))
    term = orthogonal.Orthogonality(model, earlier, weight=0.7)
    term.add(0, scale=8.0)
    for A, gradient in zip(q.values(), expected, strict=True):
        torch.testing.assert_close(A.grad, 8.0 * gradient)
    assert term.logs()["orthogonality"] == pytest.approx(float(value), rel=1e-6)
    assert all(weight.A.grad is None for weight in target_weights(model) if weight.kind == "v_proj")
    with pytest.raises(ValueError, match="does not fit the model"):
        orthogonal.Orthogonality(model, {next(iter(q)): [torch.ones(2, 5)]})


def test_o_lora_turns_away_from_the_adapter_before(world):
    """Of a heavy weight: what is left of A_i A^T is a small part of what plain tuning on the merged
    model has.
    """
    earlier = world.plain()
    overlap = lambda name: sum(
        float((earlier[k] @ tensors(world.folder / name)[k].T).square().sum())
        for k in earlier
        if "lora_A" in k
    )
    world("free", max_steps=32, seed=1)
    world("held", method="o-lora", earlier="EARLIER", orthogonality=10.0, max_steps=32, seed=1)
    assert overlap("held") < 0.1 * overlap("free")


def test_every_method_has_a_card():
    docs = Path(__file__).parents[1] / "docs"
    cards = "".join(page.read_text() for page in sorted(docs.glob("methods*.md")))
    assert set(re.findall(r"^### `([\w-]+)`", cards, re.M)) == set(METHODS)
