"""How far each weight moved: the norm of its update, by the factors and by the product."""

import pytest
import torch

from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.penalty.layers import PerKind
from forgetless.tune.moved import moved


def lora(tiny, kind="llama"):
    model = add_adapter(tiny(kind), names="all-linear", rank=3, alpha=6.0)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_movement_is_the_norm_of_the_update(tiny, kind):
    model = lora(tiny, kind)
    rows = {row.weight: row for row in moved(model)}
    for weight in target_weights(model):
        row = rows.pop(weight.name)
        assert row.movement == pytest.approx(float(weight.update().norm()), rel=1e-5) and (
            row.layer,
            row.kind,
        ) == (weight.layer, weight.kind)
        assert row.importance is None and row.coefficient is None
    assert not rows


def test_importance_and_coefficient_stand_beside_it(tiny):
    model = lora(tiny)
    importance = Importance(
        {weight.name: DenseEntry(torch.full(weight.shape, 2.0)) for weight in target_weights(model)}
    )
    rows = moved(model, importance, PerKind({"q_proj": 3.0}))
    assert all(row.importance == pytest.approx(importance[row.weight].norm()) for row in rows)
    held = {row.kind: row.coefficient for row in rows}
    assert held["q_proj"] == pytest.approx(3 * held["v_proj"])


def test_nothing_is_said_of_updates_that_are_not_at_hand(tiny):
    from peft import OFTConfig, get_peft_model

    assert moved(tiny()) is None
    assert (
        moved(get_peft_model(tiny(), OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0)))
        is None
    )
