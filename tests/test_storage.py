"""Importance files: what is written is read back; anything else is refused with what to do."""

import pytest
import torch
from safetensors.torch import save_file

from holdfast.importance.container import DenseEntry, Importance
from holdfast.runs import atomic_path, check_output_file, check_output_folder, read_json, write_json


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
        assert list(loaded) == list(importance) and loaded.tier == tier and loaded.info["estimator"] == "path"
        for name in importance:
            assert torch.equal(loaded[name].values, importance[name].values.to(dtype))
        assert torch.equal(loaded.anchors["a.weight"][0], importance.anchors["a.weight"][0])
    assert "a.weight" in loaded.describe() and [p.name for p in sorted(tmp_path.iterdir())] == ["bf16.safetensors", "f32.safetensors"]


@pytest.mark.parametrize("tier", ["u8", "u4"])
def test_codes_are_read_back_as_they_were(importance, tier, tmp_path):
    path, coded = tmp_path / "i.safetensors", importance.to_tier(tier)
    coded.save(path)
    loaded = Importance.load(path)
    assert loaded.tier == tier and loaded.info["tier"] == tier and list(loaded) == list(coded) and "coded" not in loaded.info
    for name in coded:
        assert loaded[name].shape == importance[name].shape
        assert torch.equal(loaded[name].codes, coded[name].codes) and torch.equal(loaded[name].dense(), coded[name].dense())
        assert torch.equal(loaded[name].rows(slice(1, 3)), coded[name].dense()[1:3])
        assert loaded[name].norm() == pytest.approx(importance[name].norm(), rel=0.2)
    assert torch.equal(loaded.anchors["a.weight"][0], importance.anchors["a.weight"][0])
    assert loaded.to_tier("f32")["a.weight"].values.dtype == torch.float32 and tier in loaded.describe()
    with pytest.raises(ValueError, match="unknown tier 'u5'; known: f32, bf16, u8, u4"):
        importance.to_tier("u5")


def test_files_without_their_scale_are_refused(importance, tmp_path):
    coded = importance.to_tier("u8")["a.weight"]
    path = tmp_path / "i.safetensors"
    save_file({"a.weight.codes": coded.codes}, str(path), metadata={"holdfast": '{"format": 1, "coded": {"a.weight": ["u8", 3, 5]}}'})
    with pytest.raises(ValueError, match=r"'a.weight' lacks its codes or its scale"):
        Importance.load(path)
    save_file(
        {"a.weight.codes": coded.codes, "a.weight.scale": coded.scale}, str(path), metadata={"holdfast": '{"format": 1, "coded": {"a.weight": ["u8", 3, 6]}}'}
    )
    with pytest.raises(ValueError, match=r"'a.weight.codes' is \(3, 5\)"):
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
    save_file({"x": torch.ones(2, 2)}, str(path), metadata={"holdfast": '{"format": 99}'})
    with pytest.raises(ValueError, match="format 99"):
        Importance.load(path)
    save_file({"x": torch.tensor([[1.0, float("nan")]])}, str(path), metadata={"holdfast": '{"format": 1}'})
    with pytest.raises(ValueError, match="'x' has non-finite"):
        Importance.load(path)
    save_file({"x": torch.tensor([[1.0, -1.0]])}, str(path), metadata={"holdfast": '{"format": 1}'})
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
