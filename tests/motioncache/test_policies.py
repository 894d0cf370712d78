"""What every policy keeps to, and what each rule implies whatever its numbers are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from motioncache import Plan, RunShape, Scope, make_policy, motion
from motioncache.config import FIXED
from motioncache.distance import InputDistance
from motioncache.presets import POLICIES

FRAMES, POSITIONS, STEPS = 5, 8, 12
SHAPE = RunShape(np.ones((STEPS, 1), bool), (0,), 2, FRAMES, POSITIONS, STEPS)
IDENTITY = {"coefficients": (1.0, 0.0)}
WARMUP = {"threshold": 0.3, "warmup_steps": 2}
SKYREELS = {
    "none": {},
    "teacache": IDENTITY | WARMUP,
    "flowcache": IDENTITY | WARMUP,
    "motioncache": IDENTITY | WARMUP | {"coarse_updates": 1},
}
MAGI = {
    "none": {},
    "flowcache": WARMUP,
    "motioncache": WARMUP | {"chunk_threshold": 0.3, "coarse_steps": 2},
}
SETTINGS = {"skyreels": SKYREELS, "magi": MAGI}
EVERY = [(family, name) for family in POLICIES for name in POLICIES[family]]
distances = st.lists(st.floats(0, 0.5, width=32), min_size=STEPS, max_size=STEPS)
seeds = st.integers(0, 2**32 - 1)


def measured(family, distances):
    """The distances as the policies of a family are told them."""
    if family == "skyreels":
        return distances
    before = np.ones((1, SHAPE.tokens, 2), np.float32)
    return [InputDistance(before + np.float32(distance), before) for distance in distances]


def run(policy, distances, motions):
    """Follow one scope through its steps, with the motion of each step's output."""
    state, plans = policy.init_state(SHAPE, Scope(0, 0, 0)), []
    for distance, seen in zip(distances, motions, strict=True):
        plan, state = policy.plan_step(state, distance)
        plans.append(plan)
        if plan.wants_motion:
            state = policy.observe(state, seen)
    return plans


def masks(plans):
    return np.stack([plan.recompute for plan in plans])


def draw_motions(seed):
    shape = (STEPS, FRAMES, POSITIONS)
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def motion_policy(**settings):
    return make_policy("motioncache", SKYREELS["motioncache"] | settings)


@pytest.mark.parametrize(("family", "name"), EVERY)
@given(distances=distances, seed=seeds)
def test_every_policy_is_pure_and_starts_in_full(family, name, distances, seed):
    policy = make_policy(name, SETTINGS[family][name], family)
    policy.check(SHAPE)
    distances = measured(family, distances)
    first, second = (run(policy, distances, draw_motions(seed)) for _ in range(2))
    assert (masks(first) == masks(second)).all()
    assert all(isinstance(plan, Plan) and plan.recompute.shape == (SHAPE.tokens,) for plan in first)
    assert masks(first)[:3].all(), "steps 0 to warmup_steps are computed in full"


@pytest.mark.parametrize(("family", "name"), EVERY)
@given(distances=distances, seed=seeds)
def test_states_are_never_changed_in_place(family, name, distances, seed):
    policy = make_policy(name, SETTINGS[family][name], family)
    state = policy.init_state(SHAPE, Scope(0, 0, 0))
    for distance, seen in zip(measured(family, distances), draw_motions(seed), strict=True):
        before = policy.plan_step(state, distance)
        again = policy.plan_step(state, distance)
        assert (before[0].recompute == again[0].recompute).all()
        state = policy.observe(before[1], seen) if before[0].wants_motion else before[1]


@given(distances=distances, seed=seeds)
def test_a_floor_of_one_makes_motioncache_all_or_nothing(distances, seed):
    made = masks(run(motion_policy(weight_floor=1.0), distances, draw_motions(seed)))
    assert (made.all(axis=1) | ~made.any(axis=1)).all()


@given(distances=distances, seed=seeds, updates=st.integers(1, 4))
def test_the_coarse_phase_is_all_or_nothing_and_ends_after_its_updates(distances, seed, updates):
    plans = run(motion_policy(coarse_updates=updates), distances, draw_motions(seed))
    made = masks(plans)
    after = np.flatnonzero(made.any(axis=1))
    after = after[(after > 2) & (after < STEPS - 1)]  # the last step is forced: no update
    end = after[updates - 1] if len(after) >= updates else STEPS - 1
    assert (made[: end + 1].all(axis=1) | ~made[: end + 1].any(axis=1)).all()
    assert [plan.wants_motion for plan in plans[:end]] == [False] * end
    assert all(plan.wants_motion for plan in plans[end:]) == (len(after) >= updates)


@given(distances=distances)
def test_motioncache_with_even_weights_equals_flowcache(distances):
    """The published remark that MotionCache without weights is FlowCache."""
    even = run(motion_policy(weight_floor=1.0, min_update_ratio=0), distances, draw_motions(0))
    accumulated = np.cumsum(np.float32(distances))
    assume(np.abs(accumulated[:, None] - accumulated - 0.3).min() > 1e-4)  # no rounding decides
    flow = run(make_policy("flowcache", SKYREELS["flowcache"]), distances, draw_motions(0))
    assert (masks(even) == masks(flow)).all()


@given(distances=distances, seed=seeds)
def test_a_hold_keeps_what_has_accumulated(distances, seed):
    policy = motion_policy(min_update_ratio=0.9, vote_threshold=None, weight_floor=0.1)
    state, held = policy.init_state(SHAPE, Scope(0, 0, 0)), 0
    for distance, seen in zip(distances[:-1], draw_motions(seed)[:-1], strict=True):
        plan, after = policy.plan_step(state, distance)
        needing = np.asarray(plan.accumulated) >= np.float32(0.3)
        if needing.any() and needing.mean() < 0.9:
            held += 1
            assert not plan.recompute.any()
            expected = state.accumulated + np.float32(distance) * state.weights
            np.testing.assert_array_equal(after.accumulated, expected)
        state = policy.observe(after, seen) if plan.wants_motion else after
    assume(held)


def test_tokens_that_are_recomputed_start_anew_and_others_keep_on():
    policy = motion_policy(warmup_steps=0, coarse_updates=0, vote_threshold=None, weight_floor=0.0,
                           min_update_ratio=0.0)  # fmt: skip
    _, state = policy.plan_step(policy.init_state(SHAPE, Scope(0, 0, 0)), 0.0)
    ramp = np.tile(np.arange(POSITIONS, dtype=np.float32), (FRAMES, 1))
    plan, state = policy.plan_step(policy.observe(state, ramp), 0.4)
    weights = np.tile(np.arange(POSITIONS) / (POSITIONS - 1), FRAMES)
    moved = 0.4 * weights >= 0.3
    assert (plan.recompute == moved).all()
    np.testing.assert_allclose(state.accumulated, np.where(moved, 0, 0.4 * weights), atol=1e-6)


@pytest.mark.parametrize("needing", range(FRAMES + 1))
def test_three_of_five_frames_decide_for_all(needing):
    mask = np.zeros((FRAMES, 2), bool)
    mask[:needing, 0] = True
    verdict = motion.vote(mask.reshape(-1), FRAMES, 0.5).reshape(FRAMES, 2)
    assert (verdict[:, 0] == (needing >= 3)).all()
    assert not verdict[:, 1].any()


@given(mask=st.lists(st.booleans(), min_size=40, max_size=40), share=st.floats(0, 1))
def test_a_vote_counts_each_position_alone(mask, share):
    voted = motion.vote(np.array(mask), FRAMES, share).reshape(FRAMES, POSITIONS)
    for position in range(POSITIONS):
        count = sum(mask[position::POSITIONS])
        assert (voted[:, position] == (count / FRAMES > share)).all()


@given(seed=seeds, floor=st.floats(0, 1))
def test_weights_lie_between_floor_and_one_in_the_order_of_motion(seed, floor):
    moving = np.random.default_rng(seed).random((FRAMES, POSITIONS)).astype(np.float32)
    weights = motion.motion_weights(moving, floor)
    assert weights.dtype == np.float32
    assert weights.min() >= np.float32(floor) - 1e-6
    assert weights.max() <= 1 + 1e-6
    for row, frame in zip(weights, moving, strict=True):
        assert row[frame.argmin()] == np.float32(floor)
        assert (np.diff(row[frame.argsort()]) >= 0).all()


def test_even_motion_counts_as_stillness():
    even = np.full((FRAMES, POSITIONS), 0.7, np.float32)
    assert (motion.motion_weights(even, 0.6) == np.float32(0.6)).all()


# The four switches, each alone: the one difference it makes.


def switched(name, value=True):
    return motion_policy(compat=replace(FIXED, **{name: value}), warmup_steps=0)


def test_clamp_distance():
    """A polynomial below 0 takes nothing away from what has accumulated."""
    falling = {"coefficients": (-1.0, 0.0)}
    zeros = np.zeros((3, FRAMES, POSITIONS), np.float32)
    found = {
        value: run(
            make_policy(
                "motioncache",
                SKYREELS["motioncache"]
                | falling
                | {"warmup_steps": 0, "compat": replace(FIXED, clamp_distance=value)},
            ),
            [0.0, 0.25, 0.25],
            zeros,
        )
        for value in (True, False)
    }
    assert [plan.distance for plan in found[True]][1:] == [0.0, 0.0]
    assert [plan.distance for plan in found[False]][1:] == [-0.25, -0.25]
    np.testing.assert_allclose(found[False][2].accumulated, -0.5)
    np.testing.assert_allclose(found[True][2].accumulated, 0.0)


def test_force_last_step():
    still = [0.0] * STEPS
    zeros = np.zeros((STEPS, FRAMES, POSITIONS), np.float32)
    forced = masks(run(switched("force_last_step"), still, zeros))
    free = masks(run(switched("force_last_step", False), still, zeros))
    plans = run(switched("force_last_step"), still, zeros)
    assert np.isnan(plans[-1].distance), "the policy had no choice"
    assert forced[-1].all()
    assert not free[-1].any()
    assert (forced[:-1] == free[:-1]).all()


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["clean_pass", "reset_history"])
def test_switches_that_the_loop_follows(name, value):
    policy = switched(name, value)
    assert getattr(policy, name) is value
    others = {"clean_pass", "reset_history"} - {name}
    assert all(getattr(policy, other) for other in others)


def test_motion_is_that_of_latents_or_as_published():
    assert switched("latent_motion").motion == "latents"
    assert switched("latent_motion", False).motion == "output"
    assert motion_policy(compat="reference").motion == "output"


@pytest.mark.parametrize("name", ["clean_pass", "reset_history"])
def test_the_published_rules_have_neither(name):
    assert not getattr(motion_policy(compat="reference"), name)
    flow = make_policy("flowcache", SKYREELS["flowcache"] | {"compat": "reference"})
    assert not flow.clean_pass


# A policy that decides for a window sees rows; states of two branches share nothing.


@pytest.mark.parametrize("name", ["teacache", "flowcache", "motioncache"])
@given(first=distances, second=distances, seed=seeds)
def test_branches_never_share_state(name, first, second, seed):
    """Two branches whose steps alternate decide as each would alone."""
    policy = make_policy(name, SKYREELS[name])
    motions = draw_motions(seed), draw_motions(seed + 1)
    alone = [
        masks(run(policy, steps, seen))
        for steps, seen in zip((first, second), motions, strict=True)
    ]
    states = [policy.init_state(SHAPE, Scope(0, branch, 0)) for branch in (0, 1)]
    together = [[], []]
    for step in range(STEPS):
        for branch, steps in enumerate((first, second)):
            plan, states[branch] = policy.plan_step(states[branch], steps[step])
            together[branch].append(plan.recompute)
            if plan.wants_motion:
                states[branch] = policy.observe(states[branch], motions[branch][step])
    assert (np.array(together) == np.array(alone)).all()


def test_teacache_decides_for_a_window():
    assert make_policy("teacache", SKYREELS["teacache"]).scope == "window"
    assert make_policy("flowcache", SKYREELS["flowcache"]).scope == "chunk"


# Wrong settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"threshold": -0.1},
            "threshold: expected a finite number, got -0.1. Use 0 or more.",
        ),
        (
            {"threshold": float("nan")},
            "threshold: expected a finite number, got nan. Use 0 or more.",
        ),
        (
            {"threshold": float("inf")},
            "threshold: expected a finite number, got inf. Use 0 or more.",
        ),
        (
            {"warmup_steps": 2.5},
            "warmup_steps: expected a whole number, got 2.5. Use 0 or more.",
        ),
        (
            {"weight_floor": 1.5},
            "weight_floor: expected a finite number, got 1.5. Use 0 to 1.",
        ),
        (
            {"vote_threshold": 2},
            "vote_threshold: expected a finite number, got 2. Use 0 to 1.",
        ),
        (
            {"vote_threshold": 1},
            "vote_threshold: expected a share below 1, which no vote can exceed, got 1. "
            "Use none to switch voting off.",
        ),
        (
            {"min_update_ratio": -1},
            "min_update_ratio: expected a finite number, got -1. Use 0 to 1.",
        ),
        (
            {"extrapolation": -0.5},
            "extrapolation: expected a finite number, got -0.5. Use 0 or more.",
        ),
        (
            {"extrapolation": 1.0, "compat": "reference"},
            "extrapolation: expected none where motion is that of the block output, which reused "
            "tokens then do not have, got 1. Use compat=fixed.",
        ),
        (
            {"compat": "exact"},
            "compat: expected fixed or reference, got 'exact'. fixed mends what reference keeps as "
            "published.",
        ),
        (
            {"coefficients": ()},
            "coefficients: expected finite numbers, highest power first, got none. "
            "Run mc-calibrate to fit them, or pass 1,0 for the distance itself.",
        ),
        (
            {"coefficients": (1.0, float("nan"))},
            "coefficients: expected finite numbers, highest power first, got 1.0, nan. "
            "Run mc-calibrate to fit them, or pass 1,0 for the distance itself.",
        ),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError) as error:
        motion_policy(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(("family", "name"), [pair for pair in EVERY if pair[1] != "none"])
def test_a_warmup_beyond_the_steps_is_refused(family, name):
    settings = SETTINGS[family][name]
    with pytest.raises(ValueError) as error:
        make_policy(name, settings | {"warmup_steps": STEPS}, family).check(SHAPE)
    assert str(error.value) == (
        "warmup_steps: expected at most 11 with 12 steps, as steps 0 to warmup_steps are computed "
        "in full, got 12. Lower it or raise num_inference_steps."
    )
    make_policy(name, settings | {"warmup_steps": STEPS - 1}, family).check(SHAPE)
