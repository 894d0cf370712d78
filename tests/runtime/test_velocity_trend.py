"""The line through a token's last two computed velocities, against lines drawn by numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_runtime.velocity_trend import renew_trend

seeds = st.integers(0, 2**32 - 1)
TOKENS, VALUES, STEPS = 7, 3, 12


def walk(draw, velocities):
    """Compute all tokens in step 0, some or none in later ones; give steps, trends, and which."""
    computed = [np.arange(TOKENS)]
    trend = renew_trend(None, computed[0], velocities[0], 0)
    for step in range(STEPS):
        if step:
            rows = np.flatnonzero(draw.random(TOKENS) < 0.3)
            computed.append(rows)
            if len(rows):
                trend = renew_trend(trend, rows, velocities[step][rows], step)
        yield step, trend, computed


@settings(max_examples=20, deadline=None)
@given(seed=seeds, share=st.sampled_from([0.0, 0.5, 1.0]))
def test_each_token_goes_on_along_its_own_line(seed, share):
    draw = np.random.default_rng(seed)
    velocities = draw.normal(size=(STEPS, TOKENS, VALUES)).astype(np.float32)
    for step, trend, computed in walk(draw, velocities):
        found = trend.at(step, share)
        for token in range(TOKENS):
            known = [at for at, rows in enumerate(computed) if token in rows][-2:]
            last = velocities[known[-1], token]
            line = last
            if len(known) == 2:
                slope, start = np.polyfit(known, velocities[known, token].astype(np.float64), 1)
                line = start + slope * min(step, 2 * known[1] - known[0])
            expected = (1 - share) * last + share * line
            np.testing.assert_allclose(found[token], expected, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_what_changes_evenly_is_foretold(seed):
    draw = np.random.default_rng(seed)
    start, slope = draw.normal(size=(2, TOKENS, VALUES)).astype(np.float32)
    velocities = [start + slope * step for step in range(STEPS)]
    for step, trend, _ in walk(draw, velocities):
        near = step - trend.last_step[:, 0] <= (trend.last_step - trend.before_step)[:, 0]
        np.testing.assert_allclose(trend.at(step, 1.0)[near], velocities[step][near], atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_computed_velocity_comes_back_bit_for_bit(share):
    draw = np.random.default_rng(0)
    velocities = draw.normal(size=(STEPS, TOKENS, VALUES)).astype(np.float32)
    for step, trend, computed in walk(draw, velocities):
        rows = computed[-1]
        np.testing.assert_array_equal(trend.at(step, share)[rows], velocities[step][rows])


def test_earlier_trends_stay_as_they_were():
    draw = np.random.default_rng(1)
    first = renew_trend(None, np.arange(2), draw.normal(size=(2, 3)).astype(np.float32), 0)
    before = first.at(5, 1.0)
    second = renew_trend(first, np.array([1]), np.ones((1, 3), np.float32), 3)
    renew_trend(second, np.array([0, 1]), np.ones((2, 3), np.float32), 4)
    np.testing.assert_array_equal(first.at(5, 1.0), before)
