"""The numbers of the package by another route: brute force in f64, weight by weight and document by
document, on tiny models of six architectures.

Nothing here is computed by code of the package, and nothing by the same formula where there is
another: gradients of whole weights by autograd, an update as the difference of merged weights, a
pull by differences of the energy, a divergence by a sum over the vocabulary, an interval by leaving
out each source.
"""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

from conftest import CONFIGS, SMALL, words_tokenizer
from forgetless.budget.budget import verdict_on
from forgetless.data.documents import Document
from forgetless.data.inputs import HeldOut
from forgetless.data.selftext import Answer
from forgetless.evaluate.evaluate import changes, measure
from forgetless.evaluate.losses import TextLoss
from forgetless.evaluate.paired_answers import paired_answers
from forgetless.penalty.pull import Penalty
from forgetless.record.fisher import Fisher
from forgetless.record.kronecker import Kronecker

# What each architecture has that another lacks, and the weights that are adapted.
ARCHITECTURES = {
    "grouped queries": (CONFIGS["mistral"], ["q_proj", "k_proj", "down_proj"]),
    "fused qkv": (CONFIGS["phi3"], ["qkv_proj", "gate_up_proj"]),
    "Conv1D": (CONFIGS["gpt2"], ["c_attn", "c_fc"]),
    "tied embeddings": (Qwen2Config(**SMALL, tie_word_embeddings=True), ["v_proj", "up_proj"]),
    "scaled embeddings": (CONFIGS["gemma"], ["q_proj", "o_proj"]),
    "experts": (
        MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
        ["q_proj", "o_proj"],
    ),
}
SEQUENCES = [[5, 9, 7, 30, 11, 3, 17], [40, 12, 12, 8], [21, 33, 4, 4, 19, 6, 45, 13, 28]]
SCALE = 2.5  # alpha / rank of the adapters


@pytest.fixture(params=list(ARCHITECTURES))
def built(request):
    """(a model in f64, the names of the weights to adapt)."""
    config, names = ARCHITECTURES[request.param]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    if request.param == "experts":
        model.set_experts_implementation("eager")  # grouped products know no f64
    return model, names


def targets(model, names):
    """Name of the weight -> its module, for every layer that is adapted."""
    return {
        f"{place}.weight": module
        for place, module in model.named_modules()
        if place.rpartition(".")[2] in names and hasattr(module, "weight")
    }


def out_in(module, weight):
    """A weight as (out, in), which GPT-2's layers store the other way round."""
    return weight.T if type(module).__name__ == "Conv1D" else weight


def log_probabilities(model, ids):
    """(places, vocabulary), by the definition."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits - logits.exp().sum(-1, keepdim=True).log()


def loss(model, ids):
    """Nats of a sequence after its first token."""
    known = log_probabilities(model, ids)
    return -sum(known[place, token] for place, token in enumerate(ids[1:]))


def observed(recorder):
    """A recorder that has seen the sequences, of different lengths, in one batch."""
    width = max(map(len, SEQUENCES))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in SEQUENCES])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in SEQUENCES])
    labels = ids.masked_fill(mask == 0, -100)
    recorder.observe(input_ids=ids, attention_mask=mask, labels=labels)
    return recorder.finish()


def gradients(model, ids, modules):
    """The gradient of each whole weight, (out, in), for one sequence."""
    weights = [module.weight for module in modules.values()]
    for weight in weights:
        weight.requires_grad_(True)
    found = torch.autograd.grad(loss(model, ids), weights)
    pairs = zip(modules.items(), found, strict=True)
    return {name: out_in(module, grad) for (name, module), grad in pairs}


def adapted(model, names):
    """The model with an adapter of random factors on it."""
    config = LoraConfig(
        r=2, lora_alpha=2 * SCALE, target_modules=names, fan_in_fan_out="c_attn" in names
    )
    made = get_peft_model(copy.deepcopy(model), config).double()
    generator = torch.Generator().manual_seed(9)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.05 * random
    return made


def updates(base, made, names):
    """What the adapter adds to each weight, (out, in): merged weights less those of the base."""
    merged = copy.deepcopy(made).merge_and_unload()
    before, after = targets(base, names), targets(merged, names)
    return {
        name: out_in(module, after[name].weight - module.weight).detach()
        for name, module in before.items()
    }


def agree(found, expected, digits=1e-9):
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(expected), rtol=digits, atol=digits * 1e-3
    )


def test_importance_energy_and_pull(built):
    model, names = built
    modules = targets(model, names)
    squares = dict.fromkeys(modules, 0.0)
    for ids in SEQUENCES:
        for name, gradient in gradients(model, ids, modules).items():
            squares[name] = squares[name] + gradient.square()
    scored = sum(len(ids) - 1 for ids in SEQUENCES)
    importance = observed(Fisher(model, ",".join(names)))
    assert set(importance) == set(modules)
    for name in modules:
        agree(importance[name].dense(), squares[name] / scored, 1e-6)

    made = adapted(model, names)
    penalty = Penalty(made, importance, strength=0.7)

    def energy():
        there = updates(model, made, names)
        return sum(float((squares[name] / scored * U.square()).sum()) for name, U in there.items())

    agree(penalty.energy(), energy(), 1e-6)
    factors = [(name, p) for name, p in made.named_parameters() if "lora_" in name]
    for _, parameter in factors:
        parameter.grad = torch.zeros_like(parameter)
    penalty.pull()
    rng = np.random.default_rng(4)
    for place in rng.choice(len(factors), 6, replace=False):
        _, parameter = factors[place]
        at = tuple(int(rng.integers(size)) for size in parameter.shape)
        ends = []
        for step in (1e-3, -1e-3):  # the energy is a square in every element: no error of its own
            with torch.no_grad():
                parameter[at] += step
            ends.append(energy())
            with torch.no_grad():
                parameter[at] -= step
        largest = float(parameter.grad.abs().max())
        slope = 0.7 * (ends[0] - ends[1]) / 2e-3
        assert float(parameter.grad[at]) == pytest.approx(slope, rel=1e-4, abs=1e-5 * largest)


def test_kronecker_importance_and_its_energy(built):
    model, names = built
    modules = targets(model, names)
    inputs = {name: [] for name in modules}
    slopes = {name: [] for name in modules}
    seen, handles = {}, []
    for name, module in modules.items():

        def note(_, given, out, name=name):
            out.retain_grad()
            seen[name] = (given[0].detach(), out)

        handles.append(module.register_forward_hook(note))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for ids in SEQUENCES:
        loss(model, ids).backward()
        for name, (x, out) in seen.items():
            # Nothing that is scored depends on the last token.
            inputs[name] += list(x[0, : len(ids) - 1])
            slopes[name] += list(out.grad[0, : len(ids) - 1])
    for handle in handles:
        handle.remove()
    model.zero_grad()
    importance = observed(Kronecker(model, ",".join(names)))
    made = adapted(model, names)
    expected = 0.0
    for name, U in updates(model, made, names).items():
        count = len(inputs[name])
        G = sum(torch.outer(d, d) for d in slopes[name]) / count
        A = sum(torch.outer(x, x) for x in inputs[name]) / count
        agree(importance[name].out_cov.full(), G, 1e-6)
        agree(importance[name].in_cov.full(), A, 1e-6)
        # By the average over pairs of an input and a slope, which are taken to be independent.
        pairs = [float(d @ U @ x) ** 2 for d in slopes[name] for x in inputs[name]]
        expected += sum(pairs) / count**2
    agree(Penalty(made, importance, strength=1.0).energy(), expected, 1e-6)


def test_divergence(built):
    model, names = built
    made = adapted(model, names).eval()
    answers = [Answer(str(n), "k", tuple(ids), 2 + n, True) for n, ids in enumerate(SEQUENCES)]
    expected, tokens = [], []
    with torch.no_grad():
        plain = copy.deepcopy(made).merge_and_unload()
        for answer in answers:
            p, q = (log_probabilities(one, answer.ids).numpy() for one in (model, plain))
            places = range(answer.start - 1, len(answer.ids) - 1)
            expected.append(sum((np.exp(p[i]) * (p[i] - q[i])).sum() for i in places))
            tokens.append(len(places))
    paired = paired_answers(model, answers)
    agree(paired.losses(made), expected, 2e-5)  # the package divides in f32
    agree(paired.rise(made, error=0.05).nats, sum(expected) / sum(tokens), 2e-5)


def interval(changes_of, tokens, sources, error):
    """(rise, low, high) by leaving out each source, in loops."""
    names = sorted(set(sources))
    total = sum(changes_of) / sum(tokens)
    left = []
    for name in names:
        kept = [i for i, source in enumerate(sources) if source != name]
        left.append(sum(changes_of[i] for i in kept) / sum(tokens[i] for i in kept))
    count = len(names)
    spread = math.sqrt((count - 1) / count * sum((each - total) ** 2 for each in left))
    sizes = [sum(t for t, s in zip(tokens, sources, strict=True) if s == name) for name in names]
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    width = scipy.stats.t.ppf(1 - error / 2, max(1, effective - 1)) * spread
    return total, total - width, total + width


def test_rise_interval_and_verdict(built):
    model, names = built
    made = adapted(model, names).eval()
    tokenizer = words_tokenizer()
    rng = np.random.default_rng(5)
    words = "the cat sat on mat and dog then too yes no one two three".split()
    texts = [" ".join(rng.choice(words, rng.integers(4, 20))) for _ in range(14)]
    sources = [f"source {min(3, n // 3)}" for n in range(14)]
    documents = [Document(text, None, source) for text, source in zip(texts, sources, strict=True)]
    held_out = HeldOut(general=documents)
    before, after = (measure(one, tokenizer, held_out) for one in (model, made))
    rows = [tokenizer(text)["input_ids"] for text in texts]
    plain = copy.deepcopy(made).merge_and_unload()
    with torch.no_grad():
        moved = [float(loss(plain, ids) - loss(model, ids)) for ids in rows]
    expected = interval(moved, [len(ids) - 1 for ids in rows], sources, 0.05)
    found = changes(before, after).forgetting
    # The package sums the losses of a model of any dtype in f32.
    np.testing.assert_allclose([found.nats, found.low, found.high], expected, atol=5e-7, rtol=0)
    rise = TextLoss.of(before.general).rise(TextLoss.of(after.general))
    for budget, verdict in (
        (expected[2] + 1e-6, "met"),
        (expected[2] - 1e-6, "not shown"),
        (expected[1] + 1e-6, "not shown"),
        (expected[1] - 1e-6, "exceeded"),
    ):
        assert verdict_on(rise, budget) == verdict
