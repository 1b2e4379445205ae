"""Axolotl: a plugin that holds the model while it trains. In the YAML file of a run:

    plugins:
      - forgetless.integrations.axolotl.ForgetlessPlugin
    forgetless_importance: model.importance.safetensors   # or its folder, or a Hub name
    forgetless_strength: 10       # default: what suits the importance's estimator
    forgetless_anchor: base       # or recorded
    forgetless_offload: false     # whether importance stays in CPU memory

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
    """Holds the model of an Axolotl run, by the settings above.

    Raises OptionError without `forgetless_importance`, ValueError where it does not fit the model,
    both before training starts.
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the names of our settings."""
        return "forgetless.integrations.axolotl.ForgetlessArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Hold `trainer`.

        Axolotl would add callbacks that are returned behind the reporters. Ours is added by `hold`
        and goes first, so that they see its numbers; nothing is returned.
        """
        values = {name: cfg.get(name) for name in ForgetlessArgs.model_fields}
        given = ForgetlessArgs(
            **{name: value for name, value in values.items() if value is not None}
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
