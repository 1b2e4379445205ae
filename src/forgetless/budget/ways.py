"""The ways to make a trained update smaller: by scaling it, or by shrinking it along importance.

A way is a function of the fraction of the update that is to be left: 1 is the update as it was
kept, 0 the base model. Neither the loss nor the learning need be monotone in it.

    scale     fraction * U
    shrink    V = argmin ||V - U||^2 + mu E(V), with mu = ((1 - fraction) / fraction)^2 in units of
              the typical importance (shrunk.py)

    for name, apply in ways_of(update, importance).items():
        apply(0.5)                   # the model now carries half of the update, along this way
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from forgetless.budget.shrink_forms import Basis, Form, prepared
from forgetless.budget.shrunk import refactored, typical
from forgetless.importance.covariance import AnyCovariance
from forgetless.importance.importance import Importance
from forgetless.model.update import Update

# Name -> a function: fraction -> the model with that fraction of its update, none of it at 0.
Ways = Mapping[str, Callable[[float], None]]


def ways_of(update: Update, importance: Importance | None) -> Ways:
    """The ways to make a LoRA update smaller: along importance where there is any, and scaling."""
    if importance is None:
        return {"scale": update.scale}
    return {"shrink": shrinker(update, importance), "scale": update.scale}


def shrinker(update: Update, importance: Importance) -> Callable[[float], None]:
    """A function: fraction -> the model with the kept update shrunk that far along importance.

    Covariances are decomposed once.
    """
    bases: dict[int, tuple[AnyCovariance, Basis]] = {}
    forms: dict[str, Form] = {}

    def apply(fraction: float) -> None:
        if fraction in (0.0, 1.0):
            update.scale(fraction)
            return
        for weight, L, _ in update.thin_factors():
            if weight.name not in forms:
                forms[weight.name] = prepared(importance[weight.name], L.device, bases)
        unit = typical([(forms[weight.name], L, R) for weight, L, R in update.thin_factors()])
        mu = mu_of(fraction) / unit
        update.refactor(lambda weight, L, R: refactored(forms[weight.name], L, R, mu))

    return apply


def mu_of(fraction: float) -> float:
    """The mu of shrunk.py at a fraction above 0: squared, because on the lab model the mildest that
    is of use is near 0.02 and that of a small budget near 100.
    """
    return ((1 - fraction) / fraction) ** 2


def fraction_of(mu: float, method: str) -> float:
    """The fraction at which a way stands for mu: shrinking by 1 / (1 + mu Omega), scaling by 1 / (1
    + mu).
    """
    return 1 / (1 + math.sqrt(mu)) if method == "shrink" else 1 / (1 + mu)
