"""What tests of the exporter share: bundles of the golden MAGI-1 cases, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def magi_bundle(export) -> Callable[[str], Path]:
    """Export a golden case by its name; return the bundle's folder."""
    return lambda name: export(GOLDEN / name, "magi")
