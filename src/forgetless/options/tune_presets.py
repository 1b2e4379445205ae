"""The presets of `forgetless tune`: our recipe, and that of Song et al. 2025 (arXiv 2501.13669)."""

from __future__ import annotations

from forgetless.options.option import Given

TUNE_PRESETS: dict[str, Given] = {
    "paper": dict(
        targets="q_proj,v_proj",
        rank=8,
        alpha=32.0,
        dropout=0.1,
        strength=1e-3,
        layers="softmax",
        tau=1e-8,
        anchor="recorded",
        learning_rate=8e-4,
        epochs=5.0,
        batch_size=20,
        accumulation=4,
        length=800,
    ),
    "default": dict(
        targets="all-linear",
        rank=8,
        alpha=32.0,
        dropout=0.0,
        layers="uniform",
        tau=1.0,
        anchor="base",
        learning_rate=1e-3,
        epochs=1.0,
        batch_size=4,
        accumulation=4,
        length=1024,
    ),
}
