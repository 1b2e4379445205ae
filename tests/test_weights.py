"""Target weights: canonical names, shapes as (out, in), effective updates, and refusals, over the
architectures users bring.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from conftest import CONFIGS, SMALL
from forgetless.errors import OptionError
from forgetless.model.adapters import add_adapter
from forgetless.model.fingerprint import fingerprint
from forgetless.model.linear import base_shapes, matching
from forgetless.model.targets import target_weights


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("rslora", [False, True])
def test_update_is_what_merging_adds_to_the_base_weight(tiny, kind, rslora):
    bare = tiny(kind)
    base = {name: p.detach().clone() for name, p in bare.named_parameters()}
    model = add_adapter(bare, names="all-linear", rank=3, alpha=5, rslora=rslora)
    weights = target_weights(model)
    for weight in weights:
        torch.nn.init.normal_(weight.B, std=0.1)
    updates = {weight.name: weight.update() for weight in weights}
    assert {name: tuple(u.shape) for name, u in updates.items()} == {
        w.name: w.shape for w in weights
    }
    merged = dict(model.merge_and_unload().named_parameters())
    for name, update in updates.items():
        moved = merged[name] - base[name]
        if kind == "gpt2":
            moved = moved.T
        torch.testing.assert_close(moved, update, atol=1e-6, rtol=1e-4)


def test_names_layers_and_kinds_are_those_of_the_base_model(tiny):
    weights = target_weights(add_adapter(tiny(), names="q_proj,v_proj", rank=2, alpha=4))
    assert [w.name for w in weights] == [
        f"model.layers.{i}.self_attn.{k}.weight" for i in (0, 1) for k in ("q_proj", "v_proj")
    ]
    assert [(w.layer, w.kind) for w in weights] == [
        (0, "q_proj"),
        (0, "v_proj"),
        (1, "q_proj"),
        (1, "v_proj"),
    ]
    assert [w.shape for w in weights] == [(16, 16), (8, 16)] * 2


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_full_fine_tuning_measures_from_the_snapshot(tiny, kind):
    model = tiny(kind)
    weights = target_weights(model, names="all-linear")
    assert weights and all(w.shape == base_shapes(model)[w.name] for w in weights)
    with torch.no_grad():
        weights[0].W.add_(0.25)
    assert torch.allclose(weights[0].update(), torch.full(weights[0].shape, 0.25))
    assert not weights[1].update().any()


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_shapes_and_fingerprint_do_not_depend_on_adapter_or_dtype(tiny, kind):
    shapes, mark = base_shapes(tiny(kind)), fingerprint(tiny(kind))
    assert fingerprint(tiny(kind, torch.bfloat16)) == fingerprint(tiny(kind, torch.float16)) == mark
    adapted = add_adapter(tiny(kind), names="all-linear", rank=2, alpha=2)
    assert base_shapes(adapted) == shapes and fingerprint(adapted) == mark
    other = tiny(kind)
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    assert fingerprint(other) != mark


def test_adapters_that_move_the_base_are_refused_or_subtracted(tiny):
    model = get_peft_model(
        tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    with pytest.raises(ValueError, match="starts away from the base model"):
        target_weights(model)
    weights = target_weights(model, subtract_initial=True)
    assert all(w.B.any() and not w.update().any() for w in weights)
    with torch.no_grad():
        weights[0].B.add_(1)
    assert weights[0].update().any()


def test_several_active_adapters_dora_embeddings_and_merged_are_refused(tiny):
    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=2)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(target_weights(model)) == 2
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        target_weights(model)
    with pytest.raises(ValueError, match="DoRA"):
        target_weights(
            get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        )
    with pytest.raises(ValueError, match="expected a linear layer"):
        target_weights(get_peft_model(tiny(), LoraConfig(r=2, target_modules=["embed_tokens"])))
    merged = add_adapter(tiny(), names="q_proj", rank=2, alpha=2)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        target_weights(merged)


def test_targets_by_name_all_linear_and_regular_expression(tiny):
    model = tiny()
    assert len(matching(model, "all-linear")) == 14
    assert [path for path, _ in matching(model, r"model\.layers\.1\..*[qk]_proj")] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    with pytest.raises(OptionError, match="did you mean 'q_proj'"):
        matching(model, "q_prj")
    with pytest.raises(OptionError, match="matches no linear layer"):
        matching(model, "nothing.*")
    adapted = add_adapter(tiny(), names=r"model\.layers\.1\..*[qk]_proj", rank=2, alpha=2)
    assert [w.name for w in target_weights(adapted)] == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ]


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request):
    torch.manual_seed(0)
    if request.param == "mixtral":
        return AutoModelForCausalLM.from_config(
            MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
        )
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            **SMALL, head_dim=8, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1
        )
    )


def test_fused_experts_are_refused_with_a_reason_and_never_skipped_silently(mixture, caplog):
    for names in ("gate_up_proj", "experts"):
        with pytest.raises(ValueError, match="fused expert tensors"):
            matching(mixture, names)
    with pytest.raises(ValueError, match="freeze them, or name the targets"):
        target_weights(mixture)
    assert {w.kind for w in target_weights(mixture, names="q_proj")} == {"q_proj"}
    adapted = add_adapter(mixture, names="all-linear", rank=2, alpha=2)
    assert "leaves out 4 fused expert tensors" in caplog.text
    assert {w.kind for w in target_weights(adapted)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_lora_on_fused_experts_is_refused(mixture):
    adapted = get_peft_model(
        mixture,
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    )
    with pytest.raises(ValueError, match="fused expert tensors"):
        target_weights(adapted)


def test_a_bare_model_is_held_where_it_is_trained(tiny):
    model = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        target_weights(model)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert [w.name for w in target_weights(model)] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("how", "moves"),
    [("olora", True), ("pissa_niter_2", True), ("gaussian", False), ("orthogonal", False)],
)
def test_initialisations_are_refused_exactly_where_they_move_the_base(tiny, how, moves):
    bare = tiny()
    base = bare.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=how))
    assert torch.equal(bare.model.layers[0].self_attn.q_proj.base_layer.weight, base) != moves
    if moves:
        with pytest.raises(ValueError, match="starts away from the base model"):
            target_weights(model)
    else:
        assert float(target_weights(model)[0].update().abs().max()) < 1e-6
