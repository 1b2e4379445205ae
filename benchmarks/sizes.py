"""Files of importance for q_proj and v_proj of Llama-3-8B in every tier.

They are set against the f32 diagonal Fisher of the whole model.

One block's files are written and measured; the model has 32 such blocks. The whole model's weights
are counted from its configuration.

    python benchmarks/sizes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from measure import append, in_tiers, row

BLOCKS, HIDDEN, INNER, KEY_VALUE, VOCABULARY = 32, 4096, 14336, 1024, 128256
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
}
MIB = 2**20


def whole_model() -> int:
    """Weights of Llama-3-8B: attention, MLP and norms of each block, embedding, head, last norm."""
    block = 2 * HIDDEN * HIDDEN + 2 * KEY_VALUE * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    return BLOCKS * block + 2 * VOCABULARY * HIDDEN + HIDDEN


def main() -> None:
    """Write, measure, append."""
    fisher = whole_model() * 4 / MIB
    rows = [row("file", [fisher], shape="Llama-3-8B, whole", tier="f32 Fisher", unit="MiB")]
    count = sum(out * into for out, into in SHAPES.values())
    with tempfile.TemporaryDirectory() as folder:
        for tier, importance in in_tiers(SHAPES).items():
            path = Path(folder) / "importance.safetensors"
            importance.save(path)
            size = path.stat().st_size
            rows.append(
                row(
                    "file",
                    [size * BLOCKS / MIB],
                    shape="Llama-3-8B, q_proj + v_proj",
                    tier=tier,
                    unit="MiB",
                    against=[fisher],
                    baseline="f32 Fisher",
                )
            )
            rows.append(
                row(
                    "file",
                    [size / count],
                    shape="Llama-3-8B, q_proj + v_proj",
                    tier=tier,
                    unit="bytes per weight",
                )
            )
    append(rows)


if __name__ == "__main__":
    main()
