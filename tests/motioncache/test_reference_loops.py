"""The rules against plain loops over dictionaries, written down from the published code's rules.

The golden cases hold MotionCache in one window against the published code itself
(tests/e2e/test_golden_schedules.py). What has no golden case is held against these loops:
FlowCache, TeaCache. They keep scalars per token and branch where the package keeps arrays.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_runtime.schedule import step_matrix
from motioncache import DistanceTable, RunShape, Scope, make_policy
from motioncache.distance import InputDistance
from motioncache.forecast import forecast_chunk, forecast_window

STEPS = 20


def polynomial(coefficients, x):
    total = 0.0
    for power, coefficient in enumerate(reversed(coefficients)):
        total += coefficient * x**power
    return total


def relative_l1(now, before):
    return float(np.abs(now - before).mean() / np.abs(before).mean())


def flowcache_loop(modulation, threshold, coefficients, ret_steps, clamp):
    """Per chunk: True where it is computed."""
    done, accumulated, previous = [], 0.0, None
    for step in range(len(modulation)):
        cutoff = len(modulation) - 1
        if step < ret_steps or step >= cutoff:
            compute, accumulated = True, 0.0
        else:
            d = polynomial(coefficients, relative_l1(modulation[step], previous))
            accumulated += max(d, 0) if clamp else d
            compute = accumulated >= threshold
            if compute:
                accumulated = 0.0
        previous = modulation[step]
        done.append(compute)
    return done


def teacache_loop(modulation, active, threshold, coefficients, ret_rows):
    """Per row of a window: True where the chunks that are not new are computed."""
    steps, done, accumulated, before = {}, [], 0.0, {}
    for row, chunks in enumerate(active):
        now = {}
        for chunk in np.flatnonzero(chunks):
            steps[chunk] = steps.get(chunk, -1) + 1
            now[chunk] = modulation[steps[chunk]]
        if row < ret_rows:
            compute = True
        else:
            both = [chunk for chunk in now if chunk in before]
            change = np.concatenate([(now[chunk] - before[chunk]).ravel() for chunk in both])
            scale = np.concatenate([before[chunk].ravel() for chunk in both])
            distance = np.abs(change).mean() / np.abs(scale).mean()
            accumulated += max(polynomial(coefficients, distance), 0)
            compute = accumulated >= threshold
            if compute:
                accumulated = 0.0
        before = now
        done.append(compute)
    return done


modulations = st.integers(0, 2**32 - 1).map(
    lambda seed: np.cumsum(np.random.default_rng(seed).normal(size=(STEPS, 6, 4)), axis=0)
)
polynomials = st.lists(st.floats(-2, 2), min_size=1, max_size=5).map(tuple)


@given(modulations, polynomials, st.floats(0, 2), st.integers(0, 8), st.booleans())
def test_flowcache(modulation, coefficients, threshold, warmup, clamp):
    settings = {"threshold": threshold, "coefficients": coefficients, "warmup_steps": warmup}
    policy = make_policy("flowcache", settings | {"compat": "fixed" if clamp else "reference"})
    shape = RunShape(np.ones((STEPS, 1), bool), (0,), 1, 1, 1, STEPS)
    table = DistanceTable.from_modulation(modulation)
    found = [bool(step.plan.recompute[0]) for step in forecast_chunk(policy, shape, table)]
    assert found == flowcache_loop(modulation, threshold, coefficients, warmup + 1, clamp)


def magi_flowcache_loop(inputs, threshold, warmup, last_steps):
    """Per step of a chunk: True where it is computed; `inputs` are its embedded latents."""
    done, accumulated = [True], 0.0
    for step in range(1, len(inputs)):
        if step < warmup or step in last_steps:
            accumulated, reuse = 0.0, False
        else:
            accumulated += relative_l1(inputs[step], inputs[step - 1])
            reuse = accumulated < threshold
            if not reuse:
                accumulated = 0.0
        done.append(not reuse)
    return done


@given(modulations, st.floats(0, 2), st.integers(1, 8), st.booleans(), st.integers(0, 2))
def test_flowcache_on_magi(inputs, threshold, warmup, fixed, chunk):
    settings = {"threshold": threshold, "warmup_steps": warmup - 1}
    settings["compat"] = "fixed" if fixed else "reference"
    policy = make_policy("flowcache", settings, "magi")
    shape = RunShape(step_matrix(3, STEPS, 5).update, (0,), 1, 6, 1, STEPS)
    state, found = policy.init_state(shape, Scope(0, 0, chunk)), []
    for step, now in enumerate(inputs):
        before = inputs[max(step - 1, 0)]
        distance = InputDistance(now[None], before[None])
        plan, state = policy.plan_step(state, distance)
        found.append(bool(plan.recompute[0]))
    # As published, the last step is computed in the last row of the run, so of the last chunk.
    last_steps = {STEPS - 1} if fixed or chunk == 2 else set()
    assert found == magi_flowcache_loop(inputs, threshold, warmup, last_steps)


@given(modulations, polynomials, st.floats(0, 2), st.integers(0, 8), st.integers(1, 6))
def test_teacache(modulation, coefficients, threshold, warmup, lag):
    settings = {"threshold": threshold, "coefficients": coefficients, "warmup_steps": warmup}
    active = step_matrix(3, STEPS, lag).update
    shape = RunShape(active, (0,), 1, 1, 1, STEPS)
    table = DistanceTable.from_modulation(modulation)
    policy = make_policy("teacache", settings)
    found = [bool(step.plan.recompute[0]) for step in forecast_window(policy, shape, table)]
    assert found == teacache_loop(modulation, active, threshold, coefficients, warmup + 1)


def motioncache_loop(config, distances, motions, frames):
    """The published state machine of a chunk, token by token; yields sets of computed tokens.

    In float32 like the published code, so that no rounding decides.
    """
    one, tokens = np.float32(1), motions[0].size
    accumulated, weights = [0 * one] * tokens, [one] * tokens
    counter, done = 0, False
    for step, distance in enumerate(distances):
        if step <= config["warmup_steps"]:
            chosen = set(range(tokens))
            if step == config["warmup_steps"]:
                done = config["coarse_updates"] == 0
        else:
            d = one * polynomial(config["coefficients"], distance)
            accumulated = [a + d * w for a, w in zip(accumulated, weights, strict=True)]
            threshold = np.float32(config["threshold"])
            chosen = {t for t in range(tokens) if accumulated[t] >= threshold}
            if config["vote_threshold"] is not None:
                positions = tokens // frames
                share = [
                    sum((f * positions + p) in chosen for f in range(frames)) / frames
                    for p in range(positions)
                ]
                chosen = {
                    t for t in range(tokens) if share[t % positions] > config["vote_threshold"]
                }
            if 0 < len(chosen) / tokens < config["min_update_ratio"]:
                chosen = set()
            for token in chosen:
                accumulated[token] = 0 * one
            if chosen and not done:
                counter += 1
                done = counter >= config["coarse_updates"]
        if done:
            weights = []
            for frame in motions[step]:
                low, high = min(frame), max(frame)
                floor, rest = np.float32(config["weight_floor"]), 1 - config["weight_floor"]
                width = high - low + np.float32(1e-8)
                weights += [floor + np.float32(rest) * ((m - low) / width) for m in frame]
        yield chosen


@pytest.mark.parametrize("vote", [0.5, None])
@given(seed=st.integers(0, 2**32 - 1), updates=st.integers(0, 3), ratio=st.sampled_from([0, 0.4]))
def test_motioncache(vote, seed, updates, ratio):
    draw = np.random.default_rng(seed)
    config = {
        "threshold": 0.4 + 0.2 * draw.random(), "coefficients": (0.5, 0.8, 0.01),
        "warmup_steps": int(draw.integers(0, 4)), "coarse_updates": updates, "weight_floor": 0.3,
        "vote_threshold": vote, "min_update_ratio": ratio,
    }  # fmt: skip
    distances = draw.random(STEPS)
    motions = draw.random((STEPS, 3, 7)).astype(np.float32)
    policy = make_policy("motioncache", config | {"compat": "reference"})
    shape = RunShape(np.ones((STEPS, 1), bool), (0,), 1, 3, 7, STEPS)
    state = policy.init_state(shape, Scope(0, 0, 0))
    loop = motioncache_loop(config, distances, motions, frames=3)
    for distance, seen, chosen in zip(distances, motions, loop, strict=True):
        plan, state = policy.plan_step(state, distance)
        assert set(np.flatnonzero(plan.recompute)) == chosen
        if plan.wants_motion:
            state = policy.observe(state, seen)
