"""The update that a model carries: scaled in several ways, and brought back."""

import copy

import pytest
import torch

from forgetless.model.adapters import active_lora_layers, add_adapter, peft_targets
from forgetless.model.targets import target_weights
from forgetless.model.update import AdapterUpdate, ModelUpdate, Update


@pytest.fixture
def adapted(tiny):
    model = add_adapter(tiny(), names="all-linear", rank=3, alpha=7)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.1)
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


def test_factors_and_layers_scale_alike(adapted, batch):
    finished = logits(adapted, batch)
    update, adapter = Update(adapted), AdapterUpdate(adapted)
    for factor in (0.7, 0.25, 0.0):
        update.scale(factor)
        by_factors = logits(adapted, batch)
        update.scale(1)
        adapter.scale(factor)
        torch.testing.assert_close(logits(adapted, batch), by_factors, rtol=1e-5, atol=1e-6)
        adapter.scale(1)
    assert torch.equal(logits(adapted, batch), finished)


def test_layers_are_scaled_to_the_same_bits_in_any_order(adapted, batch):
    """A scale does not depend on the ones before it: in f32 it is what one product makes it."""
    layers = [layer for layer, _ in active_lora_layers(adapted)]
    finished = [layer.scaling["default"] for layer in layers]
    adapter, now = AdapterUpdate(adapted), 1.0
    running = list(finished)
    for factor in (0.9, 0.75, 0.6, 0.3, 0.05):
        adapter.scale(factor)
        running = [scale * (factor / now) for scale in running]
        now = factor
        scales = torch.tensor([layer.scaling["default"] for layer in layers])
        assert torch.equal(scales, torch.tensor(running))
    adapter.scale(1.0)
    assert [layer.scaling["default"] for layer in layers] == finished


def test_only_lora_has_layers_that_scale(tiny):
    from peft import OFTConfig, get_peft_model

    kinds, _ = peft_targets(tiny(), "q_proj")
    model = get_peft_model(tiny(), OFTConfig(target_modules=kinds, r=0, oft_block_size=4))
    with pytest.raises(ValueError, match="only LoRA updates can be scaled, found OFT"):
        AdapterUpdate(model)


def test_a_whole_model_moves_towards_another(tiny):
    base, tuned = tiny(), tiny()
    start = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    update = ModelUpdate(base, tuned)
    update.scale(0.25)
    for name, parameter in base.named_parameters():
        quarter = start[name] + 0.25 * (tuned.get_parameter(name) - start[name])
        torch.testing.assert_close(parameter, quarter, rtol=1e-5, atol=1e-7)
    update.scale(1)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, tuned.get_parameter(name))
