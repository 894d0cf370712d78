"""Counts of operations: against torch's own counter, the published numbers, and plain loops."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mc_engines.published import PUBLISHED
from mc_export.skyreels import Block, Context, Embed, Head, TextProjection
from mc_export.skyreels_components import describe_transformer
from mc_runtime.flops import (
    Job,
    ModelFlops,
    Work,
    chunk_causal_work,
    count_work,
    vanilla_work,
)
from mc_runtime.options import GenerationOptions
from mc_runtime.published_flops import (
    explain_difference,
    published_causal_work,
    published_work,
)
from mc_runtime.run_plan import plan_run
from mc_runtime.schedule import plan_windows, step_matrix
from motioncache.policy import RunShape
from motioncache.trace import DecisionTrace, Mode

DF_1_3B = ModelFlops.from_manifest(
    describe_transformer(PUBLISHED["skyreels-df-1.3b-540p"].transformer)
)
PUBLISHED_JOB = Job.from_plan(plan_run(GenerationOptions(num_frames=177)), (512, 512))
TINY = ModelFlops(layers=2, dim=24, ffn_dim=40, text_dim=20, patch_in=16, patch_out=12)
# Tokens of a chunk: 2 latent frames of 2x3. A video of windows of 4 latent frames.
TINY_OPTIONS = GenerationOptions(
    num_frames=29, height=32, width=48, num_inference_steps=4, ar_step=3,
    causal_block_size=2, base_num_frames=13, overlap_history=5,
)  # fmt: skip
# What diffusers computes beside that: the modulation of the timesteps.
MODULATION = (
    "condition_embedder.time_embedder",
    "condition_embedder.time_proj",
    "fps_projection",
)


def count(call, *inputs):
    """Operations of a call by module, as torch counts them."""
    counter = FlopCounterMode(display=False, depth=None)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # torch counts no other on a CPU
        call(*inputs)
    counts = counter.get_flop_counts()
    return {module: sum(of_module.values()) for module, of_module in counts.items()}


def diffusers_work(counts, layers):
    """What diffusers' transformer did, part by part."""
    of = {module.partition(".")[2]: value for module, value in counts.items()}
    blocks = [f"blocks.{layer}" for layer in range(layers)]
    text_keys = sum(of[f"{block}.attn2.to_{part}"] for block in blocks for part in "kv")
    work = Work(
        embed=of["patch_embedding"],
        text_projection=of["condition_embedder.text_embedder"],
        text_keys=text_keys,
        blocks=sum(map(of.__getitem__, blocks)) - text_keys,
        head=of["proj_out"],
    )
    rest = sum(of.get(module, 0) for module in MODULATION)
    assert work.total + rest == counts["SkyReelsV2Transformer3DModel"]  # nothing else is counted
    return work


@pytest.mark.parametrize("fps", [False, True])
def test_one_forward_of_diffusers(fps):
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=3, text_dim=20,
        freq_dim=16, ffn_dim=40, num_layers=2, inject_sample_info=fps, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    flops = ModelFlops.from_manifest(describe_transformer(model.config))
    assert flops == TINY
    latents, text = torch.randn(1, 4, 5, 4, 6), torch.randn(1, 9, 20)
    counts = count(lambda: model(latents, torch.full((1, 5), 7), text, None, True, np.ones(1)))
    job = Job(chunk_tokens=30, text_tokens=(9,), matrices=(step_matrix(1, 1, 0),))
    assert diffusers_work(counts, layers=2) == vanilla_work(flops, job)


def test_a_long_video_of_diffusers(diffusers, tiny_checkpoint):
    """Finished chunks, and those not yet started, go through every forward."""
    model = diffusers(tiny_checkpoint)
    noise = np.random.default_rng(0).standard_normal((16, 8, 4, 6), np.float32)
    text = np.zeros((1, 7, 48), np.float32), np.zeros((1, 5, 48), np.float32)
    texts = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    counts = count(lambda: model.run(TINY_OPTIONS, noise, **texts))
    flops = ModelFlops.from_manifest(describe_transformer(model.transformer.config))
    job = Job.from_plan(plan_run(TINY_OPTIONS), (7, 5))
    assert len(job.matrices) == 3
    assert diffusers_work(counts, flops.layers) == vanilla_work(flops, job)


@pytest.mark.parametrize("tokens, keys, text", [(12, 12, 9), (12, 24, 9), (5, 24, 9), (1, 12, 3)])
def test_the_parts_of_our_graphs(tokens, keys, text):
    dim, heads, half = 24, 2, 6
    zeros, ids = torch.zeros, lambda n: torch.zeros(n, dtype=torch.int32)
    cross, cache = zeros(1, heads, text, 2 * half), zeros(1, heads, 24, 2 * half)
    angles, x = zeros(tokens, half), zeros(1, tokens, dim)
    block = (
        x, ids(tokens), zeros(1, 6, dim), angles, angles, cross, cross, cache, cache, ids(keys)
    )  # fmt: skip
    layers = TINY.layers
    assert layers * total(Block(dim, 40, heads, 1e-6), *block) == TINY.blocks(tokens, keys, text)
    head = total(Head(dim, 12, 1e-6), x, ids(tokens), zeros(1, dim))
    assert head == TINY.head(tokens)
    assert total(Embed(16, dim), zeros(1, tokens, 16)) == TINY.embed(tokens)
    text_keys = total(Context(dim, heads, 1e-6), zeros(1, text, dim))
    assert layers * text_keys == TINY.text_keys(text)
    assert total(TextProjection(20, dim), zeros(1, text, 20)) == TINY.text_projection(text)


def total(module, *inputs):
    return count(module, *inputs)["Global"]


@given(tokens=st.integers(0, 10_200), keys=st.integers(1, 51_000), text=st.integers(1, 512))
def test_a_partial_pass_costs_its_share(tokens, keys, text):
    slope = 30 * (12 * 1536**2 + 4 * 1536 * 8960 + 4 * 1536 * (keys + text))
    assert DF_1_3B.blocks(tokens, keys, text) == tokens * slope


def test_the_published_numbers():
    """SkyReels-V2 1.3B at 540P, 177 frames, 50 steps."""
    published = {published_work: "113.6", vanilla_work: "165.2", published_causal_work: "79.7"}
    expected = published | {chunk_causal_work: "80.6"}
    works = {counted: counted(DF_1_3B, PUBLISHED_JOB) for counted in expected}
    assert {counted: f"{work.total / 1e15:.1f}" for counted, work in works.items()} == expected


def test_the_published_formula():
    """Written out, with the steps of the schedule counted by hand."""

    def forward(tokens, keys):
        per_token = 12 * 1536**2 + 4 * 1536 * 8960
        text = 4 * 512 * 1536**2 + 4 * tokens * 512 * 1536
        return 30 * (tokens * per_token + text + 4 * tokens * keys * 1536)

    chunk = 5 * 34 * 60
    first, *others = (forward(chunk, count * chunk) for count in range(1, 6))
    every = first + sum(others)
    assert published_work(DF_1_3B, PUBLISHED_JOB).total == 2 * (70 + 65) * every
    expected = 2 * (50 * every + first + 50 * sum(others))
    assert published_causal_work(DF_1_3B, PUBLISHED_JOB).total == expected
    window = forward(5 * chunk, 5 * chunk)
    work = vanilla_work(DF_1_3B, PUBLISHED_JOB)
    assert work.blocks + work.text_keys == 2 * (70 + 65) * window


@pytest.mark.parametrize("text", [(512, 512), (512, 40), (300,)])
@pytest.mark.parametrize("frames", [97, 177, 257])
def test_the_difference_from_the_published_number_is_itemised(text, frames):
    job = Job.from_plan(plan_run(GenerationOptions(num_frames=frames)), text)
    lines = explain_difference(DF_1_3B, job)
    ours, published = chunk_causal_work(DF_1_3B, job), published_work(DF_1_3B, job)
    assert sum(lines.values()) == ours.total - published.total
    windows, chunk, branches = len(job.matrices), job.chunk_tokens, len(text)
    # The chunks but the last of every window are seen finished; the prefix is published, too.
    clean = [1, windows, windows, windows]
    assert lines["clean passes of finished chunks"] == sum(
        DF_1_3B.blocks(times * chunk, (place + 1) * chunk, tokens)
        for place, times in enumerate(clean)
        for tokens in text
    )
    passes = 250 + (windows - 1) * 201
    assert lines["length of the text"] == sum(
        30 * passes * chunk * 4 * 1536 * (tokens - 512) for tokens in text
    )
    assert lines["text keys once per prompt"] == 30 * 4 * 1536**2 * (
        sum(text) - branches * passes * 512
    )
    assert lines["embed"] == DF_1_3B.embed(chunk * (passes + sum(clean)))


def loop(options, text, prefix=0):
    """Work of `none` and in the published ways, pass by pass; TINY's chunks are 12 tokens."""
    ours, causal, every = [], [], []
    steps = options.num_inference_steps
    for window in plan_windows(options, prefix):
        matrix = step_matrix(window.frames // 2, steps, options.ar_step, window.prefix // 2).step
        frozen = 0
        for row in matrix.tolist():
            while row[frozen] > steps:
                ours.append(("clean", frozen))
                causal += [frozen] if frozen < window.prefix // 2 else []
                frozen += 1
            due = [chunk for chunk, step in enumerate(row) if 1 <= step <= steps]
            ours += [("step", chunk) for chunk in due]
            causal += due
            every += range(len(row))

    def published(chunk):
        return TINY.blocks(12, 12 * (chunk + 1), 512) + TINY.text_keys(512)

    none = Work(
        embed=len(ours) * TINY.embed(12),
        text_projection=sum(map(TINY.text_projection, text)),
        text_keys=sum(map(TINY.text_keys, text)),
        blocks=sum(TINY.blocks(12, 12 * (chunk + 1), t) for _, chunk in ours for t in text),
        head=len(text) * sum(kind == "step" for kind, _ in ours) * TINY.head(12),
    )
    return none, *(len(text) * sum(map(published, chunks)) for chunks in (causal, every))


@pytest.mark.parametrize("ar_step", [0, 1, 3, 4])
@pytest.mark.parametrize("base, prefix", [(13, 0), (21, 0), (21, 2), (29, 0)])
@pytest.mark.parametrize("text", [(9,), (9, 4)])
def test_a_loop_over_the_schedule(ar_step, base, prefix, text):
    options = replace(TINY_OPTIONS, ar_step=ar_step, base_num_frames=base)
    job = Job.from_plan(plan_run(options, prefix), text)
    counted = (
        chunk_causal_work(TINY, job),
        published_causal_work(TINY, job).total,
        published_work(TINY, job).total,
    )
    assert counted == loop(options, text, prefix)


def random_trace(seed, branches, extrapolation=None):
    """Any modes; the branches agree on whether a chunk takes a step."""
    draw = np.random.default_rng(seed)
    mode = draw.integers(0, 3, (7, branches, 3))
    shared = draw.integers(0, 4, (7, 1, 3))  # idle, clean, else as drawn
    mode = np.select([shared == 0, shared == 1], [Mode.IDLE, Mode.CLEAN], mode)
    active = (mode[:, 0] != Mode.IDLE) & (mode[:, 0] != Mode.CLEAN)
    shape = RunShape(active, (0, 4), branches, 2, 6, 4)
    described = {"text_tokens": [9, 4][:branches], "extrapolation": extrapolation}
    trace = DecisionTrace.empty(shape, described)
    trace.mode[:] = mode
    trace.recompute[mode == Mode.REUSE] = 0
    trace.recompute[mode == Mode.FULL] = 1
    for at in np.argwhere(mode == Mode.PARTIAL).tolist():
        chosen = draw.permutation(12) < draw.integers(1, 12)
        trace.recompute[tuple(at)] = chosen
        trace.bucket[tuple(at)] = 4 * -(-chosen.sum() // 4)
    trace.bucket[mode >= Mode.FULL] = 12
    return trace


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    branches=st.integers(1, 2),
    padded=st.booleans(),
    extrapolation=st.sampled_from([None, 0.0, 1.0]),
)
def test_a_loop_over_a_trace(seed, branches, padded, extrapolation):
    trace, text = random_trace(seed, branches, extrapolation), [9, 4][:branches]
    expected = dict(
        embed=0,
        text_projection=sum(map(TINY.text_projection, text)),
        text_keys=sum(map(TINY.text_keys, text)),
        blocks=0,
        head=0,
    )
    for row, branch, chunk in np.ndindex(trace.mode.shape):
        mode = Mode(trace.mode[row, branch, chunk])
        if mode is Mode.IDLE:
            continue
        tokens = 0 if mode is Mode.REUSE else 12
        if mode is Mode.PARTIAL:
            ones = list(trace.recompute[row, branch, chunk]).count(1)
            tokens = next(bucket for bucket in (4, 8, 12) if bucket >= ones) if padded else ones
        expected["blocks"] += TINY.blocks(tokens, 12 * (chunk + 1), text[branch])
        expected["embed"] += TINY.embed(12) if branch == 0 else 0
        headed = 12 if extrapolation is None else tokens
        expected["head"] += TINY.head(headed) if mode is not Mode.CLEAN else 0
    assert asdict(count_work(TINY, trace, padded=padded)) == expected


def test_a_trace_that_skips_nothing_is_the_policy_none():
    job = Job.from_plan(plan_run(TINY_OPTIONS), (9, 4))
    active = np.concatenate([matrix.update for matrix in job.matrices])
    rows = [len(matrix.step) for matrix in job.matrices]
    starts = tuple(np.cumsum([0, *rows[:-1]]).tolist())
    trace = DecisionTrace.empty(RunShape(active, starts, 2, 2, 6, 4), {"text_tokens": [9, 4]})
    trace.mode[:] = np.where(active, Mode.FULL, Mode.IDLE)[:, None]
    trace.recompute[trace.mode == Mode.FULL] = 1
    for start, matrix in zip(starts, job.matrices, strict=True):
        for chunk, steps in enumerate(matrix.step.T):
            trace.mode[start + np.flatnonzero(steps > 4)[:1], :, chunk] = Mode.CLEAN
    trace.bucket[trace.mode >= Mode.FULL] = 12
    for padded in (False, True):
        assert count_work(TINY, trace, padded=padded) == chunk_causal_work(TINY, job)


def test_the_parts_and_their_total_in_json():
    work = Work(embed=1, text_projection=2, text_keys=3, blocks=4, head=5)
    assert work.to_json() == {
        "embed": 1, "text_projection": 2, "text_keys": 3, "blocks": 4, "head": 5, "total": 15
    }  # fmt: skip


def test_long_videos_do_not_overflow():
    """14B, ten minutes: more than 64 bits hold."""
    large = ModelFlops.from_manifest(
        describe_transformer(PUBLISHED["skyreels-df-14b-720p"].transformer)
    )
    options = GenerationOptions(num_frames=97 + 80 * 180, height=720, width=1280)
    job = Job.from_plan(plan_run(options), (512, 512))
    one = Job.from_plan(plan_run(replace(options, num_frames=97)), (512, 512))
    two = Job.from_plan(plan_run(replace(options, num_frames=177)), (512, 512))
    for counted in (vanilla_work, published_work):
        first, second = (counted(large, each).total for each in (one, two))
        assert counted(large, job).total == first + 180 * (second - first) > 2**63
