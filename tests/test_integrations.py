"""Holding inside other tools: every example script runs, and a host that is not installed is
skipped with its reason (docs/integrations.md).
"""

import copy
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from forgetless import HoldCallback, Penalty, hold
from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NUMBERS = {"energy", "pull_norm", "pull_ratio"}


def needs(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None,
        reason=f"{name} is not installed (docs/integrations.md says which version was run)",
    )


def run_alone(name, *words, **environment):
    """Run an example in a process of its own: for libraries that keep one state for a process."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


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


@pytest.fixture
def adapted(tiny):
    """A tiny Llama in f64 with LoRA away from zero."""
    model = add_adapter(tiny(dtype=torch.float64), names="q_proj,v_proj", rank=2, alpha=4)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.1)
    return model


def ones(model):
    return Importance(
        {w.name: DenseEntry(torch.ones(w.shape)) for w in target_weights(model)},
        info={"estimator": "fisher"},
    )


def trainer_of(model, batch, folder, **given):
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in batch.tolist()])
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    callbacks = given.pop("callbacks", None)
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **given}),
        train_dataset=rows,
        callbacks=callbacks,
    )


def test_the_transformers_script_and_tensorboard(
    run_script, model_folder, text_file, recorded, tmp_path
):
    out = run_script(
        EXAMPLES / "transformers_trainer.py",
        model_folder,
        text_file,
        recorded,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--report-to",
        "tensorboard",
    )
    assert "'pull_norm'" in out and load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert list((tmp_path / "out").rglob("events.*"))


def test_the_dpo_script(run_script, model_folder, recorded, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "\n".join(
            [json.dumps({"prompt": "the cat", "chosen": " sat on", "rejected": " and dog"})] * 8
        )
    )
    words = [model_folder, pairs, recorded, "--out", tmp_path / "out", "--steps", 2]
    out = run_script(EXAMPLES / "trl_dpo.py", *words)
    assert "'pull_norm'" in out and load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_the_grpo_script(run_script, model_folder, recorded, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join([json.dumps({"prompt": "the cat"})] * 8))
    out = run_script(
        EXAMPLES / "trl_grpo.py",
        model_folder,
        prompts,
        recorded,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--completion",
        4,
    )
    assert "'pull_norm'" in out and load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_the_sdft_script(run_script, model_folder, recorded, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([json.dumps({"prompt": "the cat", "completion": " sat on"})] * 8))
    words = [model_folder, rows, "--importance", recorded, "--out", tmp_path / "out"]
    out = run_script(EXAMPLES / "trl_sdft.py", *words, "--steps", 2, "--completion", 4)
    assert "'pull_norm'" in out and load_file(tmp_path / "out" / "adapter_model.safetensors")


@needs("wandb")
def test_wandb_offline(model_folder, text_file, recorded, tmp_path):
    """Its numbers reach the file that `wandb sync` uploads."""
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    run_alone(
        "transformers_trainer.py",
        model_folder,
        text_file,
        recorded,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--report-to",
        "wandb",
        **environment,
    )
    written = next(tmp_path.rglob("*.wandb")).read_bytes()
    assert all(f"train/{name}".encode() in written for name in NUMBERS)


@needs("trackio")
def test_trackio(model_folder, text_file, recorded, tmp_path):
    run_alone(
        "transformers_trainer.py",
        model_folder,
        text_file,
        recorded,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--report-to",
        "trackio",
        TRACKIO_DIR=str(tmp_path / "trackio"),
    )
    written = b"".join(
        file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file()
    )
    assert all(f"train/{name}".encode() in written for name in NUMBERS)


def test_a_callback_made_before_the_trainer_does_what_hold_does(adapted, batch, tmp_path):
    twin, importance = copy.deepcopy(adapted), ones(adapted)
    first = trainer_of(adapted, batch, tmp_path)
    hold(first, importance)
    first.train()
    callback = HoldCallback(importance)
    second = trainer_of(twin, batch, tmp_path, callbacks=[callback])
    second.train()
    for a, b in zip(target_weights(adapted), target_weights(twin), strict=True):
        torch.testing.assert_close(a.B, b.B, rtol=0, atol=0)
    assert all(entry.keys() >= NUMBERS for entry in second.state.log_history if "loss" in entry)
    assert callback.penalty.strength == 10.0
    assert not getattr(second.optimizer, "optimizer", second.optimizer)._optimizer_step_pre_hooks


def test_a_callback_says_at_the_start_what_does_not_fit(adapted, batch, tmp_path):
    wrong = Importance(
        {name: DenseEntry(torch.ones(3, 3)) for name in ones(adapted)}, info={"estimator": "fisher"}
    )
    with pytest.raises(ValueError, match="does not fit the model"):
        trainer_of(adapted, batch, tmp_path, callbacks=[HoldCallback(wrong)]).train()
    with pytest.raises(OptionError, match="no default strength"):
        HoldCallback(Importance(dict(ones(adapted).entries), info={"estimator": "uniform"}))


LIGHTNING = importlib.util.find_spec("lightning") or importlib.util.find_spec("pytorch_lightning")


@pytest.mark.skipif(LIGHTNING is None, reason="lightning is not installed")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning_does_what_a_plain_loop_does(adapted, batch, tmp_path, accumulation):
    """Clipped gradient, then the pull, once per optimizer step."""
    import lightning as L

    from forgetless.integrations.lightning import LightningCallback

    class Module(L.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, ids, _):
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(
                [p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
            )

    twin, rows = copy.deepcopy(adapted), list(batch) * 3
    module = Module(adapted)
    callback = LightningCallback(Penalty(adapted, ones(adapted), strength=0.5))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=0.1,
        accumulate_grad_batches=accumulation,
        precision="64-true",
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4 // accumulation))
    optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    twin.train()
    with Penalty(twin, ones(twin), strength=0.5).attach(optimizer):
        for _ in range(3):
            twin(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(target_weights(adapted), target_weights(twin), strict=True):
        torch.testing.assert_close(a.B, b.B, rtol=1e-6, atol=1e-9)
    assert (
        set(trainer.callback_metrics) >= NUMBERS
        and not trainer.optimizers[0]._optimizer_step_pre_hooks
    )


@pytest.mark.skipif(LIGHTNING is None, reason="lightning is not installed")
def test_the_lightning_script(model_folder, text_file, recorded, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "\n".join(json.loads(line)["text"] for line in text_file.read_text().splitlines())
    )
    out = run_alone(
        "lightning_fit.py", model_folder, lines, recorded, "--out", tmp_path / "out", "--steps", 3
    )
    assert float(re.search(r"energy: (\S+) nats", out).group(1)) > 0 and load_file(
        tmp_path / "out" / "adapter_model.safetensors"
    )
    assert (
        set(next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")) >= NUMBERS
    )


@needs("axolotl")
def test_the_axolotl_plugin(adapted, batch, tmp_path):
    """Loaded by Axolotl's own loader from the example's name, with the example's settings; its
    numbers are in the log.
    """
    from axolotl.integrations.base import BasePlugin, load_plugin
    from axolotl.utils.dict import DictDefault

    settings = yaml.safe_load((ROOT / "examples/axolotl/lora.yml").read_text())
    plugin = load_plugin(settings["plugins"][0])
    assert isinstance(plugin, BasePlugin)
    module, _, name = plugin.get_input_args().rpartition(".")
    known = getattr(importlib.import_module(module), name).model_fields
    assert {key for key in settings if key.startswith("forgetless_")} <= set(known)
    ones(adapted).save(tmp_path / "i.safetensors")
    trainer = trainer_of(adapted, batch, tmp_path)
    assert (
        plugin.add_callbacks_post_trainer(
            DictDefault({**settings, "forgetless_importance": str(tmp_path / "i.safetensors")}),
            trainer,
        )
        == []
    )
    trainer.train()
    assert all(entry.keys() >= NUMBERS for entry in trainer.state.log_history if "loss" in entry)
    with pytest.raises(OptionError, match="needs forgetless_importance"):
        plugin.add_callbacks_post_trainer(DictDefault({"plugins": settings["plugins"]}), trainer)


@needs("llamafactory")
def test_llamafactory_takes_callbacks():
    from llamafactory.train.tuner import run_exp

    assert "callbacks" in inspect.signature(run_exp).parameters


def test_the_plugin_for_ms_swift_holds(recorded, tiny, batch, tmp_path, monkeypatch):
    """The block of the page, with a stand-in for the map of callbacks that ms-swift calls."""
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [plugin] = [block for block in blocks if "callbacks_map" in block]
    assert len([line for line in plugin.splitlines() if line.strip()]) <= 10
    swift, callbacks = types.ModuleType("swift"), types.ModuleType("swift.callbacks")
    callbacks.callbacks_map = {}
    monkeypatch.setitem(sys.modules, "swift", swift)
    monkeypatch.setitem(sys.modules, "swift.callbacks", callbacks)
    monkeypatch.setenv("FORGETLESS_IMPORTANCE", str(recorded))
    exec(compile(plugin, "hold_plugin.py", "exec"), {})
    model = add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=4)
    trainer = trainer_of(model, batch, tmp_path)
    trainer.add_callback(callbacks.callbacks_map["forgetless"](trainer.args, trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry.keys() >= NUMBERS for entry in logged) and logged[-1]["energy"] > 0
