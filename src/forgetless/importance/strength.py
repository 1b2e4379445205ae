"""TODO importance.strength."""

from __future__ import annotations

from forgetless.errors import OptionError

# Strengths that kept most of the learning and lost least of the rest on the lab model and the demo
# (LOG.md); units differ between estimators.
STRENGTHS = {"kronecker": 10.0, "fisher": 10.0, "path": 0.01}
IN_NATS = (
    "kronecker",
    "fisher",
)  # estimators whose energy is a rise of the general loss in nats, up to a factor


def default_strength(estimator: str) -> float:
    """The strength for importance of this estimator where none is given.

    Raises OptionError for estimators without one.
    """
    if estimator not in STRENGTHS:
        raise OptionError(
            f"importance of estimator '{estimator}' has no default strength (known: "
            f"{', '.join(STRENGTHS)}); give the strength"
        )
    return STRENGTHS[estimator]
