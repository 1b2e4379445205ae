"""Axolotl: a plugin that holds the model while it trains. In the YAML file of a run:

    plugins:
      - holdfast.integrations.axolotl.HoldfastPlugin
    holdfast_importance: model.importance.safetensors     # or its folder, or a Hub name
    holdfast_strength: 10                                 # optional, as are holdfast_anchor: base | recorded, holdfast_offload: true

Its numbers (energy, pull norm, pull/gradient ratio) reach every reporter of the run. A forgetting budget scales the finished update before it is saved, for
which Axolotl has no place: run `holdfast shrink` on the adapter, or train with `holdfast tune --budget`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from holdfast.callback import hold
from holdfast.options import OptionError


class HoldfastArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """What the plugin reads in the YAML file of a run."""

    holdfast_importance: str | None = None
    holdfast_strength: float | None = None
    holdfast_anchor: str = "base"
    holdfast_offload: bool = False


class HoldfastPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """See the module. Raises OptionError without `holdfast_importance`, ValueError where it does not fit the model, before training starts."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the names of our settings."""
        return "holdfast.integrations.axolotl.HoldfastArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Hold `trainer`. Nothing is returned to be added: our callback goes first, so that the reporters see its numbers."""
        given = HoldfastArgs(**{name: value for name in HoldfastArgs.model_fields if (value := cfg.get(name)) is not None})
        if not given.holdfast_importance:
            raise OptionError("the holdfast plugin needs holdfast_importance: a file of `holdfast record`, its folder or a Hub name")
        hold(trainer, given.holdfast_importance, strength=given.holdfast_strength, anchor=given.holdfast_anchor, offload=given.holdfast_offload)
        return []
