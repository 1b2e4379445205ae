"""Every estimator from the command line to a penalty on a loaded file, resumed recordings, and
tuning with the thin forms.
"""

import json

import pytest
import torch

import forgetless
from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.options.record import RecordOptions
from forgetless.options.verbs import resolve
from forgetless.record import record as recording
from forgetless.record import state as recording_state

TRAINED = ["path", "path-factored"]
OBSERVED = ["fisher", "kronecker", "activation"]


@pytest.fixture
def recorded(model_folder, text_file, tmp_path):
    """A function: flags -> the importance that `forgetless record` wrote."""

    def run(*flags, out="i.safetensors"):
        words = [
            "record",
            str(model_folder),
            "--general",
            str(text_file),
            "--out",
            str(tmp_path / out),
            "--batch-size",
            "4",
            "--device",
            "cpu",
            "--overwrite",
            *flags,
        ]
        assert main(words) == 0
        return Importance.load(tmp_path / out)

    return run


@pytest.mark.parametrize(
    ("estimator", "tier"),
    [
        ("path", "f32"),
        ("path-factored", "factored"),
        ("fisher", "f32"),
        ("kronecker", "kronecker:24"),
        ("activation", "factored"),
        ("uniform", "factored"),
    ],  # rank 64, or the width
)
def test_every_estimator_writes_a_file_that_holds_any_adapter(recorded, tiny, estimator, tier):
    importance = recorded("--estimator", estimator)
    assert (
        importance.tier == tier
        and len(importance) == 14
        and importance.info["estimator"] == estimator
    )
    assert len(importance.info["model"]["fingerprint"]) == 64 and len(importance.anchors) == (
        14 if estimator in TRAINED else 0
    )
    if estimator != "uniform":
        assert (
            len(importance.info["data"]["sha256"]) == 64
            and importance.info["data"]["documents"] == 24
        )
        assert (
            importance.info["timings"]["train_seconds"] > 0
            and importance.info["timings"]["tokens_per_second"] > 0
        )
    if estimator in OBSERVED:
        assert (
            importance.info["settings"]["tokens"] == importance.info["data"]["tokens"] - 24
            and "learning_rate" not in importance.info["settings"]
        )
    model = add_adapter(tiny(), names="q_proj,down_proj", rank=4, alpha=8)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.1)
    penalty = forgetless.Penalty(model, importance, strength=1.0)
    assert penalty.energy() > 0
    penalty.pull()
    assert all(bool(w.A.grad.any()) and bool(w.B.grad.any()) for w in penalty.weights)


def test_record_options_choose_form_labels_and_rank(recorded):
    assert (
        recorded().info["estimator"] == "kronecker"
        and recorded("--cov-rank", "2").tier == "kronecker:2"
    )
    assert (
        recorded("--cov-rank", "0").tier == "kronecker"
        and recorded("--tier", "kronecker").tier == "kronecker"
    )
    assert recorded("--estimator", "kronecker", "--tier", "kronecker:3").tier == "kronecker:3"
    assert (
        recorded("--estimator", "fisher", "--tier", "factored:2", "--labels", "sampled").tier
        == "factored:2"
    )
    assert (
        recorded("--estimator", "fisher", "--labels", "sampled").info["settings"]["labels"]
        == "sampled"
    )
    assert recorded("--estimator", "path", "--tier", "factored").tier == "factored"
    assert len(recorded("--estimator", "fisher", "--targets", "q_proj")) == 2


def test_uniform_needs_no_text(model_folder, tmp_path):
    assert (
        main(
            [
                "record",
                str(model_folder),
                "--estimator",
                "uniform",
                "--out",
                str(tmp_path / "u.safetensors"),
            ]
        )
        == 0
    )
    assert bool(
        (
            Importance.load(tmp_path / "u.safetensors")[
                "model.layers.0.self_attn.q_proj.weight"
            ].dense()
            == 1
        ).all()
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--estimator", "fisher", "--learning-rate", "1e-3", "--epochs", "2"],
            "--epochs, --learning-rate: not used by --estimator fisher",
        ),
        (["--estimator", "activation", "--labels", "sampled"], "--labels: not used"),
        (["--estimator", "path", "--labels", "sampled"], "--labels: not used"),
        (["--estimator", "fisher", "--cov-rank", "4"], "--cov-rank: not used"),
        (
            ["--estimator", "kronecker", "--preset", "paper"],
            "--preset paper records the path integral",
        ),
        (["--estimator", "fisher", "--tier", "kronecker:4"], "needs --estimator kronecker"),
        (["--estimator", "kronecker", "--tier", "kronecke"], "did you mean 'kronecker'"),
        (["--estimator", "kroneker"], "did you mean 'kronecker'"),
        (["--estimator", "kronecker", "--cov-rank", "-1"], "--cov-rank"),
        (["--learning-rate", "1e-3"], "give --estimator path"),
    ],
)
def test_options_that_an_estimator_would_ignore_are_refused(flags, message, capsys):
    assert main(["record", "model", "--general", "text", "--out", "out.safetensors", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("estimator", [*OBSERVED, "path-factored"])
def test_an_interrupted_recording_goes_on_to_the_same_file(
    model_folder, text_file, tmp_path, monkeypatch, estimator
):
    given = {
        "model": str(model_folder),
        "general": str(text_file),
        "batch_size": 3,
        "save_steps": 1,
        "estimator": estimator,
        "device": "cpu",
    }
    given |= {"labels": "sampled"} if estimator in ("fisher", "kronecker") else {}
    given |= {"accumulation": 1} if estimator == "path-factored" else {}
    options = lambda **more: resolve(RecordOptions, {**given, **more})
    whole = recording.record(options(out=str(tmp_path / "whole.safetensors")))
    write, count = recording_state.write, 0

    def stop_after_three(*args):
        nonlocal count
        write(*args)
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(recording_state, "write", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        recording.record(options(out=str(tmp_path / "parted.safetensors")))
    monkeypatch.setattr(recording_state, "write", write)
    assert not (tmp_path / "parted.safetensors").exists()
    with pytest.raises(OptionError, match="batch_size=3"):
        recording.record(
            options(out=str(tmp_path / "parted.safetensors"), resume=True, batch_size=2)
        )
    parted = recording.record(options(out=str(tmp_path / "parted.safetensors"), resume=True))
    for name in whole:
        a, b = whole[name].tensors(), parted[name].tensors()
        assert all(torch.equal(a[suffix], b[suffix]) for suffix in a)
    assert not (tmp_path / "parted.safetensors.state").exists()


@pytest.mark.parametrize("tier", ["kronecker", "kronecker:2", "factored", "factored:2"])
def test_tuning_with_the_thin_forms(recorded, model_folder, text_file, tmp_path, tier, caplog):
    """A stronger hold leaves less energy; the plan names the pull; the run says the energy."""
    recorded(
        "--estimator", "kronecker" if tier.startswith("kronecker") else "fisher", "--tier", tier
    )
    energies = []
    for strength in ("1e-3", "1e3"):
        words = [
            "tune",
            str(model_folder),
            "--data",
            str(text_file),
            "--importance",
            str(tmp_path / "i.safetensors"),
            "--strength",
            strength,
            "--out",
            str(tmp_path / f"run{strength}"),
            "--max-steps",
            "8",
            "--accumulation",
            "1",
            "--learning-rate",
            "1e-2",
            "--rank",
            "2",
            "--log-steps",
            "1",
            "--device",
            "cpu",
        ]
        assert main(words) == 0
        run = json.loads((tmp_path / f"run{strength}" / "run.json").read_text())
        energies.append(run["energy"])
    assert f"{tier.partition(':')[0]} pull" in caplog.text and f"tier {tier}" in caplog.text
    assert 0 < energies[1] < 0.5 * energies[0]


def test_tuning_all_weights_with_kronecker_importance(recorded, model_folder, text_file, tmp_path):
    recorded("--estimator", "kronecker", "--cov-rank", "4")
    words = [
        "tune",
        str(model_folder),
        "--data",
        str(text_file),
        "--importance",
        str(tmp_path / "i.safetensors"),
        "--full",
        "--max-steps",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--log-steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["energy"] is not None
