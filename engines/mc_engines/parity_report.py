"""What a bundle says of the errors of its graphs, measured against torch when it was exported.

Neighbours: `mc-export` writes the report, `mc-build` leaves out what is too rough in its type, and
`mc-inspect` shows it.
"""

__all__ = ["PARITY_REPORT", "allowed_error", "find_rough", "read_parity"]

import json
from typing import Any

from mc_engines.bundle import Bundle

PARITY_REPORT = "reports/parity.json"


def read_parity(bundle: Bundle) -> list[dict[str, Any]]:
    """Read the report, an entry for every output of every graph; docs/bundle.md has its fields.

    Args:
        bundle: An opened bundle.

    Returns:
        The entries; none where the bundle has no report.
    """
    if PARITY_REPORT not in bundle.manifest.files:
        return []
    report: list[dict[str, Any]] = json.loads((bundle.path / PARITY_REPORT).read_bytes())
    return report


def find_rough(bundle: Bundle, form: str) -> dict[str, float]:
    """Find the components whose results the model itself does not compute well in a type.

    Args:
        bundle: An opened bundle.
        form: Precision of the graphs.

    Returns:
        By component, its largest error relative to the largest value of the output.
    """
    rough: dict[str, float] = {}
    for entry in read_parity(bundle):
        if entry["form"] == form and entry["own_error"] is not None:
            error = entry["max_abs"] / entry["scale"]
            rough[entry["component"]] = max(error, rough.get(entry["component"], 0.0))
    return rough


def allowed_error(bundle: Bundle, component: str, form: str) -> float:
    """Return the largest error of an output with which the export passed, relative to its scale.

    Args:
        bundle: An opened bundle.
        component: Such as `block`.
        form: Precision of its graph.

    Returns:
        The largest tolerance of its outputs; 0 where nothing is known.
    """
    return max(
        (
            float(entry["tolerance"])
            for entry in read_parity(bundle)
            if (entry["component"], entry["form"]) == (component, form)
        ),
        default=0.0,
    )
