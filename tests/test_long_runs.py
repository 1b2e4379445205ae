"""Long runs: nothing piles up from step to step, and nothing stays open behind a run: tensors,
memory, hooks, threads, file handles.
"""

import gc
import json
import os
import random
import threading
from typing import ClassVar

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from forgetless.cli import main
from forgetless.data.selftext import Answer
from forgetless.evaluate.divergence import stored_base
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.integrations.hold import hold
from forgetless.methods import kl
from forgetless.methods.callback import add_term
from forgetless.methods.kl import KL
from forgetless.model.adapters import add_adapter, bare
from forgetless.model.linear import base_shapes
from forgetless.penalty.callback import PenaltyCallback
from forgetless.penalty.pull import Penalty
from forgetless.record.callback import RecorderCallback
from forgetless.record.path import PathIntegral


class Watch(TrainerCallback):
    """What is alive after some steps: {step: (tensors, resident bytes)}."""

    def __init__(self, steps):
        self.steps, self.found = steps, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            gc.collect()
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.found[state.global_step] = (
                sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
                resident,
            )


def dense(model):
    g = torch.Generator().manual_seed(0)
    return Importance(
        {
            name: DenseEntry(torch.rand(*shape, generator=g))
            for name, shape in base_shapes(model).items()
        },
        {},
        {"estimator": "path"},
    )


def trainer_of(model, batch, folder, steps, *callbacks, **given):
    rows = [{"input_ids": row, "labels": row} for row in batch]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=max(steps // 20, 1),
        disable_tqdm=True,
        learning_rate=1e-3,
        **given,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def kept_answers(model, batch, stored=True):
    """The divergence from the base on some sequences, of which an importance file keeps what the
    base made of them.
    """
    rows = [row.tolist() for row in batch]
    text = [(row, [False] * 4 + [True] * (len(row) - 4)) for row in rows]
    answers = [Answer(str(n), "k", tuple(row), 4, True) for n, row in enumerate(rows)]
    with bare(model) as base:
        known = stored_base(base, answers)
    return KL(model, text, weight=0.5, stored=known if stored else None)


@pytest.mark.parametrize("steps", [120, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["penalty", "recorder", "kept answers"])
def test_memory_does_not_grow_with_the_steps(tiny, batch, tmp_path, capsys, what, steps):
    model = add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=2)
    watch = Watch({steps // 4, steps // 2, steps})
    trainer = trainer_of(model, batch, tmp_path, steps, watch, max_grad_norm=0.0)
    recorder = PathIntegral(model)
    if what == "penalty":
        hold(trainer, dense(model), strength=0.1)
    elif what == "kept answers":
        add_term(trainer, kept_answers(model, batch))
    else:
        trainer.add_callback(RecorderCallback(recorder))
    trainer.train()
    tensors, resident = zip(*(watch.found[step] for step in sorted(watch.found)), strict=True)
    assert len(set(tensors)) == 1
    if (
        steps >= 20_000
        # from the middle on: a Trainer by itself grows by 4 MB within its first 5,000; a float per
        # weight and step would take 1.4 MB
    ):
        assert resident[-1] - resident[1] < 1.2e6
    logged = {"penalty": "energy", "kept answers": "kl"}
    if what == "recorder":
        assert recorder.steps == steps
    else:
        assert any(logged[what] in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("end", ["close", "exception", "training"])
def test_nothing_is_left_on_model_and_optimizer(tiny, batch, tmp_path, capsys, end):
    """The same optimizer, as many hooks, and the same steps as without ever having been held."""
    model = add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=2)
    hooks = lambda: [
        len(d)
        for m in model.modules()
        for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    ]
    of_optimizer = lambda o: (
        len(o._optimizer_step_pre_hooks),
        len(o._optimizer_step_post_hooks),
        len(o.state_dict()["param_groups"]),
    )
    before = hooks()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    clean, step = of_optimizer(optimizer), optimizer.step
    penalty, recorder = Penalty(model, dense(model), strength=0.1), PathIntegral(model)
    if end == "training":
        trainer = trainer_of(
            model,
            batch,
            tmp_path,
            3,
            PenaltyCallback(penalty),
            RecorderCallback(recorder),
            max_grad_norm=0.0,
        )
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        plain = trainer_of(
            add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=2),
            batch,
            tmp_path,
            3,
            max_grad_norm=0.0,
        )
        plain.train()
        assert (
            of_optimizer(optimizer) == of_optimizer(plain.optimizer.optimizer)
            and recorder.steps == 3
        )
    elif end == "close":
        with recorder.attach(optimizer), penalty.attach(optimizer):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        assert of_optimizer(optimizer) == clean
    else:
        with pytest.raises(KeyError), recorder.attach(optimizer), penalty.attach(optimizer):
            model(input_ids=batch, labels=batch).loss.backward()
            raise KeyError
        assert of_optimizer(optimizer) == clean
    assert (
        hooks() == before and optimizer.step.__func__ is step.__func__
        if end != "training"
        else hooks() == before
    )
    assert not any(
        getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None)
        for p in model.parameters()
    )


@pytest.mark.parametrize("at", ["forward", "gradient", "backward"])
@pytest.mark.parametrize("kind", ["kept", "base under the adapter", "copies"])
def test_a_term_that_fails_leaves_the_model_as_it_was(tiny, batch, monkeypatch, kind, at):
    """Whatever fails: adapters are on, trained values are in place, modes and hooks are as before,
    and the next step adds what it would have added.
    """
    model = tiny() if kind == "copies" else add_adapter(tiny(), names="q_proj", rank=2, alpha=2)
    term = kept_answers(model, batch, stored=kind == "kept")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    model.train()

    def state():
        modes = [module.training for module in model.modules()]
        hooks = [
            len(found)
            for module in model.modules()
            for found in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ]
        values = [parameter.detach().clone() for parameter in model.parameters()]
        return modes, hooks, values, model(input_ids=batch).logits.detach()

    def added():
        model.zero_grad()
        term.add(0)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before, expected = state(), added()

    def fails(*arguments, **more):
        raise RuntimeError("no room")

    places = {
        "forward": (kl, "scored_logits"),
        "gradient": (kl, "stored_gradient" if kind == "kept" else "kl_gradient"),
        "backward": (torch.Tensor, "backward"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*places[at], fails)
        with pytest.raises(RuntimeError, match="no room"):
            term.add(0)
    after = state()
    assert after[:2] == before[:2]
    torch.testing.assert_close(after[2:], before[2:], rtol=0, atol=0)
    torch.testing.assert_close(added(), expected, rtol=0, atol=0)


def test_a_trainer_may_be_used_twice(tiny, batch, tmp_path, capsys):
    """The second training pulls once a step, as the first did, and leaves as little behind."""
    model = add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=2)

    class Hooks(TrainerCallback):
        found: ClassVar[list] = []

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            self.found.append(len(inner._optimizer_step_pre_hooks))

    trainer = trainer_of(model, batch, tmp_path, 3, Hooks())
    held = hold(trainer, dense(model), strength=0.1)
    term = add_term(trainer, kept_answers(model, batch)).term
    steps = []
    add = term.add
    term.add = lambda step, scale: steps.append(step) or add(step, scale=scale)
    for _ in range(2):
        trainer.train()
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        left = len(inner._optimizer_step_pre_hooks)
        assert left == Hooks.found[-1] - 1
    assert len(Hooks.found) == 6 and len(set(Hooks.found)) == 1
    assert steps == [0, 1, 2] * 2 and held.penalty.energy() > 0


def still_open():
    """Files, pipes and sockets of this process, and its threads."""
    gc.collect()
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(found), sorted(thread.name for thread in threading.enumerate())


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_threads_and_files_are_closed_behind_every_verb(model_folder, text_file, tmp_path, capsys):
    """The second time, when the libraries have opened what they keep."""
    rng = random.Random(7)
    rows = [
        {
            "prompt": f"Question {i} {rng.choice('abcd')} ?",
            "completion": " yes no " + rng.choice("abcd"),
        }
        for i in range(40)
    ]
    (tmp_path / "domain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [
        {"text": " ".join(rng.choices("the cat sat on mat and dog then too".split(), k=15))}
        for _ in range(40)
    ]
    (tmp_path / "wide.jsonl").write_text("\n".join(map(json.dumps, texts)))
    model, general, domain = (
        str(model_folder),
        str(tmp_path / "wide.jsonl"),
        str(tmp_path / "domain.jsonl"),
    )
    experiment = {
        "model": model,
        "device": "cpu",
        "general": {"wide": general, "other": general},
        "domains": {"domain": domain},
        "training": {"max_steps": 2, "batch_size": 4, "accumulation": 1, "rank": 2},
        "methods": {"plain": {}},
        "seeds": {"validation": [0], "test": []},
    }
    (tmp_path / "e.yaml").write_text(json.dumps(experiment))
    seen = []
    for turn in range(2):
        importance, run = str(tmp_path / f"{turn}.safetensors"), str(tmp_path / f"run{turn}")
        for words in (
            [
                "record",
                model,
                "--general",
                general,
                "--out",
                importance,
                "--estimator",
                "path",
                "--rank",
                "2",
                "--epochs",
                "1",
            ],
            ["record", model, "--general", general, "--out", importance, "--overwrite"],
            [
                "tune",
                model,
                "--data",
                domain,
                "--importance",
                importance,
                "--general",
                general,
                "--max-steps",
                "2",
                "--device",
                "cpu",
                "--out",
                run,
            ],
            ["compare", str(tmp_path / "e.yaml"), "--out", str(tmp_path / f"compared{turn}")],
        ):
            assert main([*words, "--quiet"]) == 0
            seen.append(still_open())
    assert seen[4:] == [seen[3]] * 4
