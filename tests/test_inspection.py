"""What people see of an importance file, and the errors of a tier that it states."""

import pytest
import torch

from forgetless.cli import main
from forgetless.importance.covariance import Covariance
from forgetless.importance.describe import BLOCKS, HISTOGRAM_COLUMNS, histogram
from forgetless.importance.energy_errors import UPDATE_RANK, energy_errors
from forgetless.importance.entries import DenseEntry, KroneckerEntry
from forgetless.importance.importance import Importance


def spread(out, into, seed=0):
    g = torch.Generator().manual_seed(seed)
    return DenseEntry(
        torch.randn(out, into, generator=g).mul(2).exp()
        * (torch.rand(out, into, generator=g) > 0.2)
    )


def updates(entry):
    """The two fixed updates by hand, for element-wise importance."""
    g = torch.Generator().manual_seed(0)
    U = torch.randn(entry.shape[0], UPDATE_RANK, generator=g) @ torch.randn(
        UPDATE_RANK, entry.shape[1], generator=g
    )
    return U, U / (1 + 100 * entry.dense() / entry.dense().mean())


@pytest.mark.parametrize("tier", ["bf16", "u8", "u4", "factored"])
def test_the_error_is_that_of_the_energy_on_both_updates(tier):
    importance = Importance({"w": spread(70, 200)})
    converted = importance.to_tier(tier)
    expected = [
        abs(float(converted["w"].energy(U) / importance["w"].energy(U)) - 1)
        for U in updates(importance["w"])
    ]
    assert converted.info["energy_error"]["against"] == "f32"
    assert converted.info["energy_error"]["weights"]["w"] == pytest.approx(
        expected, rel=1e-2, abs=1e-6
    )
    assert importance.to_tier("f32").info["energy_error"]["weights"]["w"] == (0.0, 0.0)


def test_covariances_are_compared_without_forming_the_update():
    square = lambda n: (lambda m: Covariance(m @ m.T))(
        torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    )
    whole = KroneckerEntry(square(30), square(50))
    cut = KroneckerEntry(whole.out_cov.cut(4), whole.in_cov.cut(4))
    g = torch.Generator().manual_seed(0)
    L, R = torch.randn(30, UPDATE_RANK, generator=g), torch.randn(UPDATE_RANK, 50, generator=g)
    thin = L / (1 + 100 * whole.out_cov.diagonal() / whole.out_cov.diagonal().mean())[:, None]
    flat = R / (1 + 100 * whole.in_cov.diagonal() / whole.in_cov.diagonal().mean())
    expected = [abs(float(cut.energy(U) / whole.energy(U)) - 1) for U in (L @ R, thin @ flat)]
    assert energy_errors(whole, cut) == pytest.approx(expected, rel=1e-3)
    assert energy_errors(whole, whole) == (0.0, 0.0)


def test_importance_that_is_zero_has_no_error():
    nothing = DenseEntry(torch.zeros(4, 5))
    assert Importance({"w": nothing}).to_tier("u8").info["energy_error"]["weights"]["w"] == (
        0.0,
        0.0,
    )


def test_histogram_places_values_by_their_decades():
    values = torch.tensor([0.0, 1e-6, 1e-3, 1e-3, 1e-3, 1e-3, 1.0])
    picture = histogram(values, -3.0, 0.0)
    assert (
        len(picture) == HISTOGRAM_COLUMNS
        and picture[0] == "█"
        and picture[-1] == "▂"
        and set(picture[1:-1]) == {" "}
    )
    assert histogram(torch.zeros(3), 0.0, 0.0).strip() == ""
    assert set(histogram(spread(50, 60).values, -4.0, 4.0)) <= set(BLOCKS)


def test_inspect_shows_size_tier_error_and_one_axis_for_all_weights(tmp_path, capsys):
    path = tmp_path / "i.safetensors"
    importance = Importance(
        {"a.weight": spread(40, 130), "b.weight": DenseEntry(spread(40, 130, 1).values * 1e-3)},
        {},
        {"estimator": "fisher"},
    )
    importance.to_tier("u4").save(path)
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "MiB" in lines[0] and any(line.split() == ["tier", "u4"] for line in lines)
    assert any(
        line.startswith("energy error random update: median") and line.endswith("against f32)")
        for line in lines
    )
    a, b = (line.split("%", 1)[1] for line in lines if line.startswith(("a.weight", "b.weight")))
    assert a.index("█") > b.index("█")  # three decades apart
    importance.save(path)
    assert main(["inspect", str(path)]) == 0
    assert "energy error" not in capsys.readouterr().out
