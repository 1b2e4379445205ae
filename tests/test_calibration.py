"""Calibration: what a unit of energy costs, measured on updates of a tiny model, kept in the file;
and budgets kept on the prediction, without general text.
"""

import dataclasses
import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import CONFIGS, PLAIN, interrupt_after, unheld, words_tokenizer
from forgetless import hold
from forgetless.cli import main
from forgetless.data.documents import Document, load_documents
from forgetless.data.encoding import batches
from forgetless.errors import OptionError
from forgetless.evaluate.paired import content
from forgetless.files.budget_json import BudgetReport
from forgetless.files.schema import as_record
from forgetless.importance.calibration import Calibration, MeasuredUpdate
from forgetless.importance.consolidate import consolidated
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.model.update import Update
from forgetless.record import kept_apart as keeping_apart
from forgetless.record import state as recording_state
from forgetless.record import updates as calibrating
from forgetless.record.cost import MeasuredPoint, parabola
from forgetless.record.gradient import gradient
from forgetless.record.kept_apart import apart, divided
from forgetless.report.budget import sentences
from forgetless.report.contents import load_contents
from forgetless.tune import tune as training

STEPS = 12  # of a training that calibrates, here
WORDS = "the cat sat on mat and dog then too yes no one two three".split()


def sentences_of(count, seed=0):
    """Each word has three that may follow it, so that there is something to know, and to lose."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        at, words = rng.randrange(len(WORDS)), []
        for _ in range(rng.randint(12, 28)):
            words.append(WORDS[at])
            at = (at + rng.choices((1, 5, 11), weights=(6, 3, 1))[0]) % len(WORDS)
        found.append(" ".join(words))
    return found


def update_of_cost(cost, energy=0.01):
    return MeasuredUpdate(energy, 0.0, cost * energy, 0.01 * abs(cost) * energy)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def general(place):
    """700 documents of random words."""
    path = place / "general.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in sentences_of(700)))
    return path


@pytest.fixture(scope="module")
def domain(place):
    """Prompts with completions of few words."""
    rng = random.Random(7)
    path = place / "domain.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "prompt": f"Question {rng.choice('abcd')} ?",
                    "completion": " a b a " + rng.choice("abcd"),
                }
            )
            for _ in range(32)
        )
    )
    return path


@pytest.fixture(scope="module")
def taught(place, general):
    """A tiny model on disk that knows the general words, so that moving away from it costs
    something.
    """
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(CONFIGS["llama"]), words_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [(ids, [True] * len(ids)) for ids in tokenizer(sentences_of(600, seed=1))["input_ids"]]
    for number, batch in enumerate(
        itertools.islice(batches(rows * 16, batch_size=32, pad_id=0, shuffle_seed=0), 300)
    ):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - number / 300)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for part in (model, tokenizer):
        part.save_pretrained(place / "model")
    return place / "model"


def run(*words):
    return main(unheld(words) if words[0] == "tune" else [str(word) for word in words])


def recording(taught, general, out):
    return [
        "record",
        taught,
        "--general",
        general,
        "--calibrate",
        "--cov-rank",
        "8",
        "--batch-size",
        "16",
        "--length",
        "32",
        "--device",
        "cpu",
        "--out",
        out,
    ]


@pytest.fixture(scope="module")
def calibrated(place, taught, general):
    """An importance file with a calibration of short trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "STEPS", STEPS)
        assert run(*recording(taught, general, place / "i.safetensors")) == 0
    return place / "i.safetensors"


@pytest.fixture
def tuning(taught, domain, calibrated, tmp_path):
    """The command line of a tuning run with a budget and without general text."""
    return [
        "tune",
        taught,
        "--data",
        domain,
        "--importance",
        calibrated,
        "--rank",
        "2",
        "--batch-size",
        "16",
        "--accumulation",
        "1",
        "--max-steps",
        "20",
        "--learning-rate",
        "5e-2",
        "--log-steps",
        "1",
        "--device",
        "cpu",
        "--save-steps",
        "5",
        "--budget",
        "2%",
        "--out",
        tmp_path / "run",
    ]


def test_the_cost_is_the_geometric_mean_and_the_bound_covers_19_of_20():
    known = Calibration([update_of_cost(cost) for cost in (1.0, 4.0, 2.0, 2.0)])
    assert known.cost == pytest.approx(2.0) and known.rise(0.1, 0.03) == pytest.approx(0.16)
    rng = np.random.default_rng(0)
    for number in (5, 9, 30):  # however few were measured
        kept = []
        for _ in range(600):
            costs = np.exp(rng.normal(1.0, 0.5, number + 1))
            made = Calibration([update_of_cost(cost) for cost in costs[1:]])
            kept.append(costs[0] * 0.02 <= made.bound(0.0, 0.02))
        assert 0.92 < np.mean(kept) < 0.98
    assert (
        known.rise(-0.01, 0.0) == -0.01
        and known.bound(-0.01, 0.0) == 0.0
        and known.bound(0.01, 0.0) == 0.01
    )  # a fall that is foreseen is not counted on


def test_a_calibration_of_nothing_is_refused():
    clear = update_of_cost(1.0)
    unclear = dataclasses.replace(clear, second_error=0.006)
    assert Calibration([clear] * 6 + [unclear] * 3).describe().startswith("6 of 9 updates")
    for others in (
        [unclear] * 4,
        [update_of_cost(-1.0)] * 4,
        [update_of_cost(1.0, energy=0.0)] * 4,
    ):
        with pytest.raises(ValueError, match="5 of 9 updates clearly raise the general loss"):
            Calibration([clear] * 5 + others)
    with pytest.raises(ValueError, match="which none does"):
        Calibration([clear] * 8 + [MeasuredUpdate(1e-300, 0.0, 1e300, 0.0)])


def test_a_parabola_is_found_through_its_points_and_not_through_far_ones():
    at = lambda s, error=0.001: MeasuredPoint(s, -0.01 * s + 0.05 * s**2, error)
    near = [at(0.2), at(0.5), at(1.0)]
    assert parabola(near)[:2] == pytest.approx((-0.01, 0.05)) and parabola(
        [*near, at(3.0)]
    ) == parabola(near)
    assert parabola([at(0.2, 0.01), at(0.5, 0.01), at(1.0, 0.01)])[2] > 3 * parabola(near)[2] > 0
    assert parabola(near[:2]) == parabola([at(1.0)] * 4) == (0.0, 0.0, 0.0)  # nothing is known


def test_a_parabola_of_a_divergence_begins_at_nothing_and_has_no_slope():
    points = [MeasuredPoint(s, 0.03 * s**2, 0.001) for s in (0.3, 0.6, 1.0)]
    assert parabola(points, linear=False)[:2] == pytest.approx((0.0, 0.03))
    rng = np.random.default_rng(0)
    points = [dataclasses.replace(p, nats=p.nats + rng.normal(0, 0.001)) for p in points]
    squares = [p.fraction**2 for p in points]
    trust = [1 / (0.001**2 + (0.05 * p.nats) ** 2) for p in points]
    by_hand = sum(w * x * p.nats for w, x, p in zip(trust, squares, points, strict=True))
    by_hand /= sum(w * x * x for w, x in zip(trust, squares, strict=True))
    assert parabola(points, linear=False)[1] == pytest.approx(by_hand)


def test_the_error_of_a_parabola_is_that_of_its_points():
    rng, share, found = np.random.default_rng(0), np.array([0.2, 0.3, 0.5, 1.0]), []
    for _ in range(400):
        nats = -0.01 * share + 0.05 * share**2 + rng.normal(0, 0.002, 4)
        found.append(
            parabola([MeasuredPoint(s, n, 0.002) for s, n in zip(share, nats, strict=True)])
        )
    seconds, errors = np.array(found)[:, 1], np.array(found)[:, 2]
    assert np.median(errors) == pytest.approx(seconds.std(), rel=0.25)


def test_the_gradient_is_that_of_autograd_and_predicts_small_moves(tiny, batch):
    model = tiny()
    pieces = [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch}]
    whole = gradient(
        model, "all-linear", pieces, rank=16
    )  # of as many directions as the thinner side
    assert not any("lora" in name for name, _ in model.named_modules()) and not any(
        p.requires_grad for p in model.parameters()
    )
    model.requires_grad_(True)
    model(input_ids=batch, labels=batch).loss.backward()
    exact = {name: p.grad for name, p in model.named_parameters() if name in whole}
    assert len(exact) == 14
    for name, (L, R) in whole.items():
        torch.testing.assert_close(
            L.float() @ R.float(), exact[name], atol=2e-2 * float(exact[name].abs().max()), rtol=0
        )
    thin = gradient(tiny(), "all-linear", pieces, rank=4)
    assert all(L.shape[1] == 4 for L, _ in thin.values())
    off = sum(
        float((L.float() @ R.float() - exact[name]).square().sum()) for name, (L, R) in thin.items()
    )
    assert off < 0.5 * sum(float(g.square().sum()) for g in exact.values())
    peft_model = add_adapter(tiny(), names="all-linear", rank=2, alpha=4.0)
    update = Update(peft_model)
    update.randomise(1e-4)
    with torch.no_grad():
        moved = float(peft_model(input_ids=batch, labels=batch).loss)
        update.scale(1)
        before = float(peft_model(input_ids=batch, labels=batch).loss)
    update.randomise(1e-4)
    known = Calibration([update_of_cost(1.0)] * 4, whole)
    assert known.first(target_weights(peft_model)) == pytest.approx(
        moved - before, rel=0.1, abs=2e-6
    )


def test_documents_kept_apart_are_never_recorded_on(general, tokenizer):
    documents = load_documents(str(general))
    recorded, kept = apart([*documents, *documents[:50]], tokenizer)  # some twice
    texts, held = {content(d) for d in recorded}, [content(d) for d in kept]
    assert (
        not texts & set(held)
        and len(set(held)) == len(held) == len(documents) // 3
        and texts | set(held) == {content(d) for d in documents}
    )
    shuffled = documents[:]
    random.Random(3).shuffle(shuffled)
    assert [content(d) for d in apart(shuffled, tokenizer)[1]] == held
    with pytest.raises(
        OptionError, match="expected at least 20 there, different ones of 4,000 tokens"
    ):
        apart(documents[:50], tokenizer)


def test_long_documents_are_cut_and_one_that_is_very_long_leaves_something_to_measure(
    tiny, tokenizer
):
    text = lambda words: Document(" ".join(random.Random(words).choices(WORDS, k=words)), None, "")
    kept = apart([text(4000 + i) for i in range(150)], tokenizer)[1]
    assert 20 <= len(kept) <= 50
    tokenizer.chat_template = PLAIN
    talk = lambda i: Document(
        None,
        [
            {"role": "user", "content": content(text(1 + i % 2 * 2000))},
            {"role": "assistant", "content": content(text(200 + i))},
        ],
        "",
    )
    kept = apart([talk(i) for i in range(150)], tokenizer)[
        1
    ]  # of every other chat nothing is scored before the cut
    assert kept and all(len(document.messages[0]["content"]) < 10 for document in kept)
    for sizes in (
        [3000, *range(100, 124)],
        [*range(100, 124), 3000],
        [*range(100, 112), 3000, *range(112, 124)],
    ):
        pieces, part = divided(tiny(), tokenizer, [text(size) for size in sizes])
        trained = [tuple(ids) for piece in pieces for ids, _ in piece]
        assert (
            all(pieces)
            and len(part) >= 10
            and not set(trained) & {tuple(ids) for ids, _ in part.encoded}
            and len(trained) + len(part) == len(sizes)
        )


def test_the_gradient_of_transposed_weights_is_their_own(tiny, batch):
    pieces = [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch}]
    model = tiny("gpt2")
    found = gradient(model, "all-linear", pieces, rank=16)
    model.requires_grad_(True)
    model(input_ids=batch, labels=batch).loss.backward()
    for name, p in model.named_parameters():
        if name in found:
            L, R = found[name]
            torch.testing.assert_close(
                L.float() @ R.float(), p.grad.T, atol=2e-2 * float(p.grad.abs().max()), rtol=0
            )


def test_recording_measures_updates_held_at_several_strengths(calibrated, general):
    importance = Importance.load(calibrated)
    known = importance.calibration
    assert (
        len(known.updates) == 9
        and {u.how["strength"] for u in known.updates} == {10.0, 30.0}
        and len({u.how["documents"] for u in known.updates}) == 3
    )
    assert (
        set(known.gradients) == set(importance)
        and known.cost > 0
        and known.factor > known.error > 1
    )
    assert all(4 <= len(u.points) <= 16 and u.energy > 0 for u in known.updates)
    near = [[point["nats"] for point in u.points] for u in known.updates]
    assert (
        0.004 < np.median(np.concatenate(near)) < 0.04
        and np.mean([max(each) > 0.02 for each in near]) > 0.6
    )  # where budgets lie
    assert importance.info["data"]["documents"] == 467 and known.data["documents"] < 200
    assert "9 updates measured on" in importance.describe()
    assert not calibrated.with_name("i.safetensors.state").exists()


def test_an_interrupted_calibration_goes_on_without_recording_again(
    taught, general, calibrated, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(calibrating, "STEPS", STEPS)
    out = tmp_path / "parted.safetensors"
    original, count = calibrating.parabola, [0]

    def interrupted(points, **how):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return original(points, **how)

    monkeypatch.setattr(calibrating, "parabola", interrupted)
    assert run(*recording(taught, general, out)) == 130
    assert Importance.load(out).calibration is None  # the importance is there already
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"text": text}) for text in sentences_of(700, seed=2)))
    shutil.copy(f"{out}.state", tmp_path / "state")
    for words, expected in (
        ([], "other general text"),
        (["--tier", "factored"], "by which it is calibrated"),
    ):
        again = recording(taught, others if not words else general, out)
        monkeypatch.setattr(
            recording_state,
            "load_state",
            lambda options: recording_state.state_of(
                options.out, torch.load(tmp_path / "state", weights_only=True)
            ),
        )
        assert run(*again, *words, "--resume") in (1, 2) and expected in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(calibrating, "STEPS", STEPS)
    monkeypatch.setattr("forgetless.record.record.record_on", None)
    assert run(*recording(taught, general, out), "--resume") == 0
    whole, parted = Importance.load(calibrated).calibration, Importance.load(out).calibration
    assert whole.updates == parted.updates and whole.data == parted.data
    assert all(
        torch.equal(a, b)
        for name in whole.gradients
        for a, b in zip(whole.gradients[name], parted.gradients[name], strict=True)
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--estimator", "uniform"], "the size of the update alone"),
        (["--documents", "30", "--general", "few"], "expected at least 20 there"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_recording(
    model_folder, general, tmp_path, capsys, monkeypatch, words, expected
):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"text": text}) for text in sentences_of(40)))
    monkeypatch.setattr("forgetless.record.record.record_on", None)
    given = [str(few) if word == "few" else word for word in words]
    assert (
        run(
            "record",
            model_folder,
            "--general",
            general,
            "--calibrate",
            "--out",
            tmp_path / "i.safetensors",
            *given,
        )
        == 2
    )
    assert expected in capsys.readouterr().err


def test_every_form_of_importance_can_be_calibrated_and_keeps_it_while_its_energy_stays(
    taught, general, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(calibrating, "STEPS", STEPS)
    words = [
        word
        for word in recording(taught, general, tmp_path / "path.safetensors")
        if word not in ("--cov-rank", "8")
    ]
    assert run(*words, "--estimator", "path", "--max-steps", "10") == 0
    importance = Importance.load(tmp_path / "path.safetensors")
    assert (
        importance.calibration.updates[0].how["strength"]
        == 0.0
        < importance.calibration.updates[1].how["strength"]
    )  # known once one update has cost something
    coded = importance.to_tier("u8")
    assert coded.calibration is importance.calibration
    coded.save(tmp_path / "u8.safetensors")
    assert (
        Importance.load(tmp_path / "u8.safetensors").calibration.updates
        == importance.calibration.updates
    )
    U = torch.randn(
        importance[next(iter(importance))].shape, generator=torch.Generator().manual_seed(0)
    )
    energies = [float(each[next(iter(importance))].energy(U)) for each in (importance, coded)]
    assert energies[0] == pytest.approx(energies[1], rel=0.05)
    assert (
        importance.to_tier("factored").calibration is None
        and "left out of tier factored" in caplog.text
    )
    assert consolidated(importance, importance).calibration is None
    importance.save_pretrained(tmp_path / "hub")
    assert (
        Importance.load(tmp_path / "hub" / "importance.safetensors").calibration.updates
        == importance.calibration.updates
    )
    assert "9 updates measured on" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda info, tensors: info.update(calibration={"updates": 3}),
            "not what forgetless writes",
        ),
        (
            lambda info, tensors: info["calibration"]["updates"][0].update(energy="much"),
            "not what forgetless writes",
        ),
        (
            lambda info, tensors: info["calibration"]["updates"][0].update(second=math.inf),
            "not forgetless's|not what forgetless writes|is not JSON|Infinity",
        ),
        (
            lambda info, tensors: info["calibration"].update(
                updates=info["calibration"]["updates"][:2]
            ),
            "expected at least 4",
        ),
        (
            lambda info, tensors: [
                update.update(second=1e-9, second_error=0.0)
                for update in info["calibration"]["updates"]
            ],
            "expected about 1",
        ),
        (
            lambda info, tensors: [
                tensors.pop(name)
                for name in list(tensors)
                if "0.mlp.up_proj.weight.gradient" in name
            ],
            "no gradient of",
        ),
        (lambda info, tensors: info.pop("calibration"), "not what forgetless writes"),
        (
            lambda info, tensors: tensors.pop(
                next(name for name in tensors if name.endswith(".gradient_L"))
            ),
            "half a gradient",
        ),
        (
            lambda info, tensors: tensors.update(
                {name: t[:, :2] for name, t in tensors.items() if name.endswith(".gradient_L")}
            ),
            "does not fit its weight",
        ),
        (
            lambda info, tensors: tensors.update(
                {name: t * math.nan for name, t in tensors.items() if name.endswith(".gradient_R")}
            ),
            "non-finite",
        ),
    ],
)
def test_damaged_calibrations_are_refused(calibrated, tmp_path, change, expected):
    with safe_open(calibrated, framework="pt") as file:
        info = json.loads(file.metadata()["forgetless"])
    tensors = load_file(calibrated)
    change(info, tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        tmp_path / "damaged.safetensors",
        metadata={"forgetless": json.dumps(info)},
    )
    with pytest.raises(ValueError, match=expected):
        Importance.load(tmp_path / "damaged.safetensors")


def test_a_budget_without_general_text_is_predicted_and_never_met(
    tuning, calibrated, tmp_path, capsys
):
    assert run(*tuning) == 3
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    report, known = told["budget"], Importance.load(calibrated).calibration
    assert (
        told["verdict"] == report["verdict"] == "predicted"
        and report["check"] is None
        and report["checks"] == []
    )
    assert (
        0 < report["share"] <= 1
        and report["predicted"]["nats"] < report["promised"] <= report["budget_nats"]
    )
    assert (
        report["calibration"]["factor"] == pytest.approx(known.factor)
        and report["learning"]["nats"] > 0
    )
    assert len(report["trajectory"]) == 4 and all(
        look["probe"] is None and look["strength"] > 0 for look in report["trajectory"]
    )
    printed = capsys.readouterr().out
    assert (
        "PREDICTED, not measured" in printed
        and f"a factor of {known.error:.2g} typically" in printed
        and "forgetless eval" in printed
    )
    assert "met" not in printed.split("budget 2%")[1].split("\n")[0] and "with 5%" in printed
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "predicted, not measured" in card
    assert any(
        "No general text was looked at" in sentence
        for sentence in load_contents(tmp_path / "run").verdict
    )
    assert run("report", tmp_path / "run") == 0


def test_the_prediction_is_that_of_every_weight_by_itself(tuning, calibrated, tmp_path):
    """Scaled as promised: energy weight by weight from its definition, the first-order term from
    whole matrices.
    """
    assert run(*tuning) == 3
    report, importance = (
        json.loads((tmp_path / "run" / "run.json").read_text())["budget"],
        Importance.load(calibrated),
    )
    tensors, known = (
        load_file(tmp_path / "run" / "final" / "adapter_model.safetensors"),
        importance.calibration,
    )
    first = energy = 0.0
    for name in importance:
        key = "base_model.model." + name.removesuffix(".weight")
        U = (32.0 / 2) * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        L, R = known.gradients[name]
        first, energy = (
            first + float(((L.float() @ R.float()) * U).sum()),
            energy + float(importance[name].energy(U)),
        )
    assert report["predicted"]["nats"] == pytest.approx(known.rise(first, energy), rel=1e-4)
    assert report["promised"] == pytest.approx(first + known.factor * known.cost * energy, rel=1e-4)


def test_layer_coefficients_change_the_pull_and_not_the_prediction(tuning, tmp_path):
    assert run(*tuning, "--layers", "softmax", "--tau", "1") == 3
    report = json.loads((tmp_path / "run" / "run.json").read_text())["budget"]
    last, whole = report["trajectory"][-1], report["curve"][0]
    assert (
        whole["share"] == 1
        and last["step"] == 20
        and last["rise"] == pytest.approx(whole["rise"]["nats"], rel=1e-4)
    )
    curve = [point["bound"] for point in report["curve"]]
    assert (
        all(
            point["rise"]["low"] < point["rise"]["nats"] < point["bound"] == point["rise"]["high"]
            for point in report["curve"]
        )
        and curve == sorted(curve)[::-1]
    )


def test_resuming_a_predicted_budget_equals_an_uninterrupted_run(tuning, tmp_path, monkeypatch):
    assert run(*tuning, "--out", tmp_path / "whole") == 3
    interrupt_after(monkeypatch, 12)
    assert run(*tuning, "--out", tmp_path / "parted") == 130
    assert run(*tuning, "--out", tmp_path / "parted", "--resume") == 3
    whole, parted = (
        json.loads((tmp_path / name / "run.json").read_text())["budget"]
        for name in ("whole", "parted")
    )
    assert whole["trajectory"] == parted["trajectory"] and whole["promised"] == parted["promised"]
    a, b = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        for name in ("whole", "parted")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_predictions_that_cannot_be_made_are_refused_before_training(
    tuning, taught, domain, general, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(training, "train_from", lambda *args: pytest.fail("trained"))
    bare = tmp_path / "bare.safetensors"
    assert run("record", taught, "--general", general, "--device", "cpu", "--out", bare) == 0
    without = [
        word
        for i, word in enumerate(tuning)
        if word != "--importance" and tuning[i - 1] != "--importance"
    ]
    for words, expected in (
        ([*tuning, "--importance", bare], "bare.safetensors holds no calibration"),
        (without, "or --importance FILE made with forgetless record --calibrate"),
        ([*tuning, "--full"], "counted from the base; found --full"),
        (
            [*tuning, "--data", domain],
            "several domains or --after is kept on held-out general text",
        ),
        ([*tuning, "--anchor", "recorded"], "counted from the base; found --anchor recorded"),
        ([*tuning, "--push-to-hub", "me/model"], "uploads what is known to keep its --budget"),
    ):
        assert run(*words) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("importance_on", [True, False])
def test_hold_keeps_a_predicted_budget_under_anybodys_trainer(
    taught, calibrated, tokenizer, tmp_path, caplog, importance_on
):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_list(
        [
            {"input_ids": ids, "labels": ids}
            for ids in tokenizer([f"a b a {c}" for c in "abcd" * 8])["input_ids"]
        ]
    )
    model = add_adapter(
        AutoModelForCausalLM.from_pretrained(taught), names="all-linear", rank=2, alpha=4.0
    )
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer)
    if not importance_on:
        with pytest.raises(OptionError, match="holds no calibration"):
            hold(trainer, Importance(Importance.load(calibrated).entries), budget="1%")
        return
    model.base_model.model.lm_head.weight.requires_grad_(
        True
    )  # trained too, and not seen by the prediction
    with pytest.raises(ValueError, match=r"lm_head\.weight trained itself"):
        hold(trainer, str(calibrated), budget="1%")
    model.base_model.model.lm_head.weight.requires_grad_(False)
    importance = Importance.load(calibrated)
    hold(
        trainer,
        dataclasses.replace(importance, info={**importance.info, "estimator": "fisher"}),
        budget="1%",
    )
    assert "predictions by fisher importance" in caplog.text
    caplog.clear()
    trainer.callback_handler.callbacks = trainer.callback_handler.callbacks[2:]
    held = hold(trainer, str(calibrated), budget="1%", layers=None)
    assert "predictions by" not in caplog.text
    trainer.train()
    report = held.finish()
    assert (
        report["verdict"] == "predicted"
        and report["promised"] <= report["budget_nats"]
        and 0 < report["share"] <= 1
    )
    said = sentences(as_record(report, BudgetReport))
    assert "PREDICTED" in said[0] and "nats for each nat of predicted forgetting" in "".join(said)


def test_a_finished_adapter_is_scaled_on_the_prediction(
    tuning, calibrated, taught, domain, tmp_path, capsys
):
    assert run(*tuning) == 3
    words = [
        "shrink",
        tmp_path / "run" / "unscaled",
        "--model",
        taught,
        "--importance",
        calibrated,
        "--budget",
        "0.5%",
        "--data",
        domain,
        "--device",
        "cpu",
    ]
    capsys.readouterr()
    assert (
        run(*words, "--out", tmp_path / "wrong") == 2
        and "holds for scaled updates alone" in capsys.readouterr().err
    )
    assert run(*words, "--method", "scale", "--out", tmp_path / "scaled") == 3
    report = json.loads((tmp_path / "scaled" / "run.json").read_text())["budget"]
    assert report["verdict"] == "predicted" and report["promised"] <= report[
        "budget_nats"
    ] == pytest.approx(math.log(1.005))
    a, b = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("run/unscaled", "scaled/final")
    )
    assert all(torch.allclose(b[key], a[key] * report["share"]) for key in a if "lora_B" in key)


def test_recorded_on_own_answers_it_is_the_divergence_that_is_calibrated_and_predicted(
    tuning, taught, tmp_path, capsys, monkeypatch, cache
):
    monkeypatch.setattr(calibrating, "STEPS", STEPS)
    monkeypatch.setattr(keeping_apart, "LEAST_TOKENS", 1_500)
    own, out = ["--general", "self", "--answers", "300"], tmp_path / "own"
    words = recording(taught, "self", f"{out}.safetensors")
    assert run(*words, *own) == 0
    known = Importance.load(f"{out}.safetensors").calibration
    assert known.diverges and not known.gradients
    assert all(update.first == 0 and update.second > 0 for update in known.updates)
    assert known.describe().startswith("9 updates measured on") and "answers of the base" in (
        known.describe()
    )
    tuned = [*tuning, "--importance", f"{out}.safetensors", "--general", "none"]
    assert run(*tuned) == 3
    report = json.loads((tmp_path / "run" / "run.json").read_text())["budget"]
    assert report["calibration"]["data"]["of"] == "divergence"
    printed = capsys.readouterr().out
    assert "nats per token of the model's own answers): PREDICTED, not measured" in printed
    assert "forgetless check" in printed and "general text" not in printed.split("budget 2%")[1]
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "the model moved from its base by" in card
    # What it really cost, on answers that nothing was recorded on or calibrated by.
    adapter = tmp_path / "run" / "final"
    words = ["eval", taught, "--adapter", adapter, *own, "--device", "cpu"]
    assert run(*words, "--out", tmp_path / "measured") == 0
    measured = json.loads((tmp_path / "measured" / "run.json").read_text())["forgetting"]
    assert measured["of"] == "divergence"
    assert 0 < measured["nats"] < report["promised"] <= report["budget_nats"]
