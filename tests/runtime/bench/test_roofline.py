"""The roofline: its operations against the other counts, its bytes against tensors of graphs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mc_engines.bundle import Bundle
from mc_engines.published import PUBLISHED
from mc_export.size_plan import plan_sizes
from mc_export.skyreels_components import describe_transformer, transformer_tensors
from mc_runtime.bench.devices import DEVICES, find_device
from mc_runtime.bench.roofline import Call, EngineCosts, Limits, Schedule, predict_run
from mc_runtime.families import skyreels_work
from mc_runtime.flops import Job, ModelFlops, chunk_causal_work, count_work
from mc_runtime.options import GenerationOptions
from mc_runtime.run_plan import RunPlan, plan_run
from motioncache import DecisionTrace, Mode

SMALL = PUBLISHED["skyreels-df-1.3b-540p"].transformer
FLOPS = ModelFlops.from_manifest(describe_transformer(SMALL))
TINY = ModelFlops(layers=2, dim=24, ffn_dim=40, text_dim=20, patch_in=16, patch_out=12)
OPTIONS = GenerationOptions(
    num_frames=29, height=32, width=48, num_inference_steps=4, ar_step=3,
    causal_block_size=2, base_num_frames=13, overlap_history=5,
)  # fmt: skip
MAGI_CASE = Path(__file__).parents[2] / "golden/magi-a"
NO_LIMITS = Limits(1.0, 1.0, 1.0, 1.0, 1.0)


def lay_out(plan: RunPlan, text: Sequence[int], computed: float = 1.0) -> Schedule:
    """The passes of a run of SkyReels-V2, whose branches keep the keys of a whole window."""
    mode = skyreels_work.list_passes({}, OPTIONS, plan)
    slots = (plan.shape.active.shape[1],) * plan.shape.branches
    return Schedule.of_plan(plan, mode, {"text_tokens": text}, slots, computed)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_nothing_skipped_costs_the_operations_of_none(guidance: float) -> None:
    plan = plan_run(replace(OPTIONS, guidance_scale=guidance))
    text = (7, 5)[: plan.shape.branches]
    run = predict_run(EngineCosts(TINY, 12, 2, 2), lay_out(plan, text), NO_LIMITS)
    expected = chunk_causal_work(TINY, Job.from_plan(plan, text)).total
    assert run.total.flops + run.total.attention == expected


def test_a_trace_costs_the_operations_that_are_counted_of_it() -> None:
    plan = plan_run(OPTIONS)
    trace = DecisionTrace.empty(plan.shape, {"text_tokens": [7, 5]})
    rng = np.random.default_rng(0)
    trace.mode[:] = rng.integers(-1, 4, trace.mode.shape)
    trace.bucket[:] = np.where(trace.mode > 0, 6, 0)
    trace.bucket[trace.mode >= Mode.FULL] = plan.shape.tokens
    trace.recompute[:] = np.where((trace.mode >= 0)[..., None], 0, -1)
    run = predict_run(EngineCosts(TINY, 12, 2, 2), Schedule.of_trace(trace, (3, 3)), NO_LIMITS)
    expected = count_work(TINY, trace, padded=True).total
    assert run.total.flops + run.total.attention == expected


def test_the_first_chunk_is_clean_after_its_last_step() -> None:
    plan = plan_run(OPTIONS)
    schedule = lay_out(plan, (7, 5))
    assert schedule.first_chunk_row == OPTIONS.num_inference_steps - 1
    run = predict_run(EngineCosts(TINY, 12, 2, 2), schedule, NO_LIMITS)
    np.testing.assert_allclose(run.first_chunk, run.prompt + run.rows[:4].sum(axis=0))
    together = plan_run(replace(OPTIONS, ar_step=0, num_frames=13))
    assert lay_out(together, (7, 5)).first_chunk_row == 3


@pytest.mark.parametrize("computed", [0.0, 0.25, 1.0])
def test_a_share_of_the_tokens_is_computed_in_every_step_and_all_in_clean_passes(computed) -> None:
    plan = plan_run(OPTIONS)
    schedule = lay_out(plan, (7, 5), computed)
    active = np.repeat(plan.shape.active[:, None], 2, axis=1)
    tokens = plan.shape.tokens
    assert (schedule.tokens[active] == round(computed * tokens)).all()
    clean = schedule.mode == Mode.CLEAN
    assert clean.any() and not (clean & active).any()
    assert (schedule.tokens[clean] == tokens).all()
    bigger = schedule.resize(10 * tokens)
    assert (bigger.tokens == 10 * schedule.tokens).all() and bigger.chunk_tokens == 10 * tokens


def test_a_share_that_is_no_whole_number_of_tokens_is_rounded_up() -> None:
    schedule = lay_out(plan_run(replace(OPTIONS, num_frames=13)), (7, 5))
    counts = np.resize([0, 1, 2, 3333, 4080, 10_199, 10_200], schedule.tokens.shape)
    wide = replace(schedule, tokens=counts.astype(np.int32), chunk_tokens=10_200)
    narrow = wide.resize(3600)
    exact = [math.ceil(Fraction(int(count) * 3600, 10_200)) for count in counts.flat]
    assert narrow.tokens.ravel().tolist() == exact and narrow.chunk_tokens == 3600
    assert {0: 0, 1: 1, 2: 1, 3333: 1177, 4080: 1440, 10_199: 3600, 10_200: 3600}.items() <= dict(
        zip(counts.ravel().tolist(), exact, strict=True)
    ).items()


@pytest.mark.parametrize("family", ["skyreels", "magi"])
def test_the_bytes_of_a_block_are_those_of_its_tensors(family, export, request) -> None:
    made = {"skyreels": lambda: request.getfixturevalue("tiny_bundle")}
    made["magi"] = lambda: export(MAGI_CASE, "magi")  # two heads of queries for each of keys
    bundle = Bundle.open(made[family]())
    graph = bundle.graph("block", "fp32")
    config = bundle.manifest.config["transformer"]
    flops = ModelFlops.from_manifest(config)
    tokens, keys, text, slots = 5, 30, 7, 36
    sizes = {"K": tokens, "L": tokens, "M": keys, "T": text, "S": slots, "F": 1, "B": 1}

    def count(specs, names=None) -> int:
        return sum(
            4 * math.prod(size if isinstance(size, int) else sizes[size] for size in spec.shape)
            for spec in specs
            if names is None or spec.name in names
        )

    call = EngineCosts(flops, slots, 4, 4).block(tokens, keys, text)
    matrices = [spec for spec in graph.weights if len(spec.shape) > 1 and spec.shape[0] != 1]
    assert call.weights == pytest.approx(count(matrices), rel=0.02)
    flow = count(graph.inputs, ("x",)) + count(graph.outputs)
    assert call.values == flow
    visible = count(graph.inputs, ("cross_k", "cross_v"))
    visible += count(graph.inputs, ("k_cache", "v_cache")) * keys // slots
    assert call.keys == visible


def test_the_weights_are_those_that_an_export_counts() -> None:
    shapes = {"transformer": transformer_tensors(SMALL)}
    sizes = {"height": 544, "width": 960, "base_num_frames": 97, "chunk": 5}
    plan = plan_sizes(SMALL, shapes, dtype=torch.bfloat16, **sizes)
    exact = {part.name: part.bytes for part in plan.components}
    del exact["timestep"]  # that runs on the host
    block, context = (exact.pop(name) // FLOPS.layers for name in ("block", "context"))
    for layers in (2, FLOPS.layers):
        held = layers * block + context + sum(exact.values())
        assert EngineCosts(FLOPS, 51_000, 2, 2).held_weights(layers) == pytest.approx(
            held, rel=2e-3
        )


def test_a_call_takes_its_operations_or_its_bytes_whichever_is_longer() -> None:
    limits = Limits(100.0, 50.0, 10.0, 0.5, 0.25)
    busy = Call(flops=1000, attention=100, weights=20)
    fetching = Call(flops=10, weights=20, keys=10, values=10, copied=40)
    taken = [(limits.bound(call), limits.estimate(call)) for call in (busy, fetching)]
    assert taken == [(12, 24), (4, 32)]


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_a_source_and_plausible_rates(name: str) -> None:
    device = find_device(name)
    assert len(device.source) > 20
    assert device.flops["bf16"] == device.flops["fp16"]
    assert device.flops["fp32"] == pytest.approx(device.flops["bf16"] / 2, rel=0.02)  # of TF32
    assert ("fp8" in device.flops) == (name not in ("a800", "jetson-agx-orin"))  # both Ampere
    if "fp8" in device.flops:
        assert device.flops["fp8"] == pytest.approx(2 * device.flops["bf16"], rel=0.02)
    assert 1e11 < device.bandwidth < 1e13 < device.flops["bf16"] < 1e15
    assert device.memory % 2**30 == 0
