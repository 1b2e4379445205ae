"""Lightning: a callback that attaches a penalty to the optimizer of a fit, and logs what it does.

    # module.model is a PEFT model inside the LightningModule
    penalty = forgetless.Penalty(module.model, "model.importance.safetensors", strength=10.0)
    L.Trainer(callbacks=[LightningCallback(penalty)]).fit(module, data)

Lightning runs forward, backward and clipping in the optimizer's closure. The pull comes after it,
right before the optimizer moves anything, so gradient accumulation needs nothing special. Among
several optimizers the one that trains the target weights is found.
"""

from __future__ import annotations

from typing import Any

from forgetless.penalty.pull import Penalty

try:
    from lightning.pytorch import Callback
except ImportError:  # the package under its older name
    from pytorch_lightning import Callback


class LightningCallback(Callback):
    """Holds the model while it is fitted.

    Raises ValueError when fitting begins where no optimizer trains the target weights.
    """

    def __init__(self, penalty: Penalty):
        self.penalty = penalty
        self._attachment: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.close()
        target = next(
            p for weight in self.penalty.weights for p in weight.parameters if p.requires_grad
        )
        ours = [
            o
            for o in trainer.optimizers
            if any(p is target for group in o.param_groups for p in group["params"])
        ]
        self._attachment = self.penalty.attach((ours or trainer.optimizers)[0])

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs := self.penalty.logs():
            pl_module.log_dict(logs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Take the penalty off the optimizer."""
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None
