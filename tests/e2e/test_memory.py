"""Memory that was measured, in processes of their own, beside what is predicted for this CPU."""

import re
from collections.abc import Iterator
from pathlib import Path

import memory_check
import onnxruntime
import pytest

from mc_engines.arena import Arena
from mc_engines.block_tape import record_block
from mc_engines.bundle import Bundle
from mc_engines.onnxruntime_runner import open_runner
from mc_engines.run_sizes import WindowShape

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


@pytest.fixture
def told() -> Iterator[None]:
    """ONNX Runtime says in the log by how much an arena grows."""
    onnxruntime.set_default_logger_severity(0)
    yield
    onnxruntime.set_default_logger_severity(2)


@pytest.mark.parametrize(
    ("fused", "tokens", "chunks"), [(False, 2_560, 1), (False, 2_560, 3), (True, 5_120, 2)]
)
def test_an_arena_grows_as_onnxruntime_says(mini, told, capfd, fused, tokens, chunks) -> None:
    """Two runs of a block."""
    bundle, keys = Bundle.open(mini), tokens * chunks
    config = bundle.manifest.config["transformer"]
    sizes = {"K": tokens, "L": tokens, "S": keys, "M": keys, "T": 24, "F": 1, "B": 1}
    runner = open_runner(bundle, "block", "fp32-mha" if fused else "fp32", threads=1)
    inputs = memory_check.fill_inputs(runner.graph, sizes, keys)
    capfd.readouterr()
    outputs = []
    for _ in range(2):
        outputs.append(runner.run(inputs, bundle.layer_weights("block", 0, "fp32")))
    log = capfd.readouterr().err
    grown = [int(size) for size in re.findall(r"Extended allocation by (\d+)", log)]
    heads, dim, ffn_dim = config["heads"], config["dim"], config["ffn_dim"]
    window = WindowShape(1, heads, dim, ffn_dim, tokens, keys, text_tokens=24)
    arena = Arena()
    arena.run(record_block(window, keys, fused), runs=2)
    assert grown == arena.regions
