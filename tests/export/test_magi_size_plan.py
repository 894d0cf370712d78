"""The plan of a run of MAGI-1: by hand, and what `mc-bench predict` plans of the same model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mc_engines.published import MAGI
from mc_export.cli import main
from mc_export.magi_size_plan import plan_magi, render_magi
from mc_export.size_plan import ComponentSize, plan_runs
from mc_runtime.bench.predicted_model import describe_model

CASE = Path(__file__).parent.parent / "golden" / "magi-a"


def plan(name: str, frames: int = 96, **changes):
    published = MAGI[name]
    settings = dict(published.settings) | {"num_frames": frames} | changes
    sizes = {"height": published.height, "width": published.width, "captions": 8}
    return plan_magi(published.transformer, settings, **sizes)


@pytest.mark.parametrize("name", MAGI)
@pytest.mark.parametrize("frames", [48, 96, 168, 240])
def test_the_exporter_and_the_prediction_plan_the_same_run(name: str, frames: int) -> None:
    model = describe_model(name)
    longest = replace(model, tokens=(798, 50, 20))  # and two special tokens
    options = replace(model.defaults, num_frames=frames)
    expected = longest.describe_window(options, longest.plan(options))
    assert plan(name, frames) == expected


def test_keys_of_720p_are_as_many_as_the_published_accounts_say() -> None:
    """Bytes of keys: 1.69 GB a chunk of 4.5B at 720 x 720, 4.25 GB of 24B at 720 x 1280."""
    for name, chunk in (("magi-4.5b", 1.69), ("magi-24b", 4.25)):
        window = plan(name, 168)
        assert [tokens // window.chunk_tokens for tokens in window.keeps.keys] == [5, 5, 4]
        _, device = plan_runs(window, (), torch.bfloat16)
        assert device.kv_per_branch / 5e9 == pytest.approx(chunk, rel=0.004)
        assert device.kv / 14e9 == pytest.approx(chunk, rel=0.004)


def test_what_is_kept_is_as_large_as_its_tensors() -> None:
    window = plan("magi-4.5b-distill", noise2clean_kvrange=[], clean_chunk_kvrange=-1)
    tokens = window.chunk_tokens

    def size(*shape: int) -> int:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes

    cpu, device = plan_runs(window, (ComponentSize("block", 34, 34, 68),), torch.bfloat16)
    # Keys and values of eight heads of 128: four chunks that all see, four that see themselves.
    assert device.kv == 2 * 34 * 2 * size(1, 8, 4 * tokens, 128)
    assert device.context == 2 * 34 * (4 * size(1, 8, 800, 128) + size(1, 8, 50, 128))
    assert device.residual == 4 * 2 * size(1, tokens, 64) == cpu.residual  # float32 in both
    assert device.qkv == 2 * size(24, tokens, 128) + 2 * size(8, tokens, 128)
    assert device.ffn == 2 * size(tokens, 12288)
    assert plan_runs(plan("magi-24b"), (), torch.bfloat16)[1].ffn == 3 * size(
        plan("magi-24b").chunk_tokens, 16384
    )
    assert (cpu.weights, device.weights) == (4 * 34, 2 * 34)
    assert cpu.kv == 2 * device.kv


def test_what_is_not_known_of_the_cpu_is_not_printed() -> None:
    parts = (ComponentSize("block", 34, 34, 68),)
    lines = render_magi("a video", plan("magi-4.5b"), parts, torch.float32).splitlines()
    rows = {line[:40].strip(): line[40:].split() for line in lines}
    assert rows["peak"][:2] == ["not", "known"] and float(rows["peak"][2]) > 20
    assert rows["KV cache, all branches"] == ["40.609", "20.305"]  # 12 x 1.692
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--height=100", "height: expected a multiple of 16, got 100. Use 96 or 112."),
        ("--base-num-frames=97", "base_num_frames: expected none, as a video of MAGI-1 is one win"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(flag: str, message: str) -> None:
    result = CliRunner().invoke(
        main, ["--model", "magi", "--checkpoint", str(CASE), "--dry-run", flag]
    )
    assert result.exit_code == 2
    assert message in result.stderr
