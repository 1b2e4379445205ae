"""Importance files: what is written is read back; anything else is refused with what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetless.cli import main
from forgetless.files.atomic import atomic_path, read_json, write_json
from forgetless.files.room import check_output_file, check_output_folder
from forgetless.importance.covariance import Covariance, LowRankCovariance
from forgetless.importance.entries import DenseEntry, FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance


@pytest.fixture
def importance():
    return Importance(
        {"a.weight": DenseEntry(torch.rand(3, 5)), "b.weight": DenseEntry(torch.rand(4, 2))},
        {"a.weight": (torch.rand(2, 5), torch.rand(3, 2))},
        {"estimator": "path"},
    )


def test_round_trip_in_both_tiers(importance, tmp_path):
    for tier, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        path = tmp_path / f"{tier}.safetensors"
        importance.to_tier(tier).save(path)
        loaded = Importance.load(path)
        assert (
            list(loaded) == list(importance)
            and loaded.tier == tier
            and loaded.info["estimator"] == "path"
        )
        for name in importance:
            assert torch.equal(loaded[name].values, importance[name].values.to(dtype))
        assert torch.equal(loaded.anchors["a.weight"][0], importance.anchors["a.weight"][0])
    assert "a.weight" in loaded.describe() and [p.name for p in sorted(tmp_path.iterdir())] == [
        "bf16.safetensors",
        "f32.safetensors",
    ]


@pytest.mark.parametrize("tier", ["u8", "u4"])
def test_codes_are_read_back_as_they_were(importance, tier, tmp_path):
    path, coded = tmp_path / "i.safetensors", importance.to_tier(tier)
    coded.save(path)
    loaded = Importance.load(path)
    assert (
        loaded.tier == tier
        and loaded.info["tier"] == tier
        and list(loaded) == list(coded)
        and "coded" not in loaded.info
    )
    for name in coded:
        assert loaded[name].shape == importance[name].shape
        assert torch.equal(loaded[name].codes, coded[name].codes) and torch.equal(
            loaded[name].dense(), coded[name].dense()
        )
        assert torch.equal(loaded[name].rows(slice(1, 3)), coded[name].dense()[1:3])
        assert loaded[name].norm() == pytest.approx(importance[name].norm(), rel=0.2)
    assert torch.equal(loaded.anchors["a.weight"][0], importance.anchors["a.weight"][0])
    assert (
        loaded.to_tier("f32")["a.weight"].values.dtype == torch.float32
        and tier in loaded.describe()
    )
    with pytest.raises(ValueError, match="unknown tier 'u5'; did you mean 'u8'"):
        importance.to_tier("u5")


def test_files_without_their_scale_are_refused(importance, tmp_path):
    coded = importance.to_tier("u8")["a.weight"]
    path = tmp_path / "i.safetensors"
    save_file(
        {"a.weight.codes": coded.codes},
        str(path),
        metadata={"forgetless": '{"format": 1, "coded": {"a.weight": ["u8", 3, 5]}}'},
    )
    with pytest.raises(ValueError, match=r"'a.weight' lacks its codes or its scale"):
        Importance.load(path)
    save_file(
        {"a.weight.codes": coded.codes, "a.weight.scale": coded.scale},
        str(path),
        metadata={"forgetless": '{"format": 1, "coded": {"a.weight": ["u8", 3, 6]}}'},
    )
    with pytest.raises(ValueError, match=r"'a.weight'.codes is \(3, 5\)"):
        Importance.load(path)


def test_bad_files_are_refused(importance, tmp_path):
    path = tmp_path / "i.safetensors"
    importance.save(path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"not a file", b"", whole[:4]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Importance.load(path)
    save_file({"x": torch.ones(2, 2)}, str(path))
    with pytest.raises(ValueError, match="something else"):
        Importance.load(path)
    save_file({"x": torch.ones(2, 2)}, str(path), metadata={"forgetless": '{"format": 99}'})
    with pytest.raises(ValueError, match="format 99"):
        Importance.load(path)
    save_file(
        {"x": torch.tensor([[1.0, float("nan")]])},
        str(path),
        metadata={"forgetless": '{"format": 1}'},
    )
    with pytest.raises(ValueError, match="'x' has non-finite"):
        Importance.load(path)
    save_file(
        {"x": torch.tensor([[1.0, -1.0]])}, str(path), metadata={"forgetless": '{"format": 1}'}
    )
    with pytest.raises(ValueError, match="negative"):
        Importance.load(path)


def test_saving_non_finite_importance_leaves_the_old_file(importance, tmp_path):
    path = tmp_path / "i.safetensors"
    importance.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="non-finite"):
        Importance({"a": DenseEntry(torch.tensor([[float("inf")]]))}).save(path)
    assert path.read_bytes() == before


def test_interrupted_writes_leave_nothing(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    write_json(path, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert read_json(path) == {"a": None, "b": [1.5, None]}


def test_unwritable_places_are_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        check_output_folder(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="is a folder"):
        check_output_file(tmp_path)


def low_rank_of(n, k):
    return LowRankCovariance(
        torch.linalg.qr(torch.randn(n, k))[0], torch.rand(k), torch.tensor(0.1)
    )


@pytest.fixture
def forms():
    """One importance of every form, with a shared input covariance and a weight name that looks
    like a suffix.
    """
    whole, thin = Covariance(torch.eye(5) + 0.1), low_rank_of(5, 2)
    return {
        "factored": Importance(
            {
                "a.weight": FactoredEntry(torch.rand(3, 1), torch.rand(5, 1)),
                "b.row.weight": FactoredEntry(torch.rand(4, 1), torch.rand(2, 1)),
            }
        ),
        "factored:3": Importance(
            {"a.weight": FactoredEntry(torch.rand(3, 3), torch.rand(5, 3))},
            {"a.weight": (torch.rand(2, 5), torch.rand(3, 2))},
        ),
        "kronecker": Importance(
            {
                "z.weight": KroneckerEntry(Covariance(torch.eye(3)), whole),
                "a.weight": KroneckerEntry(Covariance(torch.eye(4)), whole),
            }
        ),
        "kronecker:2": Importance(
            {
                "z.weight": KroneckerEntry(low_rank_of(3, 2), thin),
                "a.weight": KroneckerEntry(low_rank_of(4, 2), thin),
            }
        ),
    }


def test_every_form_is_read_back_exactly(forms, tmp_path):
    for tier, importance in forms.items():
        path = tmp_path / "i.safetensors"
        importance.save(path)
        loaded = Importance.load(path)
        assert (
            loaded.tier == tier
            and set(loaded) == set(importance)
            and set(loaded.anchors) == set(importance.anchors)
        )
        for name in importance:
            old, new = importance[name].tensors(), loaded[name].tensors()
            assert old.keys() == new.keys() and all(
                torch.equal(old[suffix], new[suffix]) for suffix in old
            )
            assert loaded[name].shape == importance[name].shape
        assert tier in loaded.describe() and all(name in loaded.describe() for name in importance)
        loaded.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_shared_input_covariance_is_stored_once(forms, tmp_path):
    for tier, expected in (
        ("kronecker", {"z.weight.out_cov", "a.weight.out_cov", "a.weight.in_cov"}),
        (
            "kronecker:2",
            {
                f"{w}.out_cov.{part}"
                for w in ("z.weight", "a.weight")
                for part in ("vectors", "values", "floor")
            }
            | {f"a.weight.in_cov.{part}" for part in ("vectors", "values", "floor")},
        ),
    ):
        path = tmp_path / "i.safetensors"
        forms[tier].save(path)
        assert set(load_file(path)) == expected
        loaded = Importance.load(path)
        assert loaded["a.weight"].in_cov is loaded["z.weight"].in_cov


def damaged(tmp_path, tensors, shared=None):
    path = tmp_path / "damaged.safetensors"
    info = {"format": 1, **({"shared_in_cov": shared} if shared is not None else {})}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        str(path),
        metadata={"forgetless": json.dumps(info)},
    )
    return path


@pytest.mark.parametrize(
    ("tensors", "shared", "message"),
    [
        ({"w.row": torch.ones(3, 1)}, None, "'w' is made of .row"),
        ({"w.row": torch.ones(3, 1), "w.col": torch.ones(2, 2)}, None, "1 .* 2"),
        (
            {"w.row": -torch.ones(3, 1), "w.col": torch.ones(2, 1)},
            None,
            r"'w'\.row has negative importance",
        ),
        (
            {"w.row": torch.ones(3, 1), "w.col": torch.tensor([[float("inf")]])},
            None,
            r"'w'\.col has non-finite",
        ),
        ({"w.row": torch.ones(3), "w.col": torch.ones(2, 1)}, None, "expected 2 dimensions"),
        ({"w.out_cov": torch.eye(3)}, None, "no whole importance"),
        ({"w.out_cov": torch.ones(3, 2), "w.in_cov": torch.eye(2)}, None, "square"),
        ({"w.out_cov": -torch.eye(3), "w.in_cov": torch.eye(2)}, None, "negative variances"),
        (
            {"w.out_cov": torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "w.in_cov": torch.eye(2)},
            None,
            "not symmetric",
        ),
        ({"w.out_cov": torch.eye(3)}, {"w": "v"}, "shares the input covariance of 'v'"),
        (
            {
                "w.out_cov.vectors": torch.ones(3, 2),
                "w.out_cov.values": torch.ones(1),
                "w.out_cov.floor": torch.tensor(1.0),
                "w.in_cov": torch.eye(2),
            },
            None,
            "2 directions",
        ),
        (
            {
                "w.out_cov.vectors": torch.ones(3, 1),
                "w.out_cov.values": torch.ones(1),
                "w.out_cov.floor": torch.tensor(-1.0),
                "w.in_cov": torch.eye(2),
            },
            None,
            "negative importance",
        ),
        (
            {
                "w.out_cov.vectors": 100 * torch.eye(3)[:, :2],
                "w.out_cov.values": torch.ones(2),
                "w.out_cov.floor": torch.tensor(1.0),
                "w.in_cov": torch.eye(2),
            },
            None,
            "not orthonormal",
        ),
        ({"w": torch.ones(2, 2), "w.anchor_A": torch.ones(1, 2)}, None, "half a recorded adapter"),
    ],
)
def test_damaged_forms_are_refused(tmp_path, tensors, shared, message):
    with pytest.raises(ValueError, match=message):
        Importance.load(damaged(tmp_path, tensors, shared))


def test_convert_writes_the_new_tier_or_nothing(forms, tmp_path):
    source, out = tmp_path / "k.safetensors", tmp_path / "out.safetensors"
    forms["kronecker"].save(source)
    assert main(["convert", str(source), "--tier", "kronecker:1", "--out", str(out)]) == 0
    loaded = Importance.load(out)
    assert loaded.tier == "kronecker:1" and loaded.info["tier"] == "kronecker:1"
    assert main(["convert", str(source), "--tier", "factored", "--out", str(out)]) == 0
    assert Importance.load(out).tier == "factored"
    whole = out.read_bytes()
    factored = tmp_path / "factored.safetensors"
    factored.write_bytes(whole)
    assert main(["convert", str(factored), "--tier", "kronecker", "--out", str(out)]) == 1
    assert main(["convert", str(factored), "--tier", "f23", "--out", str(out)]) == 2
    assert main(["convert", str(out), "--tier", "factored", "--out", str(out)]) == 2  # an input
    assert out.read_bytes() == whole
