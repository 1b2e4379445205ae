"""The budget's numbers: parsing, splitting, intervals against simulation, verdicts, refusals, and
the controller on a quadratic bowl.
"""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from forgetless.budget.budget import (
    Budget,
    check_reach,
    documents_to_decide,
    parse,
    planned_bound,
    showing,
    split,
    verdict_on,
)
from forgetless.budget.controller import Controller, ControllerState
from forgetless.data.duplicates import overlap
from forgetless.errors import OptionError
from forgetless.evaluate.rise import paired_rise, t_quantile


@pytest.mark.parametrize(
    ("text", "nats"),
    [("1%", math.log(1.01)), ("0.5 %", math.log(1.005)), ("0.01nats", 0.01), ("1e-2 nats", 0.01)],
)
def test_budgets_are_percent_of_perplexity_or_nats(text, nats):
    assert parse(text).nats == pytest.approx(nats)


@pytest.mark.parametrize(
    "text", ["1", "", "%", "nats", "1 percent", "nan%", "-1%", "0%", "0nats", "1e999%", "--%"]
)
def test_other_budgets_are_option_errors(text):
    with pytest.raises(OptionError, match="--budget"):
        parse(text)


@pytest.mark.parametrize(
    ("p", "degrees", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 5, 2.57058),
        (0.975, 30, 2.04227),
        (0.995, 10, 3.16927),
        (0.975, 1e5, 1.95999),
        (0.975, 2.5, 3.57465),
    ],
)
def test_quantiles_of_t(p, degrees, value):
    assert t_quantile(p, degrees) == pytest.approx(value, rel=1e-4)


def test_the_split_takes_half_of_each_source_whatever_the_order():
    texts, sources = [f"text {i}" for i in range(41)], ["a"] * 20 + ["b"] * 15 + ["c"] * 5 + ["d"]
    control, check = split(texts, sources)
    assert sorted(control + check) == list(range(41)) and abs(len(control) - len(check)) <= 1
    for source, size in (("a", 20), ("b", 15), ("c", 5)):
        assert abs(2 * sum(sources[i] == source for i in control) - size) <= 1
    order = np.random.default_rng(0).permutation(41)
    shuffled = split([texts[i] for i in order], [sources[i] for i in order])
    assert [{texts[order[i]] for i in part} for part in shuffled] == [
        {texts[i] for i in part} for part in (control, check)
    ]
    copies = split([*texts, texts[control[0]]], [*sources, sources[control[0]]])
    assert 41 in copies[0] and control[0] in copies[0]  # the same text never stands on both sides


def simulated(rng, shares, documents, between):
    """(before, after, tokens, sources) of a true rise of 1 with spread 1 within and `between`
    sources.
    """
    tokens, rises, sources = [], [], []
    for source, (share, n) in enumerate(zip(shares, documents, strict=True)):
        size = rng.lognormal(0, 0.8, n)
        tokens.append(1e4 * share * size / size.sum())
        rises.append(1 + between * rng.normal() + rng.normal(0, 1, n))
        sources += [str(source)] * n
    tokens, rises = np.concatenate(tokens), np.concatenate(rises)
    before = 4 * tokens
    return before, before + tokens * rises, tokens, sources


@pytest.mark.parametrize(
    ("shares", "documents", "between"),
    [
        ([0.17, 0.07, 0.29, 0.31, 0.07, 0.08], [38, 64, 7, 26, 1, 2], 1.0),  # a few unequal sources
        ([1 / 30] * 30, [3] * 30, 1.0),
        ([1.0], [150], 0.0),  # one source: documents
    ],
)
def test_intervals_cover_the_true_rise(shares, documents, between):
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(600):
        found = paired_rise(*simulated(rng, shares, documents, between))
        inside.append(found.low <= 1 <= found.high)
    assert found.by == ("source" if len(shares) > 1 else "document")
    assert 0.93 <= np.mean(inside) <= 0.985  # 600 draws: standard error 0.009


@pytest.mark.parametrize(
    ("shares", "documents", "between"),
    [([1.0], [100], 0.0), ([0.17, 0.07, 0.29, 0.31, 0.08, 0.08], [38, 64, 7, 26, 4, 4], 0.5)],
)
def test_the_choice_on_the_control_part_makes_met_the_normal_outcome(shares, documents, between):
    """A budget as small as the control part's planned bound: the check meets it 19 times in 20,
    while its upper end alone would do half of the time.
    """
    planned, naive = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        both = simulated(rng, shares, [2 * n for n in documents], between)
        side = np.arange(len(both[0])) % 2 == 0  # the same sources on both sides
        control, check = (
            paired_rise(*(np.asarray(values)[part] for values in both), error=0.025)
            for part in (side, ~side)
        )
        planned.append(
            verdict_on(check, planned_bound(control, check.documents, error=0.025)) == "met"
        )
        naive.append(verdict_on(check, control.high) == "met")
    assert np.mean(planned) > 0.92 and 0.35 < np.mean(naive) < 0.65


def test_verdicts_and_how_many_documents_would_decide():
    rng = np.random.default_rng(2)
    few = paired_rise(*simulated(rng, [1.0], [40], 0.0))
    assert (
        verdict_on(few, few.high + 0.1) == "met"
        and verdict_on(few, few.low - 0.1) == "exceeded"
        and verdict_on(few, few.nats + 0.1) == "not shown"
    )
    budget = few.nats + (few.high - few.nats) / 2
    assert (
        documents_to_decide(few, budget) == pytest.approx(3 * 40, abs=1)
        and documents_to_decide(few, few.nats) is None
    )
    nothing = paired_rise(np.ones(9), np.ones(9), np.ones(9), ["a"] * 9)
    assert verdict_on(nothing, 1e-9) == "met"


def test_text_that_cannot_show_a_budget_is_refused_with_the_size_that_could():
    rng = np.random.default_rng(3)
    spread = paired_rise(*simulated(rng, [1.0], [50], 0.0), error=0.025)
    width = spread.high - spread.nats
    check_reach(spread, 50, Budget(1.01 * width, "x"), error=0.025)
    with pytest.raises(
        ValueError, match=r"too short to show a budget of 3nats.*about \d+ documents \(found 100\)"
    ) as stop:
        check_reach(spread, 50, Budget(width / 3, "3nats"), error=0.025)
    needed = int(str(stop.value).split("about ")[1].split()[0])
    assert needed == pytest.approx(900, abs=1)
    with pytest.raises(ValueError, match="at least two documents"):
        paired_rise(np.ones(1), np.ones(1), np.ones(1), ["a"])


@pytest.mark.parametrize("own", [True, False])
def test_how_many_documents_let_how_much_of_a_budget_be_used(own):
    """The number that is asked for is one with which as much can be used."""
    budget, varies = Budget(0.01, "1%"), 0.6 if own else 6.0  # of the rise, from one to the next

    def asked(documents, nats=0.01):
        rng = np.random.default_rng(0)
        each = 100 * nats * (1 + varies * rng.normal(0, 1, documents))
        same = [""] * documents
        tokens = np.full(documents, 100.0)
        rise = paired_rise(np.zeros(documents), each, tokens, same, error=0.025)
        return showing(rise, documents, budget, error=0.025, own=own)

    few = asked(2000)
    assert few.wanted == 0.8 and 0 < few.usable < 1
    enough = asked(few.documents)
    assert enough.usable == pytest.approx(0.8, abs=0.02)
    assert enough.documents == pytest.approx(few.documents, rel=0.15)
    if own:  # the noise is in proportion, so that a budget of any size takes as many
        assert asked(2000, nats=0.001).documents == few.documents < 200


def bowl(
    budget,
    start,
    *,
    steps=300,
    noise=0.0,
    begin=0.0,
    held=True,
    every=5,
    rate=0.02,
    wrong=0.0,
    unit=None,
    seed=0,
    fixed=None,
    own_noise=None,
):
    """Adam on a domain bowl and the pull of a general bowl under the controller:

    (rise / budget at each step, strengths, learning).

    `every`: steps between probes; `noise`: standard deviation of a probe in shares of the rise;
    `wrong`: by how much the importance of a weight is off (log); `fixed`: a strength instead of the
    controller's; `own_noise`: the energy is a mean of five noisy measurements of the rise, as a
    divergence in the loss makes it.
    """
    rng = np.random.default_rng(0)
    H = np.exp(rng.normal(0, 2, 40))
    H *= 0.02 / H.mean()  # what is learned alone costs half a nat, as plain fine-tuning does
    wanted, u = rng.normal(0, 1, 40), np.zeros(40)
    u += begin * wanted
    believed = H * np.exp(wrong * rng.normal(0, 1, 40))
    believed *= H.sum() / believed.sum()
    controller = Controller(budget, start, unit, catches_up=own_noise is not None)
    m, v, rng = 0.0, 0.0, np.random.default_rng(seed)
    strength, rises, strengths = (controller.strength() if fixed is None else fixed) * held, [], []
    for step in range(1, steps + 1):
        g = 0.04 * (u - wanted) + 2 * strength * believed * u
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = u - rate * (1 - step / steps) * (m / (1 - 0.9**step)) / (
            np.sqrt(v / (1 - 0.999**step)) + 1e-8
        )
        rises.append(float((H * u * u).sum()) / 2)
        if (step % 5 == 0 or step % every == 0) and held:
            probe = rises[-1] * (1 + noise * rng.normal()) if step % every == 0 else None
            energy = float((believed * u * u).sum())
            if own_noise is not None:
                energy = float(np.mean(rises[-5:] * np.exp(own_noise * rng.normal(0, 1, 5))))
            strength = controller.update(step, energy, probe) if fixed is None else fixed
            strengths.append(strength)
    return (
        np.array(rises) / budget,
        np.array(strengths),
        1 - ((u - wanted) ** 2).sum() / (wanted**2).sum(),
    )


@pytest.mark.parametrize("budget", [0.5, 0.05, 0.01, 0.002])
@pytest.mark.parametrize("start", [10.0, None])
def test_the_controller_meets_the_budget_without_oscillating(budget, start):
    rises, strengths, _ = bowl(budget, start)
    late = rises[150:]
    assert 0.9 < late.mean() < 1.1 and late.std() < 0.1 and 0.95 < rises[-1] < 1.05
    assert (
        rises[200:].min() > 0.9 and rises[200:].max() < 1.1 and np.log(strengths[40:]).std() < 0.1
    )  # rise and strength settle
    noisy, _, _ = bowl(budget, start, noise=0.5)  # probes of half the signal
    assert 0.85 < noisy[150:].mean() < 1.2 and noisy[150:].max() < 2


def test_the_controller_recovers_from_an_overshoot():
    rises, _, learned = bowl(0.01, 10.0, begin=0.5)
    assert (
        rises[0] > 15 and rises[40:150].max() < 1
    )  # held hard enough, and then let go: the budget is used, and what was learned is not undone
    assert rises.max() < 20 and 0.85 < rises[-1] < 1.2 and learned > 0.42


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("budget", [0.05, 0.01, 0.002])
def test_a_wild_start_does_not_cost_the_learning(rate, budget):
    """The first steps at a high rate overshoot by far.

    Held as hard as that seems to ask for, a short run learned next to nothing and left its budget.
    """
    best = max(
        learned
        for rises, _, learned in (
            bowl(budget, None, steps=60, rate=rate, fixed=s) for s in np.geomspace(0.01, 1000, 16)
        )
        if rises[-1] <= 1
    )
    for unit in (1.0, None):
        rises, _, learned = bowl(budget, 10.0, steps=60, rate=rate, unit=unit)
        assert learned > 0.9 * best and 0.55 < rises[-1] < 1.25


@pytest.mark.parametrize("start", [10.0, None])
def test_a_loose_budget_holds_nothing_back(start):
    _, _, plain = bowl(1.0, None, held=False)
    for budget in (5.0, 100.0):
        rises, strengths, learned = bowl(budget, start)
        assert rises.max() < 0.2 and learned > 0.99 * plain
        assert strengths[-1] < 1e-3


def test_the_controller_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    probes = 0.01 * np.exp(rng.normal(0, 1, 40))
    whole, first, second = (Controller(0.01, None) for _ in range(3))
    looks = [(i, 0.02 + i / 1000, float(p) if i % 3 == 0 else None) for i, p in enumerate(probes)]
    strengths = [whole.update(*look) for look in looks]
    for look in looks[:20]:
        first.update(*look)
    saved = json.loads(json.dumps(asdict(first.state())))
    second.restore(ControllerState.of(saved))
    assert [second.update(*look) for look in looks[20:]] == strengths[
        20:
    ] and second.trajectory == whole.trajectory


@pytest.mark.parametrize("every", [9, 18])
def test_a_few_noisy_probes_neither_waste_the_budget_nor_throw_the_strength_about(every):
    """Sixty steps, three to six probes whose error is as large as what they measure, importance
    that is off by a factor of e.
    """
    runs = [
        bowl(0.05, 10.0, steps=60, rate=0.1, every=every, noise=1.0, wrong=1.0, unit=1.0, seed=seed)
        for seed in range(8)
    ]
    ends = np.array([rises[-1] for rises, _, _ in runs])
    assert (
        0.7 < ends.mean() < 1.3
        and ends.min() > 0.4
        and max(rises[30:].max() for rises, _, _ in runs) < 2
    )
    assert (
        np.median([np.log(strengths[len(strengths) // 2 :]).std() for _, strengths, _ in runs])
        < 0.8
    )


@pytest.mark.parametrize("budget", [0.1, 0.03, 0.01, 0.003])
def test_the_weight_of_a_measured_divergence_catches_up_and_settles(budget):
    """From a weight of 1, whatever the budget asks for: up to forty times that.

    Fifty steps have ten looks at ten answers each, which are off by a sixth.
    """
    given = dict(unit=1.0, noise=0.4, own_noise=0.5, rate=0.05)
    short = [bowl(budget, 1.0, steps=50, seed=seed, **given) for seed in range(6)]
    assert 0.7 < np.mean([rises[-1] for rises, _, _ in short]) < 1.3
    long = [bowl(budget, 1.0, steps=200, seed=seed, **given) for seed in range(6)]
    assert 0.75 < np.mean([rises[-1] for rises, _, _ in long]) < 1.15
    for _, strengths, _ in long:
        late = np.log(strengths[20:])
        assert late.std() < 0.6 and np.abs(np.diff(late)).max() < 1.5


def test_quantiles_of_many_documents_are_those_of_the_normal_distribution():
    """The rule for t has its points too far apart there: 110,000 documents would get an interval
    without end.
    """
    assert [t_quantile(0.975, degrees) for degrees in (9_999, 10_000, 1e7)] == pytest.approx(
        [1.9602, 1.9600, 1.9600], abs=2e-4
    )


def test_overlap_is_found_in_writing_without_spaces():
    text = (
        "\u9019\u662f\u4e00\u500b\u5f88\u9577\u7684\u6e2c\u8a66"
        "\u6587\u4ef6\u800c\u4e14\u6c92\u6709\u7a7a\u683c"
    )
    assert (
        overlap([text], [f"\u524d\u8a00{text}\u5427"]).near == [0]
        and not overlap([text], [text[::-1]]).near
    )


def test_overlap_is_found_by_text_and_by_near_duplicates():
    words = [f"word{i}" for i in range(400)]
    training = [" ".join(words[:100]), " ".join(words[100:200])]
    near = " ".join([*words[100:130], "other", *words[131:180], "ends", "differently"])
    found = overlap(
        ["fresh " * 30, " ".join(words[:100]).upper(), near, " ".join(words[300:]), "word1 word2"],
        training,
    )
    assert found.exact == [1] and found.near == [2]
    assert (
        "1 of 5 documents are in it word for word and 1 nearly (first: document 2)"
        in found.describe()
    )
    assert overlap(["some other text"], training).describe() is None
