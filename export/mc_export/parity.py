"""Prove that an exported graph computes what the model computes.

Neighbours: `write_component` calls this right after it wrote the graphs; the report goes into the
bundle, and an error above tolerance fails the export.
"""

__all__ = ["TOLERANCES", "Comparison", "compare_outputs", "hold_to_own_error", "require_parity"]

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from mc_engines.errors import ParityError
from mc_engines.runner import Array, Arrays

# Largest error of an output, relative to the largest value of the reference (or to 1).
# 16-bit graphs are held against float32 arithmetic on the stored weights.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
# Two roundings of the same 16-bit arithmetic are two draws: of the largest errors of skyreels-mini
# that exceed a rounding, one is up to 1.64 times the other.
_OWN_ERROR_FACTOR = 2
_ROUNDING = 2.0**-8  # of bf16, relative: what a single cast of an output may err


@dataclass(frozen=True)
class Comparison:
    """One output of one graph, beside what torch computes in float32.

    Attributes:
        component: Such as `block`.
        form: Precision or form of the graph.
        layer: Whose weights were used; None where the graph carries them.
        output: Name of the output.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        cosine: Cosine of the angle between both, as vectors.
        scale: Largest absolute value of the reference, at least 1.
        tolerance: Largest `max_abs / scale` that passes.
        own_error: Where the error is above what is usual for the type, the largest absolute error
            of the model itself in it, which excuses that: the type is too rough for the model.
    """

    component: str
    form: str
    layer: int | None
    output: str
    max_abs: float
    mean_abs: float
    cosine: float
    scale: float
    tolerance: float
    own_error: float | None = None

    @property
    def passes(self) -> bool:
        """Whether the error is within tolerance; NaN and infinity, on either side, are not."""
        return self.max_abs <= self.tolerance * self.scale < math.inf

    @property
    def share(self) -> float:
        """How much of the tolerance the error uses up; 1 is the most that passes."""
        return self.max_abs / (self.tolerance * self.scale)


def compare_outputs(
    component: str,
    form: str,
    layer: int | None,
    got: Arrays,
    expected: Arrays,
    depth: int = 1,
) -> list[Comparison]:
    """Compare every output of a graph with its reference.

    Args:
        component: Such as `block`.
        form: Precision or form, such as `bf16` or `fp32-mha`.
        layer: Whose weights were used, or None.
        got: What the graph computed.
        expected: What torch computed in float32, by the same names.
        depth: Factor of what is usual in bf16, for a component of many layers.

    Returns:
        One comparison per output.
    """
    tolerance = TOLERANCES[form.partition("-")[0]] * (depth if form == "bf16" else 1)
    rows = []
    for name, reference in expected.items():
        errors = _errors(got[name], reference)
        rows.append(Comparison(component, form, layer, name, *errors, tolerance))
    return rows


def hold_to_own_error(
    rows: Iterable[Comparison], narrowed: Arrays, expected: Arrays
) -> list[Comparison]:
    """Hold a 16-bit graph to what the model itself errs when torch computes it in that type.

    Some models are no good in 16 bits: that is theirs, and no fault of their graphs.

    Args:
        rows: Comparisons of one graph.
        narrowed: What torch computes in the graph's type, by output.
        expected: What it computes in float32.

    Returns:
        The comparisons. In bf16 the tolerance of each becomes twice the model's own error, at least
        a rounding of the type; in fp16 that of one which does not pass, if it is more. An own error
        that is not finite changes nothing.
    """
    return [_hold(row, narrowed[row.output], expected[row.output]) for row in rows]


def _hold(row: Comparison, narrowed: Array, expected: Array) -> Comparison:
    own, *_ = _errors(narrowed, expected)
    bound = _OWN_ERROR_FACTOR * own / row.scale
    if row.form == "bf16":
        bound = max(bound, _ROUNDING)
    elif row.passes or bound <= row.tolerance:
        return row
    if not bound < math.inf:
        return row
    return replace(row, tolerance=bound, own_error=None if row.passes else own)


def _errors(got: Array, expected: Array) -> tuple[float, float, float, float]:
    a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    difference = np.abs(a - b)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / length if length > 0 else float(np.array_equal(a, b))
    return float(difference.max()), float(difference.mean()), cosine, max(1.0, float(abs(b).max()))


def require_parity(rows: Iterable[Comparison]) -> None:
    """Refuse a graph whose error is above tolerance.

    Args:
        rows: Comparisons of any components.

    Raises:
        ParityError: One of them does not pass; the message names the first.
    """
    for row in rows:
        if not row.passes:
            where = row.component if row.layer is None else f"{row.component} layer {row.layer}"
            raise ParityError(
                f"{where}, {row.form}, output '{row.output}': expected an error of at most "
                f"{row.tolerance:g} relative to {row.scale:.3g}, got {row.max_abs:.3g}. "
                "The graph does not compute what the model computes: do not use it."
            )
