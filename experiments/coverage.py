"""How often the interval of a rise holds the truth, and how often the verdict of a budget is wrong:
simulated, since there the truth is known.

    python experiments/coverage.py > experiments/coverage.md     # some minutes, no model

The rise of a document is the common one (1), plus what its source adds, plus what is its own. Both
parts of a budget, control and check, hold documents of the same sources. Drawn are 2, 3, 5 and 20
sources with 20 documents each in a part, or one source with 40 documents; sources of equal size, or
each of half the size of the one before; what sources add normal, skewed or of heavy tails, of
standard deviation 1 (or nothing, or small). A divergence on own answers is never negative, and
there is one source: 16, 64 or 128 answers of log-normal length whose divergence per token is
log-normal, of a standard deviation of .3, .8 or 1.5 of the mean.

Columns, of intervals of 97.5 % as a check has them (both tails together 2.5 %):

    covered      the truth lies in the interval (promised .975)
    above        the truth lies above it, which makes a false "met" (promised .0125)
    below        the truth lies below it, which makes a false "exceeded"
    false met    of a whole run with a budget: the update is scaled so that the control part's
                 planned bound is the budget; the true rise is above the budget and the check says
                 met (promised .025: a run may check twice)
    met          the check says met (planned: .95)

Tried beside it, on the same draws: the same by t with one degree of freedom less per source that
counts (G - 1 instead of the effective number), a width that takes the skewness of the sources into
account (Johnson's modified t), and the studentised bootstrap over sources. Each has its `above`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forgetless.budget.budget import PLANNED
from forgetless.evaluate.rise import paired_rise, t_quantile

# Draws of each row; the standard error of .0125 is then .0011.
DRAWS = 10_000
# The probability outside of a check's interval, both tails.
ERROR = 0.025
# Draws and resamples of the studentised bootstrap, which is slow.
RESAMPLED, RESAMPLES = 1_000, 399

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# What sources and documents may add: mean 0, standard deviation 1.
SHAPES: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size) - 1,
    "very skewed": lambda rng, size: _log_normal(rng, size, 1.5),
    "heavy": lambda rng, size: rng.standard_t(3, size=size) / np.sqrt(3),
}


def _log_normal(rng: np.random.Generator, size: tuple[int, ...], varies: float) -> np.ndarray:
    """Log-normal, of mean 0 and standard deviation 1; `varies`: its deviation over its mean before
    the mean was taken away.
    """
    sigma = np.sqrt(np.log1p(varies**2))
    return (np.exp(rng.normal(-(sigma**2) / 2, sigma, size)) - 1) / varies


@dataclass(frozen=True)
class Case:
    """One row: how many sources, of which sizes, and what they and their documents add."""

    sources: int
    sizes: str
    between: str
    deviation: float = 1.0
    documents: int = 20

    def tokens(self) -> np.ndarray:
        """Tokens of each document, (sources, documents), of 1 in the mean."""
        size = 0.5 ** np.arange(self.sources) if self.sizes == "halved" else np.ones(self.sources)
        return np.repeat((size / size.mean())[:, None], self.documents, axis=1)


@dataclass(frozen=True)
class Part:
    """What an interval needs of many draws of one part of a text.

    Sums over each cluster: `rises`, `sizes` (draws, clusters); and where clusters are sources the
    squared standard error of the rise over other documents of theirs, (draws,).
    """

    rises: np.ndarray
    sizes: np.ndarray
    within: np.ndarray | None

    @property
    def rise(self) -> np.ndarray:
        return self.rises.sum(1) / self.sizes.sum(1)

    def values(self) -> np.ndarray:
        """Pseudo-values of the jackknife less the rise, (draws, clusters)."""
        total, count = self.sizes.sum(1, keepdims=True), self.rises.shape[1]
        without = (self.rises.sum(1, keepdims=True) - self.rises) / (total - self.sizes)
        return (count - 1) * (self.rise[:, None] - without)

    @property
    def error(self) -> np.ndarray:
        """Standard error by leaving out one cluster in turn."""
        count = self.rises.shape[1]
        return np.sqrt((self.values() ** 2).sum(1) / (count * (count - 1)))

    @property
    def degrees(self) -> np.ndarray:
        effective = self.sizes.sum(1) ** 2 / (self.sizes**2).sum(1)
        return np.maximum(1.0, effective - 1)


def two_parts(case: Case, rng: np.random.Generator) -> list[Part]:
    """Control and check of each draw, with the same sources."""
    tokens = case.tokens()[None]
    added = case.deviation * SHAPES[case.between](rng, (DRAWS, case.sources, 1))
    parts = []
    for _ in range(2):
        own = rng.normal(size=(DRAWS, case.sources, case.documents))
        rises = (1 + added + own) * tokens
        if case.sources == 1:
            parts.append(Part(rises[:, 0], np.broadcast_to(tokens[:, 0], rises[:, 0].shape), None))
            continue
        sizes = np.broadcast_to(tokens.sum(2), (DRAWS, case.sources))
        mean = rises.sum(2, keepdims=True) / tokens.sum(2, keepdims=True)
        residuals = ((rises - tokens * mean) ** 2).sum(2)
        within = (residuals * case.documents / (case.documents - 1)).sum(1) / sizes.sum(1) ** 2
        parts.append(Part(rises.sum(2), sizes, within))
    return parts


def answers(count: int, varies: float, rng: np.random.Generator) -> list[Part]:
    """Control and check of divergences on own answers; their mean per token is 1."""
    parts = []
    for _ in range(2):
        tokens = np.minimum(256, np.exp(rng.normal(4.6, 0.8, (DRAWS, count)))).round() + 1
        rate = 1 + varies * _log_normal(rng, (DRAWS, count), varies)
        parts.append(Part(rate * tokens, tokens, None))
    return parts


def quantiles(p: float, degrees: np.ndarray) -> np.ndarray:
    """Student's t for many degrees of freedom, from a table of 200."""
    low, high = degrees.min(), degrees.max()
    if low == high:
        return np.full(len(degrees), t_quantile(p, float(low)))
    known = np.geomspace(low, high, 200)
    return np.interp(degrees, known, [t_quantile(p, float(each)) for each in known])


def planned(control: Part, by_source: bool) -> np.ndarray:
    """`planned_bound` of budget.py for a check of as many documents, of many draws."""
    t = quantiles(1 - ERROR / 2, control.degrees)
    clusters = control.rises.shape[1] if by_source else 2 * control.degrees
    within = control.error if control.within is None else np.sqrt(control.within)
    noise = within * np.sqrt(2) * np.sqrt(1 + t**2 / clusters)
    return control.rise + t * control.error + quantiles(PLANNED, control.degrees) * noise


def johnson(part: Part) -> np.ndarray:
    """The upper end with the width of Johnson's modified t: moved by the skewness of the clusters
    (Johnson 1978, J. Am. Stat. Assoc. 73).
    """
    values, count = part.values(), part.rises.shape[1]
    skew = (values**3).mean(1) / np.maximum((values**2).mean(1), 1e-30) ** 1.5
    t = quantiles(1 - ERROR / 2, part.degrees)
    moved = skew * (1 + 2 * t**2) / (6 * np.sqrt(count))
    return part.rise + (t + np.maximum(moved, 0)) * part.error


def bootstrapped(part: Part, rng: np.random.Generator) -> np.ndarray:
    """The upper end by the studentised bootstrap over clusters, of the first draws."""
    count = part.rises.shape[1]
    ends = []
    for rises, sizes in zip(part.rises[:RESAMPLED], part.sizes[:RESAMPLED], strict=True):
        at = rng.integers(0, count, (RESAMPLES, count))
        again = Part(rises[at], sizes[at], None)
        rise = rises.sum() / sizes.sum()
        error = Part(rises[None], sizes[None], None).error[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (again.rise - rise) / again.error
        t = np.sort(np.where(np.isnan(t), 0.0, t))
        ends.append(rise - t[int(ERROR / 2 * RESAMPLES)] * error)
    return np.array(ends)


def row(parts: Sequence[Part], by_source: bool, rng: np.random.Generator) -> list[float]:
    """The numbers of a row, of a true rise of 1."""
    control, check = parts
    width = quantiles(1 - ERROR / 2, check.degrees) * check.error
    low, high = check.rise - width, check.rise + width
    bound = planned(control, by_source)
    met = high <= bound
    more = t_quantile(1 - ERROR / 2, check.rises.shape[1] - 1) * check.error
    boot = bootstrapped(check, rng)
    return [
        float(np.mean(each))
        for each in (
            (low <= 1) & (high >= 1),
            high < 1,
            low > 1,
            met & (bound < 1),
            met,
            check.rise + more < 1,
            johnson(check) < 1,
            boot < 1,
        )
    ]


def check_twin() -> None:
    """Raise unless the fast form here is `paired_rise`, on a few draws."""
    rng = np.random.default_rng(1)
    case = Case(5, "halved", "skewed")
    part = two_parts(case, rng)[0]
    rng = np.random.default_rng(1)
    added = SHAPES["skewed"](rng, (DRAWS, 5, 1))
    own = rng.normal(size=(DRAWS, 5, 20))
    tokens = case.tokens()
    for draw in range(5):
        changes = ((1 + added[draw] + own[draw]) * tokens).flatten()
        sources = np.repeat(np.arange(5), 20).tolist()
        rise = paired_rise(0 * changes, changes, tokens.flatten(), sources, error=ERROR)
        numbers = (rise.nats, rise.standard_error, rise.degrees, rise.within)
        assert part.within is not None
        fast = (part.rise, part.error, part.degrees, np.sqrt(part.within))
        np.testing.assert_allclose([each[draw] for each in fast], numbers)


CASES = [
    *(Case(n, "equal", shape) for n in (2, 3, 5, 20) for shape in SHAPES),
    *(Case(n, "halved", shape) for n in (3, 5) for shape in SHAPES),
    *(Case(n, "equal", "very skewed", deviation=0.2) for n in (2, 3, 5, 20)),
    *(Case(n, "equal", "normal", deviation=0.0) for n in (2, 5)),
    Case(1, "equal", "normal", deviation=0.0, documents=40),
]
HEAD = ["covered", "above", "below", "false met", "met", "above: G - 1", "Johnson", "bootstrap"]


def main() -> None:
    """Print the tables."""
    check_twin()
    print("# Coverage of intervals, and wrong verdicts\n")
    print("<!-- made by experiments/coverage.py -->\n")
    print(
        f"Simulated, {DRAWS:,} draws a row (the bootstrap: {RESAMPLED:,}); what the columns mean "
        "stands in experiments/coverage.py. Promised: covered .975, above .0125, false met .025, "
        "met .95.\n"
    )
    print("## Loss on text of several sources\n")
    print("| sources | sizes | what sources add | its deviation |", " | ".join(HEAD), "|")
    print("|" + "---|" * (4 + len(HEAD)))
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(number)
        found = row(two_parts(case, rng), case.sources > 1, rng)
        about = [str(case.sources), case.sizes, case.between, f"{case.deviation:g}"]
        print("|", " | ".join([*about, *(f"{each:.4f}" for each in found)]), "|")
    print("\n## Divergence on own answers\n")
    print("| answers | varies by |", " | ".join(HEAD), "|")
    print("|" + "---|" * (2 + len(HEAD)))
    for number, (count, varies) in enumerate(
        (n, v) for n in (16, 64, 128) for v in (0.3, 0.8, 1.5)
    ):
        rng = np.random.default_rng(1000 + number)
        found = row(answers(count, varies, rng), False, rng)
        print("|", " | ".join([str(count), f"{varies:g}", *(f"{x:.4f}" for x in found)]), "|")


if __name__ == "__main__":
    main()
