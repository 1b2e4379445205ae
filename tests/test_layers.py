"""Layer coefficients: the paper's softmax, and that all others average to 1."""

from dataclasses import dataclass

import pytest

from forgetless.errors import OptionError
from forgetless.penalty.layers import OverDepth, PerKind, ScaleFree, Softmax, Uniform, from_option


@dataclass
class W:
    name: str
    layer: int | None
    kind: str


WEIGHTS = [W(f"{layer}.{kind}", layer, kind) for layer in range(3) for kind in ("q", "v")]
NORMS = {w.name: 10.0 ** (i - 2) for i, w in enumerate(WEIGHTS)}


@pytest.mark.parametrize(
    "how",
    [
        Uniform(),
        ScaleFree(1.0),
        ScaleFree(5.0),
        OverDepth((1.0, 0.0)),
        OverDepth((2.0,)),
        PerKind({"q": 3}),
    ],
)
@pytest.mark.parametrize("per", ["weight", "block"])
def test_all_but_the_preset_average_to_one(how, per):
    from forgetless.penalty.layers import PerBlock

    c = (PerBlock(how) if per == "block" else how).coefficients(NORMS, WEIGHTS)
    assert sum(c.values()) / len(c) == pytest.approx(1.0)
    if per == "block":
        assert all(c[f"{i}.q"] == c[f"{i}.v"] for i in range(3))


def test_the_papers_softmax():
    c = Softmax(tau=1.0).coefficients(
        {w.name: float(i == 0) for i, w in enumerate(WEIGHTS)}, WEIGHTS
    )
    assert sum(c.values()) == pytest.approx(1.0)
    assert c["0.q"] / c["0.v"] == pytest.approx(2.718281828)
    flat = Softmax(tau=1e-8).coefficients(NORMS, WEIGHTS)
    assert all(value == pytest.approx(1 / 6, rel=1e-4) for value in flat.values())


def test_scale_free_ignores_the_unit_of_importance():
    a = ScaleFree(1.0).coefficients(NORMS, WEIGHTS)
    b = ScaleFree(1.0).coefficients({k: v * 1e9 for k, v in NORMS.items()}, WEIGHTS)
    assert a == pytest.approx(b)


def test_interpolation_over_depth():
    c = OverDepth((3.0, 1.0)).coefficients(NORMS, WEIGHTS)
    assert [c[f"{i}.q"] for i in range(3)] == pytest.approx([1.5, 1.0, 0.5])


def test_options():
    assert from_option("softmax", tau=2.0) == Softmax(2.0)
    assert from_option("1, 0.5") == OverDepth((1.0, 0.5))
    assert from_option({"q": 2}) == PerKind({"q": 2.0})
    with pytest.raises(OptionError, match="did you mean 'uniform'"):
        from_option("unifrm")
    with pytest.raises(OptionError, match="no target weight of kind 'z'"):
        from_option({"z": 2}).coefficients(NORMS, WEIGHTS)
    with pytest.raises(OptionError, match="finite"):
        from_option([1, -1])
