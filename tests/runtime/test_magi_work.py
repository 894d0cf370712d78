"""What MAGI-1 computes: against torch's counter, the published figure, and a run's own trace."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from magi_corrections import CONFIG, SCHEDULE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mc_export.magi import Block, BlockSizes, Context, Embed, Head, TextProjection
from mc_runtime.families import magi
from mc_runtime.families.magi_schedule import MagiOptions
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.schedule import LatentGrid
from motioncache import Mode

SMALL = BlockSizes(
    dim=64, heads=4, key_heads=2, head_dim=24, ffn_dim=40, gated=True, condition_dim=16,
    epsilon=1e-6,
)  # fmt: skip
FLOPS = ModelFlops(
    layers=1, dim=64, ffn_dim=40, text_dim=20, patch_in=16, patch_out=16,
    query_dim=96, key_dim=48, ffn_matrices=3, text_matrices=1,
)  # fmt: skip
# MAGI-1 4.5B, distilled: 34 layers of 3072 channels, 24 heads of 128 and 8 of keys.
PUBLISHED = ModelFlops(34, 3072, 12288, 4096, 64, 64, 3072, 1024, text_matrices=1)


def count(module, *inputs):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("tokens", "keys", "text"), [(12, 12, 9), (5, 24, 9), (1, 12, 3)])
def test_the_parts_of_our_graphs(tokens, keys, text):
    zeros = torch.zeros
    cross, cache = zeros(1, 2, text, 24), zeros(1, 2, 24, 24)
    angles = zeros(tokens, 9)
    inputs = zeros(1, tokens, 64), zeros(1, 16), angles, angles, cross, cross, cache, cache
    gates = 2 * 16 * 2 * 64  # of the modulation, once a pass, which is not counted
    block = count(Block(SMALL), *inputs, torch.zeros(keys, dtype=torch.int32))
    assert block - gates == FLOPS.blocks(tokens, keys, text)
    assert count(Context(64, 2, 24, 1e-6), zeros(1, text, 64)) == FLOPS.text_keys(text)
    assert count(Embed(16, 64), zeros(1, tokens, 16)) == FLOPS.embed(tokens)
    assert count(Head(64, 16, 1e-6), zeros(1, tokens, 64)) == FLOPS.head(tokens)
    projection = count(TextProjection(20, 64), zeros(1, text, 20))
    assert projection == FLOPS.text_projection(text)


def plan_published(**changes):
    """7 chunks of 720 x 720, the job of the published figure."""
    options = MagiOptions(num_frames=168, height=720, width=720)
    grid = LatentGrid(first_frames=4)
    return magi.plan(replace(options, **changes), 0, grid, CONFIG)


def blocks_of(trace, chosen):
    """Operations of the blocks in some passes, in PF."""
    mode = trace.mode.copy()
    trace.mode[~chosen] = Mode.IDLE
    work = count_work(PUBLISHED, trace, padded=False).blocks / 1e15
    trace.mode[:] = mode
    return work


def test_the_published_job_takes_the_published_139_petaflops():
    """Uncached MAGI-1 4.5B in MotionCache's table; a prompt of about 100 tokens is assumed."""
    plan = plan_published()
    trace = plan_uncached(SCHEDULE, plan, [100] * 7, null=50)
    assert count_work(PUBLISHED, trace, padded=False).total / 139e15 == pytest.approx(1, abs=0.02)
    full = trace.mode == Mode.FULL
    main, copies = full.copy(), full.copy()
    main[:, 1], copies[:, 0] = False, False
    assert full[:, 0].sum() == 7 * 64
    assert copies.sum() == 7 * 16  # the last quarter of each chunk's steps
    assert blocks_of(trace, main) == pytest.approx(121.5, abs=0.1)
    assert blocks_of(trace, trace.mode == Mode.CLEAN) == pytest.approx(1.0, abs=0.05)
    # 15 copies of 16 are often counted, 16.9 PF: one step's time rounds up to just beyond 0.3.
    assert blocks_of(trace, copies) * 15 / 16 == pytest.approx(16.9, abs=0.1)


def test_a_chunk_sees_as_far_as_its_stage_says():
    """By hand: 7 chunks, ranges 5, 4, 3, 2 by stage of 16 steps."""
    plan = plan_published()
    seen = np.array(plan_uncached(SCHEDULE, plan, [100] * 7, 50).run["visible"])
    expected = [min(chunk + 1, size) for chunk in range(7) for size in (5, 4, 3, 2)]
    found = [seen[16 * (chunk + stage), 0, chunk] for chunk in range(7) for stage in range(4)]
    assert found == expected
    assert (seen[:, 1][plan.shape.active] == 1).all()
