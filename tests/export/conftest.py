"""What tests of the exporter share: bundles of the golden MAGI-1 cases, made once a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mc_export.export_bundle import export_bundle
from mc_export.magi_checkpoint import load_magi_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def magi_bundle(tmp_path_factory) -> Callable[[str], Path]:
    """Export a golden case by its name; return the bundle's folder."""

    @cache
    def magi_bundle(name: str) -> Path:
        target = tmp_path_factory.mktemp("magi") / f"{name}.bundle"
        export_bundle(load_magi_checkpoint(GOLDEN / name), target)
        return target

    return magi_bundle
