"""Axolotl: a plugin that holds the model while it trains. In the YAML file of a run:

    plugins:
      - forgetless.integrations.axolotl.ForgetlessPlugin
    forgetless_importance: model.importance.safetensors     # or its folder, or a Hub name
    forgetless_strength: 10                                 # optional, as are forgetless_anchor:
        base | recorded, forgetless_offload: true

Its numbers (energy, pull norm, pull/gradient ratio) reach every reporter of the run. A forgetting
budget scales the finished update before it is saved, for which Axolotl has no place: run
`forgetless shrink` on the adapter, or train with `forgetless tune --budget`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from forgetless.errors import OptionError
from forgetless.integrations.hold import hold


class ForgetlessArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """What the plugin reads in the YAML file of a run."""

    forgetless_importance: str | None = None
    forgetless_strength: float | None = None
    forgetless_anchor: str = "base"
    forgetless_offload: bool = False


class ForgetlessPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """See the module.

    Raises OptionError without `forgetless_importance`, ValueError where it does not fit the model,
    before training starts.
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the names of our settings."""
        return "forgetless.integrations.axolotl.ForgetlessArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Hold `trainer`.

        Nothing is returned to be added: our callback goes first, so that the reporters see its
        numbers.
        """
        given = ForgetlessArgs(
            **{
                name: value
                for name in ForgetlessArgs.model_fields
                if (value := cfg.get(name)) is not None
            }
        )
        if not given.forgetless_importance:
            raise OptionError(
                "the forgetless plugin needs forgetless_importance: a file of `forgetless "
                "record`, its folder or a Hub name"
            )
        hold(
            trainer,
            given.forgetless_importance,
            strength=given.forgetless_strength,
            anchor=given.forgetless_anchor,
            offload=given.forgetless_offload,
        )
        return []
