"""The figure of an importance file: how much each layer and kind of weight matters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from forgetless.files.compare_json import ImportanceFile, WeightImportance
from forgetless.report.drawing import GREY_COLOURS, Figure, FigurePart, Trace, axis, safe

Weights = Sequence[WeightImportance]


def heat_map(item: ImportanceFile) -> Figure | None:
    """Importance per layer and kind of weight as log10 of the norm; beside it the layer
    coefficients where they are known. None without norms.
    """
    weights = [weight for weight in item.weights if weight.norm is not None]
    if not weights:
        return None
    numbered = {weight.layer for weight in weights}
    layers = [_layer_label(n) for n in sorted(numbered, key=lambda n: (n is None, n or 0))]
    cells: dict[tuple[str, str], list[WeightImportance]] = {}
    for weight in weights:
        cells.setdefault((_layer_label(weight.layer), str(weight.kind)), []).append(weight)
    kinds = list(dict.fromkeys(str(weight.kind) for weight in weights))
    layout: FigurePart = {
        "xaxis": {"type": "category", "showgrid": False},
        "yaxis": axis("layer", type="category", autorange="reversed", showgrid=False),
    }
    traces = [_heat(cells, layers, kinds)]
    means = [
        _mean_coefficient([w for w in weights if _layer_label(w.layer) == at]) for at in layers
    ]
    if any(mean is not None for mean in means):
        traces.append(_coefficients(layers, means))
        layout["xaxis"]["domain"] = [0, 0.72]
        layout["xaxis2"] = {
            "domain": [0.78, 1],
            "title": {"text": "coefficient"},
            "rangemode": "tozero",
            "nticks": 4,
        }
    return {"traces": traces, "layout": layout, "height": 190 + 26 * len(layers)}


def _layer_label(layer: float | None) -> str:
    return "outside" if layer is None else str(layer)


def _heat(
    cells: dict[tuple[str, str], list[WeightImportance]],
    layers: Sequence[str],
    kinds: Sequence[str],
) -> Trace:
    norms = [[_joint_norm(cells.get((at, kind), [])) for kind in kinds] for at in layers]
    return {
        "type": "heatmap",
        "x": [safe(kind, 24) for kind in kinds],
        "y": list(layers),
        "z": [[math.log10(norm) if norm > 0 else None for norm in row] for row in norms],
        "hovertext": [
            [_cell_words(at, kind, cells.get((at, kind), [])) for kind in kinds] for at in layers
        ],
        "meta": None,
        "colorbar": {"title": {"text": "log10 of norm"}},
    }


def _coefficients(layers: Sequence[str], means: Sequence[float | None]) -> Trace:
    """Bars beside the map: how strongly each layer is held."""
    return {
        "type": "bar",
        "orientation": "h",
        "x": list(means),
        "y": list(layers),
        "xaxis": "x2",
        "meta": None,
        "width": 0.7,
        "marker": {"color": GREY_COLOURS},
        "hovertext": [
            "" if mean is None else f"layer {at}: coefficient {mean:.4g}"
            for at, mean in zip(layers, means, strict=True)
        ],
    }


def _joint_norm(weights: Weights) -> float:
    """The norm of several weights in one place, as of one; 0 where there are none."""
    return math.hypot(*(weight.norm or 0.0 for weight in weights))


def _cell_words(at: str, kind: str, weights: Weights) -> str:
    if not weights:
        return f"layer {at}, {safe(kind)}: not recorded"
    named = safe(weights[0].name) if len(weights) == 1 else f"{len(weights)} weights"
    mean = _mean_coefficient(weights)
    coefficient = "" if mean is None else f"<br>coefficient {mean:.4g}"
    return f"<b>{named}</b><br>norm {_joint_norm(weights):.4g}{coefficient}"


def _mean_coefficient(weights: Weights) -> float | None:
    known = [weight.coefficient for weight in weights if weight.coefficient is not None]
    return sum(known) / len(known) if known else None
