"""Estimators that watch: against brute force and closed forms in f64, whatever the batch size, and
without a trace on the model.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from forgetless.data.encoding import collate
from forgetless.errors import OptionError
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.penalty.fit import check_fit
from forgetless.record.activation import Activation
from forgetless.record.fisher import Fisher
from forgetless.record.kronecker import Kronecker
from forgetless.record.path import PathIntegral


@pytest.fixture
def text():
    """Five pieces of different lengths; the last two are chats of which only the end (or the
    middle) is scored.
    """
    g = torch.Generator().manual_seed(2)
    pieces = [(torch.randint(3, 48, (n,), generator=g).tolist(), [True] * n) for n in (12, 7, 2)]
    pieces += [(torch.randint(3, 48, (9,), generator=g).tolist(), [i >= 6 for i in range(9)])]
    pieces += [(torch.randint(3, 48, (10,), generator=g).tolist(), [2 <= i < 5 for i in range(10)])]
    return pieces


def observe(recorder, pieces, size):
    for start in range(0, len(pieces), size):
        recorder.observe(**collate(pieces[start : start + size], 0))
    return recorder.finish()


def one_by_one(model, pieces):
    """Each piece's ids and labels as tensors of one row, and its summed loss, the plainest way."""
    for ids, scored in pieces:
        row = torch.tensor([ids])
        labels = torch.tensor([[t if s else -100 for t, s in zip(ids, scored, strict=True)]])
        loss = nn.functional.cross_entropy(
            model(input_ids=row).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        yield (
            loss,
            int((labels[0, 1:] != -100).sum()),
            max(i for i, s in enumerate(scored) if s),
        )  # loss, scored tokens, tokens that count


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [1, 5])
def test_fisher_is_the_squared_gradient_of_every_sequence(tiny, text, kind, size):
    model = tiny(kind, torch.float64)
    importance = observe(Fisher(model), text, size)
    weights = target_weights(model)
    squares, tokens = {w.name: 0 for w in weights}, 0
    for loss, scored, _ in one_by_one(model.eval(), text):
        tokens += scored
        for w, g in zip(weights, torch.autograd.grad(loss, [w.W for w in weights]), strict=True):
            squares[w.name] = squares[w.name] + w.oriented(g) ** 2
    assert importance.info["settings"]["tokens"] == tokens == 11 + 6 + 1 + 3 + 3
    for w in weights:
        close(importance[w.name].values, squares[w.name] / tokens)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [1, 5])
def test_kronecker_is_the_mean_outer_product_of_every_token(tiny, text, kind, size):
    model = tiny(kind, torch.float64)
    importance = observe(Kronecker(model), text, size)
    seen = {}
    for w in target_weights(model):
        w.module.register_forward_hook(
            lambda _, args, output, name=w.name: seen.update({name: (args[0], output)})
        )
    A, G = dict.fromkeys(importance, 0), dict.fromkeys(importance, 0)
    tokens = positions = 0
    for loss, scored, counted in one_by_one(model.eval(), text):
        tokens, positions = tokens + scored, positions + counted
        d = dict(
            zip(
                seen,
                torch.autograd.grad(loss, [output for _, output in seen.values()]),
                strict=True,
            )
        )
        for name, (x, _) in seen.items():
            for t in range(counted):
                A[name] = A[name] + torch.outer(x[0, t], x[0, t]).detach()
                G[name] = G[name] + torch.outer(d[name][0, t], d[name][0, t])
            assert not d[name][0, counted:].any()  # what does not count has no gradient
    for name, entry in importance.entries.items():
        close(entry.in_cov.matrix, A[name] / positions)
        close(entry.out_cov.matrix, G[name] / tokens)


def test_activation_is_the_mean_squared_input(tiny, text):
    model = tiny(dtype=torch.float64)
    importance, covariances = (
        observe(Activation(model), text, 2),
        observe(Kronecker(model), text, 2),
    )
    for name, entry in importance.entries.items():
        close(entry.dense(), covariances[name].in_cov.diagonal().expand(entry.shape))
        assert entry.tier == "factored"


def test_weights_that_read_the_same_input_share_its_covariance(tiny, text):
    importance = observe(Kronecker(tiny()), text, 5)
    block = {
        name.split(".")[-2]: entry
        for name, entry in importance.entries.items()
        if ".layers.0." in name
    }
    assert block["q_proj"].in_cov is block["k_proj"].in_cov is block["v_proj"].in_cov
    assert block["gate_proj"].in_cov is block["up_proj"].in_cov is not block["q_proj"].in_cov
    assert len({id(entry.in_cov) for entry in importance.entries.values()}) == 8
    cut = importance.to_tier("kronecker:4")
    assert len({id(entry.in_cov) for entry in cut.entries.values()}) == 8


@pytest.mark.parametrize("estimator", [Fisher, Kronecker])
def test_sampled_labels_do_not_depend_on_the_batch_size_and_follow_the_seed(tiny, text, estimator):
    model = tiny(dtype=torch.float64)
    first, second, other = (
        observe(estimator(model, labels="sampled", seed=seed), text, size)
        for seed, size in ((3, 1), (3, 4), (4, 4))
    )
    for name in first:
        close(second[name].dense(), first[name].dense())
        assert not torch.allclose(other[name].dense(), first[name].dense())
    assert first.info["settings"]["nats"] == pytest.approx(
        second.info["settings"]["nats"]
    )  # of the text, not of the samples


@pytest.mark.parametrize("estimator", [Fisher, Kronecker, Activation])
def test_observing_an_adapted_model_sees_the_bare_base_and_leaves_no_trace(tiny, text, estimator):
    bare = observe(estimator(tiny()), text, 2)
    model = add_adapter(tiny(), names="q_proj,v_proj", rank=3, alpha=6, dropout=0.1)
    for weight in target_weights(model):
        nn.init.normal_(weight.B, std=0.5)
    frozen = target_weights(model)[0].A.requires_grad_(False)
    model.train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    importance = observe(estimator(model, "all-linear"), text, 2)
    assert list(importance) == list(bare)
    for name in bare:
        torch.testing.assert_close(importance[name].dense(), bare[name].dense())
    for name, p in model.named_parameters():
        assert (
            torch.equal(p, before[name][0])
            and p.requires_grad == before[name][1]
            and p.grad is None
        )
    assert not frozen.requires_grad and all(module.training for module in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    loss = lambda: (
        model.eval()(input_ids=torch.tensor([text[0][0]]), labels=torch.tensor([text[0][0]])).loss
    )
    with model.disable_adapter():
        off = loss()
    assert not torch.allclose(loss(), off)  # the adapter is on again


def test_exceptions_leave_no_trace_and_add_nothing(tiny, text):
    model = tiny()
    recorder = Fisher(model, "q_proj")
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="loss on the general text is nan"):
        recorder.observe(torch.tensor([[4, 5, 6]]))
    assert (
        recorder.tokens == 0
        and not any(m._forward_hooks for m in model.modules())
        and all(p.requires_grad for p in model.parameters())
    )
    with pytest.raises(ValueError, match="nothing was observed"):
        recorder.finish()


@pytest.mark.parametrize("at", ["first", "middle"])
def test_a_batch_that_failed_half_way_is_never_counted_twice(tiny, text, at, monkeypatch):
    """It was added up to the layer at which it failed, and again when it was observed again."""
    model = tiny(dtype=torch.float64)
    batch = collate(text, 0)
    whole, recorder = Fisher(model, labels="sampled"), Fisher(model, labels="sampled")
    whole.observe(**batch)
    whole.observe(**batch)
    recorder.observe(**batch)
    state, seen = copy.deepcopy(recorder.state_dict()), []
    original = Fisher._see

    def fails(self, layer, *given):
        if len(seen) == 3:
            raise MemoryError("no room")
        seen.append(layer)
        original(self, layer, *given)

    def fails_at_once(*given):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        if at == "middle":
            patch.setattr(Fisher, "_see", fails)
        else:
            patch.setattr(recorder, "_propagate", fails_at_once)
        with pytest.raises(MemoryError):
            recorder.observe(**batch)
    if at == "middle":
        for call in (lambda: recorder.observe(**batch), recorder.finish, recorder.state_dict):
            with pytest.raises(ValueError, match="half of it had been added up"):
                call()
        recorder = Fisher(model, labels="sampled")
        recorder.load_state_dict(state)
    recorder.observe(**batch)
    expected, found = whole.finish(), recorder.finish()
    for name in expected:
        assert torch.equal(found[name].values, expected[name].values)


@pytest.mark.parametrize("make", [Fisher, lambda model: PathIntegral(model)])
def test_what_is_saved_knows_its_model(tiny, text, tmp_path, make):
    """A file made in Python had no fingerprint, so that a Llama's was accepted on a Mistral."""
    model = tiny("llama")
    if make is Fisher:
        recorder = Fisher(model)
        recorder.observe(**collate(text, 0))
        importance = recorder.finish()
    else:
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        recorder = PathIntegral(adapted)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
        recorder.attach(optimizer)
        adapted(**collate(text, 0)).loss.backward()
        optimizer.step()
        importance = recorder.finish()
    importance.save(tmp_path / "i.safetensors")
    importance = Importance.load(tmp_path / "i.safetensors")
    names = list(importance)
    check_fit(tiny("llama"), importance, names, "base")
    torch.manual_seed(3)
    other = tiny("mistral")
    nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="recorded on another base model"):
        check_fit(other, importance, names, "base")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_sides_and_lone_tokens(tiny, kind):
    """Left padding, and rows in which nothing is scored, change nothing, with learned positions
    neither.
    """
    model = tiny(kind, dtype=torch.float64)
    ids = [5, 9, 11, 30]
    plain, padded = Fisher(model), Fisher(model)
    plain.observe(torch.tensor([ids]))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, *ids], [-100] * 6, [4, -100, -100, -100, -100, -100]])
    padded.observe(torch.tensor([[0, 0, *ids], [4] * 6, [4, 0, 0, 0, 0, 0]]), mask, labels)
    assert padded.observe(torch.tensor([[4]])) == 0.0
    a, b = plain.finish(), padded.finish()
    assert b.info["settings"]["tokens"] == 3 and b.info["settings"]["sequences"] == 1
    for name in a:
        close(b[name].values, a[name].values)


@pytest.mark.parametrize("estimator", [Fisher, Kronecker, Activation])
def test_a_saved_state_goes_on_exactly(tiny, text, estimator):
    model = tiny()
    kwargs = {} if estimator is Activation else {"labels": "sampled"}
    whole, first, second = (estimator(model, "q_proj,down_proj", **kwargs) for _ in range(3))
    expected = observe(whole, text, 1)
    for piece in text[:2]:
        first.observe(**collate([piece], 0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found = observe(second, text[2:], 1)
    assert all(torch.equal(found[name].dense(), expected[name].dense()) for name in expected)
    assert found.info == expected.info
    with pytest.raises(ValueError, match="other target weights"):
        estimator(model, "q_proj").load_state_dict(first.state_dict())


def observe_in_groups(recorder, pieces, groups):
    recorder.look(torch.tensor([pieces[0][0]]))
    assert recorder.divide(groups) == groups
    for _ in range(groups):
        for piece in pieces:
            recorder.observe(**collate([piece], 0))
        recorder.end_pass()
    return recorder.finish()


SEPARATE = [
    (Fisher, {"labels": "sampled"}),
    (Kronecker, {"labels": "sampled"}),
    (Kronecker, {"rank": 3}),
    (Activation, {}),
]


@pytest.mark.parametrize("groups", [2, 5])
@pytest.mark.parametrize(("estimator", "kwargs"), SEPARATE)
def test_groups_give_the_result_of_one_pass_bit_for_bit(tiny, text, estimator, kwargs, groups):
    model = tiny()
    expected = observe(estimator(model, **kwargs), text, 1)
    found = observe_in_groups(estimator(model, **kwargs), text, groups)
    assert list(found) == list(expected) and found.info == expected.info
    for name, entry in expected.entries.items():
        assert all(
            torch.equal(found[name].tensors()[key], part) for key, part in entry.tensors().items()
        )
    if estimator is Kronecker:  # shared input covariances are stored once
        assert (
            len({id(e.in_cov) for e in found.entries.values()})
            == len({id(e.in_cov) for e in expected.entries.values()})
            == 8
        )


def test_a_group_holds_only_its_own_sums(tiny, text):
    recorder = Kronecker(tiny(), rank=3)
    recorder.look(torch.tensor([text[0][0]]))
    whole, largest = recorder.bytes(), recorder.bytes(4)
    recorder.divide(4)
    assert whole / 4 <= largest < whole / 2
    for _ in range(4):
        recorder.observe(**collate(text, 0))
        assert (
            sum(
                t.numel() * t.element_size()
                for sums in recorder._sums().values()
                for t in sums.state().values()
            )
            <= largest
        )
        recorder.end_pass()
    assert not any(recorder._sums().values())


def test_passes_over_different_texts_or_too_few_are_refused(tiny, text):
    recorder = Fisher(tiny())
    recorder.look(torch.tensor([text[0][0]]))
    recorder.divide(2)
    with pytest.raises(ValueError, match="nothing was observed"):
        recorder.end_pass()
    recorder.observe(**collate(text, 0))
    with pytest.raises(ValueError, match="0 of 2 passes"):
        recorder.finish()
    with pytest.raises(ValueError, match="before anything is observed"):
        recorder.divide(3)
    recorder.end_pass()
    recorder.observe(**collate(text[:2], 0))
    with pytest.raises(ValueError, match="pass 2 saw 17 tokens, the first 24"):
        recorder.finish()


def test_what_cannot_be_observed_is_refused(tiny):
    with pytest.raises(OptionError, match="labels expects"):
        Fisher(tiny(), labels="true")
    with pytest.raises(OptionError, match="rank"):
        Kronecker(tiny(), rank=0)
    with pytest.raises(OptionError, match="did you mean 'q_proj'"):
        Fisher(tiny(), "q_prj")
    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        Fisher(model)
    with pytest.raises(ValueError, match="moved the base weight"):
        Fisher(
            get_peft_model(
                tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
            )
        )


def test_adapters_inside_a_transformers_model_are_switched_off_too(tiny, text):
    """transformers' own add_adapter wraps nothing around the model."""
    bare, model = observe(Fisher(tiny()), text, 5), tiny()
    model.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    found = observe(Fisher(model), text, 5)
    assert list(found) == list(bare)
    for name in bare:
        torch.testing.assert_close(found[name].dense(), bare[name].dense())
    assert not any(
        module.disable_adapters for module in model.modules() if hasattr(module, "lora_A")
    )


def test_bf16_models_accumulate_in_f32(tiny, text):
    exact, rough = (
        observe(Fisher(tiny()), text, 2),
        observe(Fisher(tiny(dtype=torch.bfloat16)), text, 2),
    )
    for name in exact:
        assert rough[name].values.dtype == torch.float32
        assert float(rough[name].values.sum()) == pytest.approx(
            float(exact[name].values.sum()), rel=0.15
        )  # bf16 has 3 digits; gradients pass two blocks
    assert observe(Kronecker(tiny(dtype=torch.bfloat16)), text, 2).tier == "kronecker"


def log_probabilities(model, pieces):
    """Of every scored prediction in the text: (tokens, vocabulary)."""
    rows = []
    with torch.no_grad():
        for ids, scored in pieces:
            rows.append(
                model(input_ids=torch.tensor([ids]))
                .logits[0, :-1]
                .log_softmax(-1)[torch.tensor(scored[1:])]
            )
    return torch.cat(rows)


def prediction_and_rise(model, importance, pieces, updates, size=1e-4):
    """(half the energy, measured KL from the base in nats per token) for random updates with
    independent elements.
    """
    weights = [w for w in target_weights(model) if w.name in importance]
    before, g = log_probabilities(model, pieces), torch.Generator().manual_seed(5)
    pairs = []
    for _ in range(updates):
        moves = [size * torch.randn(w.shape, generator=g, dtype=torch.float64) for w in weights]
        energy = sum(
            float(importance[w.name].energy(U)) for w, U in zip(weights, moves, strict=True)
        )
        with torch.no_grad():
            for w, U in zip(weights, moves, strict=True):
                w.W.add_(w.oriented(U))
            after = log_probabilities(model, pieces)
            for w, U in zip(weights, moves, strict=True):
                w.W.sub_(w.oriented(U))
        pairs.append((energy / 2, float((before.exp() * (before - after)).sum(1).mean())))
    return torch.tensor(pairs, dtype=torch.float64)


def sampled(recorder, pieces, times):
    for _ in range(times):
        recorder.observe(**collate(pieces, 0))
    return recorder.finish()


@pytest.mark.parametrize("estimator", [Fisher, Kronecker])
def test_half_the_energy_is_the_second_order_rise_of_random_updates(tiny, text, estimator):
    """Independent elements take all off-diagonal terms out on average, so the diagonal Fisher is
    exact up to the noise of labels and updates; Kronecker also needs |x| and |d| independent, which
    normalised inputs nearly grant.
    """
    model = tiny(dtype=torch.float64).eval()
    pairs = prediction_and_rise(
        model, sampled(estimator(model, labels="sampled"), text, 100), text, updates=240
    )
    ratio = float(pairs[:, 1].mean() / pairs[:, 0].mean())
    error = float(
        (pairs[:, 1] - ratio * pairs[:, 0]).std() / pairs[:, 0].mean() / len(pairs) ** 0.5
    )
    assert error < 0.02  # over updates; labels add 0.015 (100 draws per token, eight seeds)
    assert ratio == pytest.approx(1.0, abs=4 * (error**2 + 0.015**2) ** 0.5)


def test_kronecker_is_exact_for_any_update_where_all_tokens_are_alike(tiny):
    """One input x:

    E[d d^T (x) x x^T] factors, so half of tr(G U A U^T) is the rise for every single update, not on
    average. Labels: 3,000 draws.
    """
    model = tiny(dtype=torch.float64).eval()
    piece = [([5, 9], [True, True])]
    recorder = Kronecker(model, "v_proj", labels="sampled")
    importance = sampled(recorder, piece * 1000, 3)
    for name in importance:
        alone = Importance({name: importance[name]})
        pairs = prediction_and_rise(model, alone, piece, updates=5)
        torch.testing.assert_close(pairs[:, 1], pairs[:, 0], rtol=0.1, atol=0)


class Linear(nn.Module):
    """A language model that predicts the next token from the last one alone: logits = W x with
    one-hot x.
    """

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.eye(vocabulary, dtype=torch.float64))
        self.W = nn.Linear(vocabulary, vocabulary, bias=False, dtype=torch.float64)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.W(self.embedding(input_ids)))


def test_fisher_of_a_linear_model_is_the_closed_form():
    """Sequences of one prediction, x = j: the empirical Fisher of W_vj is the mean of [x = j] (p_v
    - [y = v])^2, the true one of [x = j] p_v (1 - p_v).
    """
    torch.manual_seed(0)
    model = Linear(5)
    pairs = torch.tensor([[0, 3], [0, 4], [2, 2], [4, 1]])
    p = model.W.weight.detach().softmax(0)  # (v, j)
    empirical, true = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    for j, y in pairs.tolist():
        empirical[:, j] += (p[:, j] - nn.functional.one_hot(torch.tensor(y), 5)) ** 2 / len(pairs)
        true[:, j] += p[:, j] * (1 - p[:, j]) / len(pairs)
    recorder = Fisher(model)
    recorder.observe(pairs)
    close(recorder.finish()["W.weight"].values, empirical)
    recorder = Fisher(model, labels="sampled")
    recorder.observe(pairs.repeat(5000, 1))
    torch.testing.assert_close(
        recorder.finish()["W.weight"].values, true, rtol=0.06, atol=0
    )  # 5,000 draws per input: a standard error of up to 2 percent
