"""`o-lora`: each adapter learns in directions of its own, orthogonal to those of the adapters
before it (arXiv 2310.14152).

    loss = CE(domain) + weight * sum over weights and earlier adapters i of ||A_i A^T||_F^2
    where A (r, in) is what a weight's update reads

Where A_i A^T = 0, the new update reads nothing of what the earlier one reads. MODEL is the base
with the earlier adapters merged into it, and `--earlier` names them: only their A is read. The
paper's text squares the products as we do, its code sums absolute values; its weight is 0.5. The
first domain has no earlier adapter and is tuned plainly.

The gradient in closed form is 2 weight A G with G = sum_i A_i^T A_i. It costs two thin products per
weight in each optimizer step.

    forgetless merge first/final --out merged
    forgetless tune merged --data second.jsonl --method o-lora --earlier first/final --out second
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from forgetless.errors import FileError
from forgetless.methods.method import Setup
from forgetless.model.adapters import adapter_inputs
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight, wider
from forgetless.options.option import several
from forgetless.options.tune import TuneOptions


class Orthogonality:
    """The term on every LoRA weight of `model` that an earlier adapter adapts too.

    `earlier` maps the name of a base weight to the A of each adapter, (r_i, in). Raises ValueError
    where they do not fit the model, or share no weight with it.
    """

    def __init__(
        self, model: nn.Module, earlier: Mapping[str, Sequence[Tensor]], *, weight: float = 0.5
    ):
        self.weight = weight
        self._last = 0.0
        # A (r, in), and the rows of all earlier A (sum of r_i, in).
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for target in target_weights(model):
            if not isinstance(target, LowRankWeight) or target.name not in earlier:
                continue
            for A in earlier[target.name]:
                if A.shape[1] != target.shape[1]:
                    raise ValueError(
                        f"an earlier adapter does not fit the model: '{target.name}' has "
                        f"{A.shape[1]} inputs there and {target.shape[1]} here; "
                        "--earlier wants adapters of the same base model"
                    )
            device, dtype = target.A.device, wider(target.A.dtype)
            rows = torch.cat([A.to(device, dtype) for A in earlier[target.name]])
            self._pairs.append((target.A, rows))
        if not self._pairs:
            raise ValueError(
                "no target weight is adapted by an earlier adapter; give --earlier adapters on "
                "the same targets, or tune without o-lora"
            )

    @torch.no_grad()
    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of the term, times `scale`, to `.grad`."""
        self._last = 0.0
        for A, rows in self._pairs:
            overlap = A.to(rows.dtype) @ rows.T  # (r, sum of r_i)
            self._last += float(overlap.square().sum())
            gradient = (2 * self.weight * scale * (overlap @ rows)).to(A.dtype)
            A.grad = gradient if A.grad is None else A.grad.add_(gradient)

    def logs(self) -> dict[str, float]:
        """The sum of squares at the last step, without the weight."""
        return {"orthogonality": self._last}


def check_earlier(options: TuneOptions) -> None:
    """Refuse earlier adapters that are not there."""
    if options.earlier:
        _folders(options.earlier)


def o_lora(setup: Setup, model: nn.Module) -> Orthogonality | None:
    """The `Orthogonality` that the options ask for; None where its weight is 0."""
    o = setup.options
    assert o.earlier is not None and o.orthogonality is not None
    if o.orthogonality == 0:
        return None
    earlier: dict[str, list[Tensor]] = {}
    for folder in _folders(o.earlier):
        for name, A in adapter_inputs(folder).items():
            earlier.setdefault(name, []).append(A)
    return Orthogonality(model, earlier, weight=o.orthogonality)


def _folders(earlier: str) -> list[Path]:
    """The adapter folders that --earlier names. Raises FileError where one is none."""
    folders = [Path(folder) for folder in several(earlier)]
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise FileError(
                f"--earlier: '{folder}' is not an adapter folder, expected adapter_config.json "
                "in it; give the final/ folders of earlier runs"
            )
    return folders
