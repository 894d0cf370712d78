"""Memory that was measured, in processes of their own, beside what is predicted for this CPU."""

from pathlib import Path

import memory_check
import pytest

PACKAGED = Path(__file__).parents[2] / "export/mc_export/skyreels_mini"


@pytest.fixture(scope="module")
def mini(export) -> Path:
    return export(PACKAGED)


def test_a_generation_holds_what_is_predicted(mini) -> None:
    check = memory_check.check_generation(mini, {"num_frames": 37, "num_inference_steps": 2})
    assert all(abs(error) < memory_check.GOAL for error in check.errors), str(check)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_pass_holds_what_is_predicted(mini, runs: int) -> None:
    """A block on 1,280 tokens that see 16,640: with plain attention, just below its limit."""
    check = memory_check.check_block(mini, {"tokens": 1280, "chunks": 13, "runs": runs})
    assert all(abs(error) < memory_check.GOAL for error in check.errors), str(check)
