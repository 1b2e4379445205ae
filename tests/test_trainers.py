"""hold() and the callbacks under the transformers Trainer and TRL's trainers: their numbers arrive,
and training is what a hand loop would make of it.
"""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from forgetless import (
    KL,
    HoldCallback,
    PathIntegral,
    Penalty,
    PenaltyCallback,
    RecorderCallback,
    add_term,
    hold,
)
from forgetless.budget.open import _token_rows
from forgetless.errors import OptionError
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.optimizer_step import unwrapped_optimizer
from forgetless.model.packing import check_packing, moved_by_the_first
from forgetless.model.targets import target_weights

NUMBERS = {"energy", "pull_norm", "pull_ratio"}


def ones(weights, scale=1.0):
    return Importance({w.name: DenseEntry(torch.full(w.shape, scale)) for w in weights})


@pytest.fixture
def adapted(tiny):
    """A tiny Llama with LoRA away from zero, so that there is something to pull from the first step
    on.
    """
    return away_from_zero(tiny())


@pytest.fixture
def precise(tiny):
    """The same in f64, for comparisons with a hand loop."""
    return away_from_zero(tiny(dtype=torch.float64))


def away_from_zero(model):
    model = add_adapter(model, names="q_proj,v_proj", rank=2, alpha=4)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.1)
    return model


def arguments(folder, kind=TrainingArguments, **given):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    return kind(**{**settings, **given})


def rows(batch):
    return Dataset.from_list(
        [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
            for ids in batch.tolist() * 2
        ]
    )


def plain_trainer(model, batch, tokenizer, folder, **given):
    return Trainer(model=model, args=arguments(folder, **given), train_dataset=rows(batch))


def sft_trainer(model, batch, tokenizer, folder, **given):
    from trl import SFTConfig, SFTTrainer

    config = arguments(folder, SFTConfig, gradient_checkpointing=False, **given)
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"text": "the cat sat on the mat"}] * 8),
        processing_class=tokenizer,
    )


def dpo_trainer(model, batch, tokenizer, folder, **given):
    from trl import DPOConfig, DPOTrainer

    config = arguments(folder, DPOConfig, gradient_checkpointing=False, **given)
    pairs = Dataset.from_list(
        [{"prompt": "the cat", "chosen": " sat on", "rejected": " and dog"}] * 8
    )
    return DPOTrainer(model=model, args=config, train_dataset=pairs, processing_class=tokenizer)


def grpo_trainer(model, batch, tokenizer, folder, **given):
    from trl import GRPOConfig, GRPOTrainer

    config = arguments(
        folder,
        GRPOConfig,
        gradient_checkpointing=False,
        num_generations=2,
        max_completion_length=4,
        **given,
    )
    reward = lambda completions, **_: [float(len(text)) for text in completions]
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "the cat"}] * 8),
        processing_class=tokenizer,
    )


TRAINERS = {
    "transformers": plain_trainer,
    "sft": sft_trainer,
    "dpo": dpo_trainer,
    "grpo": grpo_trainer,
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_numbers_arrive_in_log_console_and_tensorboard(
    adapted, batch, tokenizer, tmp_path, kind, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = TRAINERS[kind](adapted, batch, tokenizer, tmp_path, report_to="tensorboard")
    callback = hold(trainer, ones(target_weights(trainer.model)), strength=0.5)
    start = callback.penalty.energy()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(entry.keys() >= NUMBERS for entry in logged)
    assert logged[0]["energy"] == pytest.approx(start, rel=1e-5) and logged[0]["pull_norm"] > 0
    printed = capsys.readouterr()
    assert "'pull_ratio'" in printed.out + printed.err
    found = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    found.Reload()
    assert {f"train/{name}" for name in NUMBERS} <= set(found.Tags()["scalars"])
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert not optimizer._optimizer_step_pre_hooks  # nothing is left behind


def test_a_callback_added_by_hand_pulls_and_logs(adapted, batch, tmp_path):
    penalty = Penalty(adapted, ones(target_weights(adapted)), strength=0.5)
    before = penalty.energy()
    trainer = Trainer(
        model=adapted,
        args=arguments(tmp_path),
        train_dataset=rows(batch),
        callbacks=[PenaltyCallback(penalty)],
    )
    trainer.train()
    assert penalty.energy() < before
    assert all(entry.keys() >= NUMBERS for entry in trainer.state.log_history if "loss" in entry)


def test_the_trainer_does_what_a_hand_loop_does(precise, batch, tmp_path):
    """Clipped task gradient, then pull, then step; accumulation does not multiply the pull."""
    twin = copy.deepcopy(precise)
    data = [
        {"input_ids": ids, "labels": ids} for ids in batch.tolist()
    ]  # one batch, so that the order does not matter
    trainer = Trainer(
        model=precise,
        args=arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1),
        train_dataset=Dataset.from_list(data),
    )
    hold(trainer, ones(target_weights(precise)), strength=0.5)
    trainer.train()
    optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    with Penalty(twin, ones(target_weights(twin)), strength=0.5).attach(optimizer):
        for _ in range(4):
            twin(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(target_weights(precise), target_weights(twin), strict=True):
        torch.testing.assert_close(a.B, b.B, rtol=1e-6, atol=1e-9)


def test_full_fine_tuning_holds_what_is_trained(tiny, batch, tmp_path):
    model = tiny().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(batch))
    callback = hold(trainer, ones(target_weights(model)), strength=1.0)
    assert [w.kind for w in callback.penalty.weights] == ["q_proj", "q_proj"]
    trainer.train()
    assert callback.penalty.energy() > 0


def test_a_non_finite_gradient_stops_training_with_its_step(adapted, batch, tmp_path):
    trainer = Trainer(model=adapted, args=arguments(tmp_path), train_dataset=rows(batch))
    hold(trainer, ones(target_weights(adapted)), strength=1.0)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        compute(*a, **k) * (float("nan") if trainer.state.global_step == 2 else 1.0)
    )
    with pytest.raises(ValueError, match="at step 3"):
        trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in adapted.parameters())


@pytest.mark.parametrize("gradient", ["exact", "effective"])
def test_recorder_callback_equals_a_hand_loop(precise, batch, tmp_path, gradient):
    twin = copy.deepcopy(precise)
    clip = 0.1 if gradient == "exact" else 0.0
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in batch.tolist()])
    given = dict(
        max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2, max_grad_norm=clip
    )
    recorder = PathIntegral(precise, gradient=gradient)
    Trainer(
        model=precise,
        args=arguments(tmp_path, **given),
        train_dataset=data,
        callbacks=[RecorderCallback(recorder)],
    ).train()
    theirs = recorder.finish()

    by_hand = PathIntegral(twin, gradient=gradient)
    optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    twin.train()
    with by_hand.attach(optimizer):
        for _ in range(3):
            twin(input_ids=batch, labels=batch).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            by_hand.end_epoch()
    ours = by_hand.finish()
    assert theirs.info["settings"]["epochs"] == 3 and theirs.info["settings"]["steps"] == 3
    assert recorder.decrease == pytest.approx(by_hand.decrease, rel=1e-5)
    for name in ours:
        torch.testing.assert_close(
            theirs[name].values,
            ours[name].values,
            rtol=1e-4,
            atol=1e-9 * float(ours[name].values.max()),
        )


def test_recorder_callback_refuses_clipping_where_it_would_be_recorded(
    adapted, tiny, batch, tmp_path
):
    for recorder, model in (
        (PathIntegral(adapted, gradient="effective"), adapted),
        (PathIntegral(full := tiny()), full),
    ):
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=rows(batch),
            callbacks=[RecorderCallback(recorder)],
        )
        with pytest.raises(OptionError, match=r"max_grad_norm is 1\.0"):
            trainer.train()
    args = arguments(tmp_path, max_grad_norm=0.0)
    args.fp16 = True
    with pytest.raises(OptionError, match="trainer=trainer"):
        RecorderCallback(PathIntegral(adapted)).on_train_begin(args, None, None, optimizer=None)


@pytest.mark.parametrize("first", ["hold", "callback"])
def test_a_second_hold_takes_the_place_of_the_first(adapted, batch, tmp_path, caplog, first):
    """A notebook's cell that is run again does not hold twice as hard."""
    importance = ones(target_weights(adapted))
    twin = copy.deepcopy(adapted)
    once = Trainer(model=twin, args=arguments(tmp_path), train_dataset=rows(batch))
    hold(once, importance, strength=0.5)
    once.train()
    callbacks = [HoldCallback(importance, strength=3.0)] if first == "callback" else None
    twice = Trainer(
        model=adapted, args=arguments(tmp_path), train_dataset=rows(batch), callbacks=callbacks
    )
    if first == "hold":
        hold(twice, importance, strength=3.0)
    with caplog.at_level(logging.WARNING, "forgetless"):
        hold(twice, importance, strength=0.5)
    assert "takes the place of the old one" in caplog.text
    twice.train()
    for a, b in zip(target_weights(adapted), target_weights(twin), strict=True):
        assert torch.equal(a.B, b.B) and torch.equal(a.A, b.A)


def test_what_is_held_says_so(adapted, batch, tmp_path, capsys):
    importance = ones(target_weights(adapted))
    importance.info.update(estimator="fisher", model={"name": "some/<model>"})
    assert repr(importance) == (
        "<Importance: fisher importance (f32) of some/<model>, of 4 weights>"
    )
    trainer = Trainer(model=adapted, args=arguments(tmp_path), train_dataset=rows(batch))
    held = hold(trainer, importance, strength=0.5)
    assert repr(held) == (
        "<holds 4 weights (q_proj, v_proj) by fisher importance (f32) of some/<model>, "
        "strength 0.5, anchor base; not trained yet>"
    )
    shown = held._repr_html_()
    assert shown.count("<tr>") == len(held.rows()) and "some/&lt;model&gt;" in shown
    trainer.train()
    said = capsys.readouterr().err
    assert "forgetless: holds 4 weights (q_proj, v_proj) by fisher importance" in said
    lines = dict(line.split(maxsplit=1) for line in str(held).splitlines()[1:])
    assert lines["strength"] == "0.5" and lines["state"] == "step 4"
    assert float(lines["energy"].split()[0]) > 0


def test_a_block_lets_go_of_the_trainer(adapted, batch, tmp_path):
    trainer = Trainer(model=adapted, args=arguments(tmp_path), train_dataset=rows(batch))
    before = list(trainer.callback_handler.callbacks)
    with hold(trainer, ones(target_weights(adapted)), strength=0.5) as held:
        trainer.train()
        assert held.penalty.energy() > 0
    assert trainer.callback_handler.callbacks == before and held.rows()[-1] == ("state", "let go")
    with pytest.raises(KeyboardInterrupt), hold(trainer, ones(held.penalty.weights), strength=1.0):
        raise KeyboardInterrupt
    assert trainer.callback_handler.callbacks == before


def test_plain_float16_is_said(batch, tiny, tmp_path, caplog):
    """Without loss scaling small gradients are lost."""
    trainer = Trainer(model=tiny().half(), args=arguments(tmp_path), train_dataset=rows(batch))
    with caplog.at_level(logging.WARNING, "forgetless"):
        held = hold(trainer, ones(target_weights(trainer.model)), strength=1.0)
        held.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert "without loss scaling" in caplog.text


def of_kind(kind):
    """A tiny random model of another architecture."""
    from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MambaConfig, OPTConfig

    heads = dict(num_hidden_layers=2, num_attention_heads=2)
    made = {
        "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
        "opt": lambda: OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, **heads
        ),
        "bloom": lambda: BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
        "mamba": lambda: MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made[kind]())


@pytest.mark.parametrize("kind", ["opt", "bloom", "mamba"])
def test_packed_documents_that_read_each_other_are_found_out(kind):
    with pytest.raises(ValueError, match="packed documents read each other in this model"):
        check_packing(of_kind(kind))


def test_packed_documents_stay_apart_where_positions_make_the_mask(tiny, adapted):
    for model in (tiny(), adapted, of_kind("gpt2")):
        model.train()
        assert moved_by_the_first(model) == 0 and model.training


def train_sft(model, tokenizer, folder, term=False, **given):
    """A held model after 3 steps of TRL's SFTTrainer on texts of two lengths."""
    from trl import SFTConfig, SFTTrainer

    config = arguments(folder, SFTConfig, **{"gradient_checkpointing": False, **given})
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"text": "the cat sat on the mat"}, {"text": "a dog"}]),
        processing_class=tokenizer,
    )
    hold(trainer, ones(target_weights(model)), strength=0.5)
    if term:
        add_term(trainer, KL(model, [(list(range(3, 9)), [True] * 6)] * 2, weight=1.0))
    trainer.train()
    return trainer


def same_weights(one, other):
    for a, b in zip(target_weights(one), target_weights(other), strict=True):
        torch.testing.assert_close(a.A, b.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.B, b.B, rtol=1e-4, atol=1e-6)


def test_trl_makes_no_logits_and_the_pull_needs_none(adapted, tokenizer, tmp_path):
    """Terms such as the divergence ask for theirs, where something is scored alone."""
    made = []
    head = adapted.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: made.append(tuple(logits.shape)))
    trainer = train_sft(adapted, tokenizer, tmp_path, max_steps=2)
    assert not made and trainer.state.log_history[0]["pull_norm"] > 0
    trainer = train_sft(adapted, tokenizer, tmp_path, max_steps=2, term=True)
    assert made == [(10, head.out_features)] * 4  # of base and tuned, in two steps
    assert trainer.state.log_history[0]["kl"] > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_change_nothing(adapted, tokenizer, tmp_path, reentrant):
    twin = copy.deepcopy(adapted)
    train_sft(adapted, tokenizer, tmp_path, max_steps=2, term=True)
    given = dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    train_sft(twin, tokenizer, tmp_path, max_steps=2, term=True, **given)
    same_weights(adapted, twin)


def test_rows_without_padding_are_held_as_padded_ones(adapted, tokenizer, tmp_path):
    twin = copy.deepcopy(adapted)
    train_sft(adapted, tokenizer, tmp_path, max_steps=2)
    train_sft(twin, tokenizer, tmp_path, max_steps=2, padding_free=True, max_length=None)
    same_weights(adapted, twin)


def test_only_what_the_assistant_says_is_learned_from(adapted, tokenizer, tmp_path):
    """And counts as learned, where a budget is kept."""
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn['role'] == 'assistant' %}"
        "{% generation %}{{ turn['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ turn['content'] }} {% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
    ]
    config = arguments(
        tmp_path, SFTConfig, gradient_checkpointing=False, assistant_only_loss=True, max_steps=1
    )
    trainer = SFTTrainer(
        model=adapted,
        args=config,
        train_dataset=Dataset.from_list([{"messages": chat}] * 2),
        processing_class=tokenizer,
    )
    [(ids, scored), _] = _token_rows(trainer.train_dataset)
    said = tokenizer.decode([token for token, counts in zip(ids, scored, strict=True) if counts])
    assert said.startswith("sat on") and "cat" not in said
    hold(trainer, ones(target_weights(adapted)), strength=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["pull_norm"] > 0


class Gradients(TrainerCallback):
    """The gradients right before the optimizer of a trainer steps, and its first logs."""

    def on_train_begin(self, args, state, control, **kwargs):
        optimizer = unwrapped_optimizer(kwargs["optimizer"])
        optimizer.register_step_pre_hook(lambda *_: self.note(kwargs["model"]))

    def note(self, model):
        self.seen = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs = getattr(self, "logs", None) or dict(logs)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_pull_adds_to_a_trainers_own_kl_and_changes_nothing_of_it(
    adapted, batch, tokenizer, tmp_path, kind
):
    """Gradients are theirs, clipped, plus the pull; the reference is what the adapter was at the
    start, and is not pulled.
    """
    models = [adapted, copy.deepcopy(adapted)]
    watches = []
    for model, strength in zip(models, (0.0, 0.5), strict=True):
        given = dict(beta=0.2, max_steps=1, max_grad_norm=0.05)
        trainer = TRAINERS[kind](model, batch, tokenizer, tmp_path, **given)
        start = copy.deepcopy(model)
        hold(trainer, ones(target_weights(model)), strength=strength)
        watches.append(Gradients())
        trainer.add_callback(watches[-1])
        trainer.train()
    alone, held = watches
    Penalty(start, ones(target_weights(start)), strength=0.5).pull()
    pulls = {name: p.grad for name, p in start.named_parameters() if p.grad is not None}
    assert alone.seen.keys() == held.seen.keys() == pulls.keys()
    for name, pull in pulls.items():
        torch.testing.assert_close(held.seen[name], alone.seen[name] + pull, rtol=1e-4, atol=1e-6)
    for name in ("loss", "grad_norm", "kl" if kind == "grpo" else "rewards/chosen"):
        assert alone.logs[name] == held.logs[name]
    adapted = dict(models[1].named_parameters())
    for name, p in start.named_parameters():
        if ".default." in name:
            reference = adapted[name.replace(".default.", ".ref.")]
            assert torch.equal(reference, p) and not torch.equal(adapted[name], p)
