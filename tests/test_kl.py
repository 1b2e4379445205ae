"""The divergence as a term of the loss: what it costs, which sequences it sees, how each counts."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import CONFIGS
from forgetless.data.selftext import Answer
from forgetless.errors import OptionError
from forgetless.evaluate.divergence import StoredBase, store, stored_base, stored_kl
from forgetless.methods.divergence import stored_gradient
from forgetless.methods.kinds import check_kinds, sequence_weights
from forgetless.methods.kl import KL, cut_after, cut_stored, matched_places
from forgetless.model.adapters import add_adapter
from forgetless.model.head import logits_at
from forgetless.options.tune import TuneOptions

LENGTHS = (12, 5, 9, 7, 6, 12, 8, 10)


@pytest.fixture
def moved(tiny):
    """A tiny model with an adapter that has moved."""
    torch.manual_seed(1)
    model = add_adapter(tiny(), names="all-linear", rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return model


def said(lengths=LENGTHS):
    """Answers of a few tokens."""
    rng = np.random.default_rng(0)
    return [
        Answer(str(i), "ab"[i % 2], tuple(map(int, rng.integers(3, 48, n))), n // 2, True)
        for i, n in enumerate(lengths)
    ]


def encoded(answers):
    return [(list(a.ids), [at >= a.start for at in range(len(a.ids))]) for a in answers]


def gradient_of(model, term, steps):
    """The sum over steps of what the term adds."""
    for parameter in model.parameters():
        parameter.grad = None
    for step in steps:
        term.add(step)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.flatten() for grad in grads]) if grads else torch.zeros(1)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_head_is_asked_for_chosen_places_alone(tiny, batch, kind):
    model, places = tiny(kind).eval(), torch.rand(4, 12) < 0.4
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    chosen = logits_at(model, places, input_ids=batch)
    handle.remove()
    assert seen == [(int(places.sum()), 48)]
    torch.testing.assert_close(chosen, model(input_ids=batch).logits[places])
    model.get_output_embeddings = lambda: None
    torch.testing.assert_close(logits_at(model, places, input_ids=batch), chosen)


@pytest.mark.parametrize("at_a_time", [1, 3, None])
@pytest.mark.parametrize("k", [1, 8, 31])
def test_the_gradient_by_what_is_stored_is_that_of_autograd(k, at_a_time):
    g = torch.Generator().manual_seed(0)
    base = 2 * torch.randn(9, 31, generator=g)
    tuned = (base + torch.randn(9, 31, generator=g)).requires_grad_()
    tokens = torch.randint(0, 31, (9,), generator=g)
    kept = store(base, tokens, k)
    assert bool(kept.other.any()) == (k < 31)
    slow = stored_kl(kept, tuned, tokens).sum()
    slow.backward()
    nats, gradient = stored_gradient(tuned.detach(), kept, tokens, at_a_time=at_a_time)
    assert nats == pytest.approx(float(slow.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, tuned.grad, rtol=1e-4, atol=1e-5)


def test_a_stored_base_that_is_sure_of_itself_gives_a_finite_gradient():
    """Where all probability is on one token, the others have none of it."""
    base, tuned = torch.zeros(1, 31), torch.zeros(1, 31)
    base[0, 3], tuned[0, 3] = 200.0, 150.0
    token = torch.tensor([3])
    nats, gradient = stored_gradient(tuned, store(base, token, 8), token)
    assert nats == pytest.approx(0.0, abs=1e-6)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) < 1e-6


def test_stored_and_asked_base_add_the_same(moved, tiny):
    answers = said()
    kept = stored_base(tiny(), answers, k=48)
    asked = gradient_of(moved, KL(moved, encoded(answers)), range(4))
    stored = gradient_of(moved, KL(moved, encoded(answers), stored=kept), range(4))
    torch.testing.assert_close(stored, asked, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("count", "sequences"), [(64, 2), (20, 3), (3, 8), (40, 1)])
def test_all_sequences_are_seen_before_any_is_seen_twice(count, sequences):
    rng = np.random.default_rng(0)
    lengths = tuple(map(int, rng.integers(20, 300, count)))
    steps = -(-count // sequences)
    turns = [matched_places(lengths, sequences, step, 7) for step in range(2 * steps)]
    assert all(len(places) == sequences for places in turns)
    for once in (turns[:steps], turns[steps:]):
        seen = Counter(itertools.chain(*once))
        assert set(seen) == set(range(count))
        if count % sequences == 0:
            assert set(seen.values()) == {1}
    assert turns == [matched_places(lengths, sequences, step, 7) for step in range(2 * steps)]
    if count > sequences:
        assert turns[:steps] != turns[steps:]
        assert turns[0] != matched_places(lengths, sequences, 0, 8)


def test_sequences_of_a_step_have_like_lengths():
    lengths = tuple(map(int, np.random.default_rng(0).integers(60, 320, 64)))
    steps = [matched_places(lengths, 2, step, 0) for step in range(320)]
    widest = [2 * max(lengths[place] for place in places) for places in steps]
    padded = sum(widest) / sum(sum(lengths[place] for place in places) for places in steps)
    assert padded < 1.06


def test_every_nth_step_with_n_times_the_weight_is_the_same_in_expectation(moved):
    """Over passes of all sequences, of one length so that each step has as many tokens."""
    answers = said([10] * 8)
    each = gradient_of(moved, KL(moved, encoded(answers)), range(16))
    for every in (2, 4):
        term = KL(moved, encoded(answers), every=every)
        assert gradient_of(moved, term, range(every - 1)).abs().max() == 0  # the last of N steps
        seldom = gradient_of(moved, KL(moved, encoded(answers), every=every), range(4 * every))
        torch.testing.assert_close(seldom / (4 * every), each / 16, rtol=1e-4, atol=1e-6)


def test_kinds_count_by_their_weights_and_one_on_average(moved):
    answers = said([10] * 8)
    weights = sequence_weights("a=3", [answer.kind for answer in answers])
    assert weights == pytest.approx([1.5, 0.5] * 4)
    text = encoded(answers)
    both = gradient_of(moved, KL(moved, text, sequences=8, weights=weights, weight=2.0), [0])
    of_a, of_b = (
        gradient_of(moved, KL(moved, [p for p, a in zip(text, answers, strict=True) if a.kind == k],
                              sequences=4, weight=2.0), [0])
        for k in "ab"
    )  # fmt: skip
    torch.testing.assert_close(both, 0.75 * of_a + 0.25 * of_b, rtol=1e-4, atol=1e-6)
    alike, weighted = KL(moved, text, sequences=8), KL(moved, text, sequences=8, weights=weights)
    for term in (alike, weighted):
        term.add(0)
    assert weighted.logs() == alike.logs()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tools", "expects kinds with weights .* found 'tools'"),
        ("tools=-1", "found 'tools=-1'"),
        ("tools=nan", "found 'tools=nan'"),
        ("=2", "found '=2'"),
        (",", "found ','"),
        ("tools=1,tools=2", "found 'tools' twice"),
        ("tool=2", "names 'tool', of which nothing is replayed; did you mean 'tools'"),
    ],
)
def test_wrong_kinds_are_refused_before_anything_is_loaded(spec, expected):
    options = TuneOptions(method="kl", replay="chat", kl_kinds=spec)
    with pytest.raises(OptionError, match=expected):
        check_kinds(options)
    if "names" not in expected:
        return
    with pytest.raises(OptionError, match="There is lists, tools"):
        sequence_weights(spec, ["tools", "lists"])


def test_kinds_of_which_none_counts_are_refused():
    with pytest.raises(OptionError, match="leaves nothing that counts"):
        sequence_weights("a=0", ["a", "a"])
    assert sequence_weights("a=0", ["a", "b"]) == [0.0, 2.0]
    assert sequence_weights(None, ["a"]) is None


def test_shorter_answers_are_their_first_tokens(moved, tiny):
    """The cut of what is stored is what would be stored of the cut."""
    answers = said()
    cut = [cut_after(piece, 3) for piece in encoded(answers)]
    assert [sum(scored) for _, scored in cut] == [min(3, len(a.scored)) for a in answers]
    assert [ids for ids, _ in cut] == [list(a.ids[: a.start + 3]) for a in answers]
    short = [Answer(a.prompt, a.kind, tuple(ids), a.start, False)
             for a, (ids, _) in zip(answers, cut, strict=True)]  # fmt: skip
    kept = [cut_stored(base, 3) for base in stored_base(tiny(), answers, k=8)]
    for one, other in zip(kept, stored_base(tiny(), short, k=8), strict=True):
        for name in StoredBase.__dataclass_fields__:
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
    term = KL(moved, cut, stored=kept)
    term.add(0)
    assert len(term.last) == 1


def test_it_knows_its_own_mean_over_the_last_sequences(moved):
    term = KL(moved, encoded(said([10] * 8)), sequences=4)
    assert term.recent() is None
    values = []
    for step in range(5):
        term.add(step)
        values.append(term.last[-1][0] / term.last[-1][1])
    assert len(term.last) == 3 and term.recent() == pytest.approx(np.mean(values[-3:]))


def test_dropout_of_the_base_is_off(tiny):
    """The base is asked as it predicts, and no random number is drawn for it."""
    model = add_adapter(copy.deepcopy(tiny("gpt2")), names="all-linear", rank=2, alpha=4.0)
    model.train()
    before = torch.get_rng_state()
    term = KL(model, encoded(said()), sequences=8)
    term.add(0)
    assert term.recent() == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
