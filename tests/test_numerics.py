"""The ends of the numbers and odd models: right, or refused with a reason.

Importance from 1e-30 to 1e30, zero rows, any rank, shared weights.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import SMALL
from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import DenseEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.linear import base_shapes
from forgetless.model.targets import target_weights
from forgetless.penalty.pull import Penalty
from forgetless.record.fisher import Fisher
from forgetless.record.kronecker import Kronecker
from forgetless.record.path import PathIntegral
from forgetless.record.path_factored import PathFactored

TIERS = ["f32", "bf16", "u8", "u4", "factored", "factored:2", "kronecker", "kronecker:2"]


def importance_of(model, tier, size=1.0, zero_rows=()):
    """Importance of about `size` in a tier; whole rows of it zero where asked for."""
    g = torch.Generator().manual_seed(3)
    entries, shapes = {}, {weight.name: weight.shape for weight in target_weights(model)}
    for name, (out, into) in shapes.items():
        rows = torch.ones(out, 1)
        rows[list(zero_rows)] = 0
        if tier.startswith("kronecker"):
            X, Y = (
                torch.randn(out, 2 * out, generator=g) * rows,
                torch.randn(into, 2 * into, generator=g),
            )
            entries[name] = KroneckerEntry(
                Covariance(X @ X.T / (2 * out) * size), Covariance(Y @ Y.T / (2 * into))
            )
        else:
            entries[name] = DenseEntry((torch.rand(out, into, generator=g) + 0.1) * rows * size)
    return Importance(
        entries, {}, {"estimator": "kronecker" if tier.startswith("kronecker") else "fisher"}
    ).to_tier(tier)


def moved(model, size=0.1):
    """Every trained parameter a little off its start."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in target_weights(
            model, names=None if hasattr(model, "peft_config") else "all-linear"
        ):
            for parameter in weight.parameters:
                parameter.add_(size * torch.randn(parameter.shape, generator=g))
    return model


def pulled(model, importance, strength):
    """(pulls by weight, the penalty) of one pull."""
    penalty = Penalty(model, importance, strength=strength)
    for weight in penalty.weights:
        for parameter in weight.parameters:
            parameter.grad = None
    moved(model)
    penalty.pull()
    return [
        parameter.grad.clone() for weight in penalty.weights for parameter in weight.parameters
    ], penalty


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "size", [2.0**-100, 2.0**-50, 2.0**50, 2.0**100]
)  # powers of two: a tier rounds as at 1
def test_the_size_of_importance_is_taken_up_by_the_strength(tiny, tmp_path, tier, size):
    """The pull is linear in strength * importance, from one end of f32 to the other, also through a
    file.
    """
    importance_of(add_adapter(tiny(), names="q_proj,down_proj", rank=3, alpha=6), tier, size).save(
        tmp_path / "i.safetensors"
    )
    far, penalty = pulled(
        add_adapter(tiny(), names="q_proj,down_proj", rank=3, alpha=6),
        Importance.load(tmp_path / "i.safetensors"),
        1 / size,
    )
    model = add_adapter(tiny(), names="q_proj,down_proj", rank=3, alpha=6)
    near, plain = pulled(model, importance_of(model, tier), 1.0)
    for mine, theirs in zip(far, near, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert penalty.energy() / size == pytest.approx(
        plain.energy(), rel=1e-4
    ) and penalty.pull_norm == pytest.approx(plain.pull_norm, rel=1e-4)


@pytest.mark.parametrize("tier", TIERS)
def test_a_pull_that_overflows_is_refused_before_anything_moves(tiny, tier):
    model = add_adapter(tiny(), names="q_proj", rank=3, alpha=6)
    with pytest.raises(ValueError, match=r"the pull is inf .* lower the strength"):
        pulled(model, importance_of(model, tier, 1e30), 1e30)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    penalty = Penalty(model, importance_of(model, tier, 1e30), strength=1e30)
    before = [p.detach().clone() for weight in penalty.weights for p in weight.parameters]
    with penalty.attach(optimizer), pytest.raises(ValueError, match="the pull is inf"):
        optimizer.step()
    assert all(
        torch.equal(a, p)
        for a, p in zip(
            before, (p for weight in penalty.weights for p in weight.parameters), strict=True
        )
    )


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rows", [(0, 3), tuple(range(16))])
def test_rows_of_no_importance_are_not_held(tiny, tier, rows):
    model = add_adapter(tiny(), names="q_proj", rank=3, alpha=6)
    importance = importance_of(model, tier, zero_rows=rows)
    pulls, penalty = pulled(model, importance, 1.0)
    assert all(bool(torch.isfinite(pull).all()) for pull in pulls) and penalty.energy() >= 0
    for weight in penalty.weights:
        if tier != "kronecker:2" or len(rows) == 16:  # whose constant diagonal reaches every row
            assert not bool(weight.B.grad[list(rows)].any())
    if len(rows) == 16:
        assert penalty.energy() == 0.0


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rank", [1, 40])
def test_ranks_of_one_and_beyond_the_weight(tiny, tier, rank):
    """The pull is the gradient of the energy, by autograd through the whole update."""
    model = add_adapter(tiny(), names="q_proj,k_proj", rank=rank, alpha=rank)
    assert all(rank == 1 or rank > min(weight.shape) for weight in target_weights(model))
    importance = importance_of(model, tier)
    pulls, penalty = pulled(model, importance, 0.7)
    factors = [
        p.detach().clone().requires_grad_() for weight in penalty.weights for p in weight.parameters
    ]
    energy = sum(
        importance[weight.name].energy(weight.scale * B @ A)
        for weight, A, B in zip(penalty.weights, factors[::2], factors[1::2], strict=True)
    )
    for mine, theirs in zip(pulls, torch.autograd.grad(0.7 * energy, factors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("rank", [1, 40])
@pytest.mark.parametrize("recorder", [PathIntegral, PathFactored])
def test_recording_at_a_rank_of_one_and_beyond_the_weight(tiny, batch, recorder, rank):
    model = add_adapter(tiny(), names="q_proj,k_proj", rank=rank, alpha=rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with recorder(model).attach(optimizer) as recording:
        for _ in range(3):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, entry in recording.finish().entries.items():
        assert (
            entry.shape == base_shapes(model)[name]
            and bool(torch.isfinite(entry.dense()).all())
            and entry.norm() > 0
        )


class Twice(nn.Module):
    """A language model of one block that is called twice, or of two blocks that share a weight."""

    def __init__(self, *, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(48, 8), nn.Linear(8, 48, bias=False)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.shared = shared
        if shared:
            self.second.weight = self.first.weight
        self.config = LlamaConfig(**SMALL)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False, labels=None):
        x = self.embed(input_ids)
        x = x + torch.tanh(self.first(x))
        x = x + torch.tanh((self.second if self.shared else self.first)(x))
        logits = self.head(x)
        return type(
            "Output",
            (),
            {
                "logits": logits,
                "loss": nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
                ),
            },
        )()


@pytest.mark.parametrize("estimator", [Fisher, Kronecker])
def test_observing_a_module_that_is_called_twice_is_refused(batch, estimator):
    model = Twice()
    with pytest.raises(ValueError, match=r"'first.weight' is used twice in one forward pass"):
        estimator(model, "first").observe(batch)
    assert (
        not model.first._forward_hooks
        and not model.embed._forward_hooks
        and all(p.grad is None for p in model.parameters())
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_path_through_a_module_that_is_called_twice_has_both_gradients(
    batch, full, accumulation
):
    """dL/dU is the sum over both calls: credits of a plain step of gradient descent are the square
    of what autograd says.
    """
    model = Twice().double()
    if not full:
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["first"]))
        moved(model)
    weight = target_weights(model, names="first" if full else None)[0]
    trained = list(weight.parameters)
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    recorder = PathIntegral(model, **({"names": "first"} if full else {}))
    layer = weight.module if full else weight.module.get_base_layer()
    layer.weight.requires_grad_(True)  # the gradient of the base weight is dL/dU
    with recorder.attach(optimizer):
        for rows in batch.chunk(accumulation):
            model(input_ids=rows).loss.backward()
        expected, before = layer.weight.grad.clone(), weight.update()
        optimizer.step()
        decrease = -(expected * (weight.update() - before)).sum()
    assert recorder.decrease == pytest.approx(float(decrease), rel=1e-2) and recorder.decrease > 0


def test_weights_that_two_modules_share_are_refused(batch):
    """Each would be recorded and pulled as if it moved alone."""
    for attempt in (
        lambda: Fisher(Twice(shared=True), "first,second"),
        lambda: target_weights(Twice(shared=True), names="first,second"),
        lambda: target_weights(Twice(shared=True)),
        lambda: target_weights(
            get_peft_model(Twice(shared=True), LoraConfig(r=2, target_modules=["first", "second"]))
        ),
    ):
        with pytest.raises(
            ValueError,
            match=r"'first.weight' and 'second.weight' are one parameter, .* leave it out",
        ):
            attempt()
    with pytest.raises(
        ValueError, match=r"'second.weight' and 'first.weight' are one parameter"
    ):  # also where only one is named: the other moves with it
        target_weights(Twice(shared=True), names="second")


def test_lora_on_the_head_is_held_and_on_tied_embeddings_refused(batch):
    for tied in (False, True):
        torch.manual_seed(0)
        bare = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied))
        model = get_peft_model(
            bare, LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head", "q_proj"])
        )
        if tied:
            with pytest.raises(
                ValueError,
                match=r"'lm_head.weight' and 'model.embed_tokens.weight' are one parameter",
            ):
                target_weights(model)
            continue
        pulls, penalty = pulled(model, importance_of(model, "f32"), 1.0)
        assert [weight.name for weight in penalty.weights][-1] == "lm_head.weight" and all(
            bool(pull.any()) for pull in pulls
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with PathIntegral(model).attach(optimizer) as recorder:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        assert recorder.finish()["lm_head.weight"].norm() > 0


def test_tied_models_are_held_where_all_linear_goes(tiny, batch):
    """The head of a tied model is no target, with an adapter or without."""
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True))
    names = {weight.name for weight in target_weights(bare)}
    assert len(names) == 14 and not any("head" in name or "embed" in name for name in names)
    recorder = Fisher(bare)
    recorder.observe(batch)
    assert set(recorder.finish().entries) == names
    assert {
        weight.name
        for weight in target_weights(add_adapter(bare, names="all-linear", rank=2, alpha=2))
    } == names
