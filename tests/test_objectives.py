"""What stands in place of the cross-entropy, against its slow twin, numbers by hand, TRL's own, and
brute force on the rows.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from forgetless.errors import OptionError
from forgetless.methods.learning import learn_by
from forgetless.methods.objectives import (
    Objective,
    dft_rows,
    eaft_rows,
    masked_kl_rows,
    reference_loss,
    summed,
)
from forgetless.methods.table import chosen
from forgetless.methods.terms import Replay
from forgetless.methods.training_rows import self_dialogues, stm, token_losses
from forgetless.model.adapters import add_adapter
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve

ROWS = {
    "eaft": eaft_rows,
    "dft": dft_rows,
    "masked-kl": lambda *given: masked_kl_rows(*given, weight=0.7),
}


def drawn(tokens=7, words=31, seed=0):
    """Logits of a model and of its base, and the tokens that are there."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, words, generator=g)
    base = 3 * torch.randn(tokens, words, generator=g)
    return logits, base, torch.randint(words, (tokens,), generator=g)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("at_a_time", [3, 1000])
def test_the_closed_form_is_the_twin_and_its_gradient(name, at_a_time, monkeypatch):
    monkeypatch.setattr("forgetless.methods.objectives.rows_at_a_time", lambda _: at_a_time)
    logits, base, targets = drawn()
    slow, fast = logits.double().requires_grad_(), logits.double().requires_grad_()
    expected = reference_loss(name, slow, targets, base.double(), 0.7)
    expected.backward()
    made = summed(fast, targets, base.double(), ROWS[name])
    (made.nats / 5).backward()
    torch.testing.assert_close(made.nats, expected.detach())
    torch.testing.assert_close(fast.grad * 5, slow.grad)
    plain = nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert made.cross_entropy == pytest.approx(float(plain))


def test_weights_by_hand():
    """Two words: the entropy of (1/4, 3/4) over log 2, and the probability 1/4."""
    log_q = torch.tensor([[0.25, 0.75]]).log()
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    made = eaft_rows(log_q, torch.tensor([0]))
    assert float(made.weights) == pytest.approx(entropy / math.log(2))
    assert float(made.nats) == pytest.approx(entropy / math.log(2) * math.log(4))
    assert float(dft_rows(log_q, torch.tensor([0])).nats) == pytest.approx(math.log(4) / 4)


def test_other_tokens_that_keep_their_proportions_cost_nothing():
    """q = (.6, .1, .3) and p = (.2, .2, .6) without the first are both (1/4, 3/4)."""
    log_q, log_p = (torch.tensor([q]).log() for q in ((0.6, 0.1, 0.3), (0.2, 0.2, 0.6)))
    made = masked_kl_rows(log_q, torch.tensor([0]), log_p, weight=100.0)
    assert float(made.nats) == pytest.approx(-math.log(0.6), rel=1e-5)
    torch.testing.assert_close(made.gradient, torch.tensor([[-0.4, 0.1, 0.3]]))


def test_a_token_of_which_the_model_is_sure_otherwise_teaches_eaft_little():
    logits = torch.zeros(2, 20)
    logits[0, 3] = 12.0  # sure of token 3, where token 5 stands
    made = eaft_rows(logits.log_softmax(-1), torch.tensor([5, 5]))
    assert float(made.weights[1]) == pytest.approx(1.0)  # no idea
    assert float(made.weights[0]) < 1e-3
    assert float(made.gradient[0].abs().max()) < 1e-3 < float(made.gradient[1].abs().max())


def trained(tiny, tmp_path, *, objective=None, full=False, rows=None, **settings):
    """The trained parameters after two steps of TRL's trainer on four rows, and its log."""
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = tiny()
    if not full:
        model = add_adapter(model, names="all-linear", rank=2, alpha=4.0)
    g = torch.Generator().manual_seed(1)
    rows = rows or [torch.randint(3, 48, (n,), generator=g).tolist() for n in (5, 9, 7, 4)]
    data = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        **{"per_device_train_batch_size": 4, **settings},
    )
    processing = SimpleNamespace(pad_token_id=0)
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(data),
        data_collator=DataCollatorForLanguageModeling(processing.pad_token_id),
        processing_class=tokenizer(tmp_path),
    )
    if objective is not None:
        learn_by(trainer, objective)
    trainer.train()
    parameters = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    return parameters, trainer.state.log_history


def tokenizer(folder):
    """A tokenizer of 48 words, which the trainer wants to have."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def test_dft_is_that_of_trl(tiny, tmp_path):
    ours, log = trained(tiny, tmp_path, objective=Objective(dft_rows))
    theirs, _ = trained(tiny, tmp_path, loss_type="dft")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    first = log[0]
    assert first["loss"] < first["cross_entropy"] and 0 < first["token_weight"] < 0.2
    assert first["num_tokens"] == 25


def test_a_step_does_not_depend_on_gradient_accumulation(tiny, tmp_path):
    one, _ = trained(tiny, tmp_path, objective=Objective(eaft_rows))
    four, _ = trained(
        tiny,
        tmp_path,
        objective=Objective(eaft_rows),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_masked_kl_starts_as_the_cross_entropy_and_asks_the_base(tiny, tmp_path, full):
    """In the first step model and base are one, so the divergence and its gradient are nothing."""
    rows = Objective(ROWS["masked-kl"], from_base=True)
    held, log = trained(tiny, tmp_path, objective=rows, full=full)
    assert log[0]["loss"] == pytest.approx(log[0]["cross_entropy"], rel=1e-4)
    assert log[1]["loss"] > log[1]["cross_entropy"] and log[1]["token_weight"] == 1
    free, _ = trained(tiny, tmp_path, full=full)
    assert any(not torch.equal(a, b) for a, b in zip(held, free, strict=True))


def setup_of(**given):
    return SimpleNamespace(
        options=SimpleNamespace(batch_size=2, **given),
        tokenizer=SimpleNamespace(pad_token_id=0),
        text=[([5, 6, 7], [False, True, True])],
    )


def test_stm_leaves_out_what_surprises_the_base(tiny):
    """Against the probability of each token, row by row and without padding."""
    model = tiny()
    g = torch.Generator().manual_seed(1)
    pieces = [torch.randint(3, 48, (n,), generator=g).tolist() for n in (5, 9, 7)]
    rows = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in pieces]
    perplexities = []
    for row in pieces:
        with torch.no_grad():
            q = model(torch.tensor([row])).logits[0].softmax(-1)
        perplexities.append([1 / float(q[at - 1, row[at]]) for at in range(2, len(row))])
    most = sorted(p for of in perplexities for p in of)[7] * 1.0001
    made = list(stm(setup_of(stm_perplexity=most), model, rows))
    expected = [
        [-100, -100, *(token if p <= most else -100 for token, p in zip(row[2:], of, strict=True))]
        for row, of in zip(pieces, perplexities, strict=True)
    ]
    assert [row["labels"] for row in made] == [row for row in expected if set(row) != {-100}]
    assert sum(label != -100 for row in made for label in row["labels"]) == 8
    nats = token_losses(model, [(row, [True] * len(row)) for row in pieces])
    assert nats[1][1:] == pytest.approx([math.log(p) for p in perplexities[1]], rel=1e-5)
    with pytest.raises(ValueError, match="nothing is left to learn; give a larger"):
        stm(setup_of(stm_perplexity=1.0001), model, rows)


def test_self_dialogues_stand_after_the_rows(tiny):
    rows = [{"input_ids": [3, 4], "labels": [-100, 4]}]
    made = list(self_dialogues(setup_of(), tiny(), rows))
    assert made == [*rows, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]


def test_the_weight_of_replayed_tokens_multiplies_their_gradient(tiny):
    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=4.0)
    text = [([5, 6, 7, 8], [True] * 4)]
    gradients = []
    for weight in (1.0, 30.0):
        model.zero_grad()
        Replay(model, text, share=0.25, tokens_per_step=12.0, weight=weight).add(0)
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(gradients[1], 30 * gradients[0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "eaft,dft"}, "each brings its own objective"),
        ({"method": "eaft", "masked_weight": 1.0}, "--masked-weight is not used by --method eaft"),
        ({"method": "stm", "stm_perplexity": 0.5}, "--stm-perplexity must be above 1"),
        ({"method": "self-dialogues"}, "--method self-dialogues needs --replay"),
        (
            {"method": "la-lora", "replay": "kept", "strength": 1.0},
            "for --method kl, replay, self-dialogues; found la-lora",
        ),
        (
            {"method": "replay", "replay": "t.txt", "importance": "i"},
            "--importance is used by --method replay where it keeps answers",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given, expected):
    with pytest.raises(OptionError, match=expected):
        chosen(resolve(TuneOptions, {"model": "m", "data": "d", "out": "o", **given}))


def test_a_mixture_whose_router_has_a_loss_is_refused():
    with pytest.raises(ValueError, match="the router of this model has a loss of its own"):
        learn_by(SimpleNamespace(aux_loss_enabled=True), Objective(eaft_rows))
