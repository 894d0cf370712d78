"""Measure what skipping saves: wall time against FLOPs, per kind of schedule, and partial passes.

A model with random weights denoises the same noise with nothing cached and with three schedules
that compute about half of the tokens: chunk by chunk (FlowCache's rule), token by token with vote
and least update (MotionCache's), and token by token without either. Runs take turns; ratios are of
medians. Then a quarter pass is timed beside a full one. On a busy machine there is no verdict.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_diffusers import (
    AR_STEP,
    CHUNK,
    FRAMES,
    STEPS,
    TEXT_DIM,
    TEXT_TOKENS,
    THREADS,
    Times,
    make_model,
    reference_work,
    verdict,
)

from mc_export.checkpoint import load_checkpoint
from mc_export.export_bundle import export_bundle
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.options import Video
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.transformer import KeyCache
from motioncache import Mode, Policy, make_policy

RULE = {"coefficients": (1.0, 0.0), "warmup_steps": 2}
# A low floor, so that few steps are all or nothing although random weights move evenly.
TOKENS = {"coarse_updates": 1, "weight_floor": 0.2}
PLAIN = {"vote_threshold": None, "min_update_ratio": 0.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "by chunk": ("flowcache", RULE),
    "by token, voted": ("motioncache", RULE | TOKENS),
    "by token, plain": ("motioncache", RULE | TOKENS | PLAIN),
}
# Tokens of a chunk: height and width of the latents, what each kind has to save of what its FLOPs
# promise, the largest share of a full pass that a quarter pass may take, the largest share of the
# wall time outside the engines, and of the policy.
GOALS: dict[int, tuple[tuple[int, int], dict[str, float], float, float | None]] = {
    520: ((16, 26), {"by chunk": 0.95, "by token, voted": 0.88}, 0.42, None),
    1280: (
        (32, 32),
        {"by chunk": 0.95, "by token, voted": 0.88, "by token, plain": 0.85},
        0.36,
        0.04,
    ),
}
SMALL = 16, 16  # latents to find thresholds on: distances do not depend on the size
POLICY_SHARE = 0.01
COMPUTED = 0.4, 0.6  # share of the tokens that makes a schedule comparable


def run(pipeline: VideoPipeline, size: tuple[int, int], policy: Policy | str) -> Video:
    """Denoise one window of noise."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, 1, TEXT_TOKENS, TEXT_DIM), np.float32)
    return pipeline.run(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        latents=rng.standard_normal((16, FRAMES, *size), np.float32),
        policy=policy,
        decode=False,
        num_inference_steps=STEPS,
        ar_step=AR_STEP,
        num_frames=4 * (FRAMES - 1) + 1,
        height=8 * size[0],
        width=8 * size[1],
    )


def computed_share(video: Video) -> float:
    """Share of the tokens of all steps that the blocks ran for."""
    active = video.trace.recompute >= 0
    return float((video.trace.recompute == 1).sum() / active.sum())


def tune(pipeline: VideoPipeline, name: str, options: Any) -> Policy:
    """Find the threshold at which about half of the tokens are computed, on small videos."""
    low, high = 0.0, 8.0
    for _ in range(9):
        policy = make_policy(name, options | {"threshold": (low + high) / 2})
        share = computed_share(run(pipeline, SMALL, policy))
        if COMPUTED[0] + 0.05 < share < COMPUTED[1] - 0.05:
            break
        low, high = (
            (policy.config.threshold, high) if share > 0.5 else (low, policy.config.threshold)
        )
    return policy


def measure_schedules(pipeline: VideoPipeline, tokens: int, rounds: int) -> bool:
    """Run every kind in turns with nothing cached; print and judge what it saved."""
    size, goals, _, host_goal = GOALS[tokens]
    policies: dict[str, Policy | str] = {"none": "none"}
    policies |= {kind: tune(pipeline, *KINDS[kind]) for kind in goals}
    times, videos = {kind: Times(kind) for kind in policies}, {}
    reference = Times("reference")
    for _ in range(rounds):
        for kind, policy in policies.items():
            reference.take(reference_work)
            videos[kind] = times[kind].take(lambda policy=policy: run(pipeline, size, policy))
    spread = max(reference.seconds) / min(reference.seconds)
    print(f"{tokens} tokens per chunk, {rounds} rounds, none {times['none'].median:.2f} s")
    flops = ModelFlops.from_manifest(pipeline.bundle.manifest.config["transformer"])
    work = {kind: count_work(flops, video.trace, padded=False) for kind, video in videos.items()}
    judged = []
    for kind, goal in goals.items():
        share = computed_share(videos[kind])
        saved = times["none"].median / times[kind].median
        promised = work["none"].total / work[kind].total
        print(f"  {kind}: {share:.0%} of the tokens computed, {saved:.2f} times as fast, ", end="")
        print(f"{promised:.2f} by FLOPs")
        met = saved / promised >= goal and COMPUTED[0] <= share <= COMPUTED[1]
        judged.append((f"{kind}: {saved / promised:.3f} of it saved, {goal} wanted", met))
    for kind, video in videos.items():
        judged += profile(kind, video, times[kind].seconds[-1], host_goal)
    return verdict(spread, judged)


def profile(
    kind: str, video: Video, seconds: float, host_goal: float | None
) -> list[tuple[str, bool]]:
    """Print where the time of a run went, and return the goals of what is outside the engines."""
    trace = video.trace
    engines = float(trace.engine_ms.sum()) / 1e3
    outside, policy = 1 - engines / seconds, float(trace.policy_ms.sum()) / 1e3 / seconds
    print(
        f"  {kind}: outside the engines {outside:.1%}, policy {policy:.2%}; engine ms a pass:",
        end="",
    )
    for mode in (Mode.REUSE, Mode.PARTIAL, Mode.FULL, Mode.CLEAN):
        passes = trace.mode == mode
        if passes.any():
            mean, rows = trace.engine_ms[passes].mean(), trace.bucket[passes].mean()
            print(f" {mode.name.lower()} {mean:.1f} ({passes.sum()} of {rows:.0f} rows)", end="")
    print()
    if host_goal is None:
        return []
    return [
        (f"{kind}: at most {host_goal:.0%} outside the engines", outside <= host_goal),
        (f"{kind}: policy at most {POLICY_SHARE:.0%}", policy <= POLICY_SHARE),
    ]


def measure_passes(pipeline: VideoPipeline, tokens: int, rounds: int) -> bool:
    """Time all layers of the last chunk of a window, whole and a quarter of its tokens."""
    goal = GOALS[tokens][2]
    whole, quarter, reference = Times("whole"), Times("quarter"), Times("reference")
    work = passes(pipeline, tokens)
    chosen = np.sort(np.random.default_rng(1).choice(tokens, tokens // 4, replace=False))
    for _ in range(rounds):
        whole.take(lambda: work(np.arange(tokens)))
        quarter.take(lambda: work(chosen))
        reference.take(reference_work)
    ratio = quarter.median / whole.median
    keys = tokens * (FRAMES // CHUNK)
    print(f"{tokens} tokens, {keys} keys: whole {whole.median * 1e3:.1f} ms, ", end="")
    print(f"quarter {quarter.median * 1e3:.1f} ms")
    spread = statistics.quantiles(reference.seconds, n=10)[-1] / min(reference.seconds)
    return verdict(spread, [(f"a quarter takes {ratio:.3f}, at most {goal} wanted", ratio <= goal)])


def passes(pipeline: VideoPipeline, tokens: int) -> Callable[[Any], Any]:
    """Return a function that recomputes some tokens of the last chunk of a window."""
    rng, transformer = np.random.default_rng(0), pipeline.transformer
    first = tokens * (FRAMES // CHUNK - 1)
    cache = KeyCache(transformer.config, first + tokens)
    for tensor in (*cache.keys, *cache.values):
        tensor[:] = rng.standard_normal(tensor.shape, np.float32)
    x = rng.standard_normal((1, tokens, transformer.config.dim), np.float32)
    modulation = rng.standard_normal((1, 6, transformer.config.dim), np.float32)
    turns = rng.random((tokens, transformer.config.head_dim // 2), np.float32)
    context = transformer.encode_context(
        rng.standard_normal((1, TEXT_TOKENS, TEXT_DIM), np.float32)
    )
    angles = np.cos(turns), np.sin(turns)
    return lambda rows: transformer.recompute(x, rows, modulation, angles, context, cache, first)


def main() -> int:
    """Return 0 if every goal was met on a quiet machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GOALS), choices=GOALS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder)
        export_bundle(load_checkpoint(folder), folder / "bundle")
        pipeline = VideoPipeline.from_bundle(folder / "bundle", threads=THREADS)
        results = [measure_passes(pipeline, tokens, 25) for tokens in arguments.tokens]
        results += [measure_schedules(pipeline, n, arguments.rounds) for n in arguments.tokens]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
