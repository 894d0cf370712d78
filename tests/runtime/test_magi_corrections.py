"""What `compat="fixed"` mends on MAGI-1, each in a figure that no model's weights move.

The loop is the real one; the transformer is a stand-in whose velocity is 1 everywhere and that
writes down what every pass sees (scripts/magi_corrections.py, which prints the same as a table).
"""

from dataclasses import replace
from pathlib import Path

import magi_corrections
import numpy as np
import pytest
from magi_corrections import BOTH, FINE, OPTIONS, SCHEDULE, force, run, take_turns

from motioncache import Mode, make_policy
from motioncache.config import MAGI_FIXED, MAGI_REFERENCE

DOCUMENT = Path(__file__).parents[2] / "docs/decisions/010-what-fixed-mends-on-magi.md"
CHUNKS, STEPS, TOKENS = 7, 64, 12
# By chunk and stage: the chunks whose keys a pass sees, written from the published ranges 5, 4, 3
# and 2. By itself a chunk sees as many up to itself; as published, a pass over some of its tokens
# sees those of the oldest active one, which is max(c + k - 3, 0) while chunk c is in stage k.
OWN = {
    0: ("0", "0", "0", "0"),
    1: ("01", "01", "01", "01"),
    2: ("012", "012", "012", "12"),
    3: ("0123", "0123", "123", "23"),
    4: ("01234", "1234", "234", "34"),
    5: ("12345", "2345", "345", "45"),
    6: ("23456", "3456", "456", "56"),
}
PUBLISHED = {
    0: ("0", "0", "0", "0"),
    1: ("0", "0", "0", "01"),
    2: ("0", "0", "01", "12"),
    3: ("0", "01", "12", "23"),
    4: ("01", "12", "23", "34"),
    5: ("12", "23", "34", "45"),
    6: ("23", "34", "45", "56"),
}


def list_times(steps):
    """Timesteps in double precision: squared, then shifted by 3 towards noise."""
    squared = (np.arange(steps + 1) / steps) ** 2
    return squared / 3 / (1 - 2 / 3 * squared)


def travel(masks, times, follows_time):
    """How far a velocity of 1 carries each token that keeps what it computed last, in closed form.

    What is kept is the velocity, or the length of the step in which it was computed.
    """
    lengths = np.diff(times)
    computed_at = np.maximum.accumulate(np.where(masks, np.arange(len(masks))[:, None], 0), axis=0)
    ages = np.arange(len(masks))[:, None] + np.zeros_like(computed_at)
    return lengths[ages if follows_time else computed_at].sum(axis=0)


def switch(name):
    """The published rules but for one."""
    return replace(MAGI_REFERENCE, **{name: True})


# Path


@pytest.mark.parametrize("interval", [2, 3, 4])
@pytest.mark.parametrize("mended", [False, True])
def test_a_token_travels_by_what_it_keeps(interval, mended):
    masks = take_turns(interval)
    switches = switch("reuse_velocity") if mended else MAGI_REFERENCE
    moved = run(force(masks, switches, OPTIONS)).moved
    expected = travel(masks, list_times(STEPS), mended)
    np.testing.assert_allclose(moved, np.tile(expected, (CHUNKS, 1)), atol=2e-6)


def test_by_velocity_it_arrives_and_by_increments_it_does_not():
    """Any decisions; only as many steps as chunks of a window, which differ most."""
    options = replace(OPTIONS, num_inference_steps=8)
    masks = np.random.default_rng(3).random((8, TOKENS)) < 0.5
    masks[0] = True
    published, fixed = (run(force(masks, each, options), options).moved for each in BOTH)
    np.testing.assert_allclose(fixed, 1, atol=2e-6)
    expected = travel(masks, list_times(8), follows_time=False)
    np.testing.assert_allclose(published, np.tile(expected, (CHUNKS, 1)), atol=2e-6)
    # Who is not computed in the last step, which is 0.48 of the way, falls far behind.
    assert (expected[~masks[-1]] < 0.8).all()


def test_where_nothing_is_reused_both_arrive():
    masks = np.ones((STEPS, TOKENS), bool)
    for switches in BOTH:
        np.testing.assert_allclose(run(force(masks, switches, OPTIONS)).moved, 1, atol=2e-6)


# Keys


@pytest.mark.parametrize("mended", [False, True])
def test_a_pass_over_some_tokens_sees_the_chunks_that_it_should(mended):
    switches = switch("own_keys") if mended else MAGI_REFERENCE
    found = run(force(take_turns(2), switches, OPTIONS))
    passes = magi_corrections.partial_passes(found)
    steps = [int(np.argmin(np.abs(SCHEDULE.timesteps - each.timestep))) for each in passes]
    expected = OWN if mended else PUBLISHED
    for each, step in zip(passes, steps, strict=True):
        wanted = expected[each.chunk][step // 16]
        assert "".join(map(str, each.seen)) == wanted, (each.chunk, step)
    every = {(chunk, step) for chunk in range(CHUNKS) for step in range(FINE, STEPS)}
    assert set(zip((each.chunk for each in passes), steps, strict=True)) == every


@pytest.mark.parametrize("switches", BOTH)
def test_a_pass_over_a_whole_chunk_sees_its_own_keys_in_both(switches):
    found = run(force(np.ones((STEPS, TOKENS), bool), switches, OPTIONS))
    passes = [each for each in found.passes if each.branch == 0 and each.timestep < 0.95]
    assert len(passes) == CHUNKS * STEPS
    for each in passes:
        stage = int(np.argmin(np.abs(SCHEDULE.timesteps - each.timestep))) // 16
        assert "".join(map(str, each.seen)) == OWN[each.chunk][stage]


# The last step


def masks_of(found, step):
    """What every chunk computes in a step, shape (chunks, L)."""
    rows = np.argmax(found.trace.step == step + 1, axis=0)
    return found.trace.recompute[rows, 0, np.arange(CHUNKS)] == 1


def test_the_last_step_of_a_chunk_is_computed_or_left_to_the_threshold():
    never = magi_corrections.never_compute
    assert not masks_of(run(never(MAGI_REFERENCE)), STEPS - 1).any()
    assert masks_of(run(never(switch("force_last_step"))), STEPS - 1).all()
    assert masks_of(run(never("fixed")), STEPS - 1).all()


def test_in_the_last_row_the_published_rule_repeats_its_choice():
    """At this threshold the tokens that move are computed in the last step but one."""
    rule = {"threshold": 0.05, "chunk_threshold": 0.0, "compat": "reference"}
    found = run(make_policy("motioncache", rule, "magi"))
    before, last = masks_of(found, STEPS - 2), masks_of(found, STEPS - 1)
    assert 0 < before[-1].sum() < TOKENS
    np.testing.assert_array_equal(last[-1], before[-1])
    # All other chunks follow the rule, which decides anew.
    assert (last[:-1] != before[:-1]).any(axis=1).all()
    assert np.isnan(found.trace.distance[-1, 0, -1])


# The clean pass


@pytest.mark.parametrize("mended", [False, True])
def test_a_finished_chunk_is_evaluated_clean_before_it_is_seen(mended):
    """Of 7 chunks 6 are seen by younger ones once they are finished."""
    found = run(force(take_turns(2), switch("clean_pass") if mended else MAGI_REFERENCE, OPTIONS))
    passes = magi_corrections.clean_passes(found)
    assert [each.chunk for each in passes] == list(range(CHUNKS - 1)) * mended
    assert all(each.seen == (each.chunk,) and len(each.rows) == TOKENS for each in passes)
    rows = np.argwhere((found.trace.mode[:, 0] == Mode.CLEAN).any(axis=1)).ravel()
    # Chunk c is finished after 16 * c + 64 rows.
    assert rows.tolist() == [64 + 16 * chunk for chunk in range(CHUNKS - 1)] * mended


def test_nearly_clean_guidance_is_kept():
    """The last quarter of the steps of each chunk."""
    masks = np.ones((STEPS, TOKENS), bool)
    published, fixed = (run(force(masks, each, OPTIONS)) for each in BOTH)
    assert not [each for each in published.passes if each.branch == 1]
    alone = [each for each in fixed.passes if each.branch == 1]
    assert len(alone) == CHUNKS * STEPS // 4
    assert all(each.seen == (each.chunk,) for each in alone)


def test_the_document_has_the_table_that_the_script_prints():
    assert f"\n{magi_corrections.write_table()}\n\n" in DOCUMENT.read_text()


def test_the_names_stand_for_all_switches_and_none():
    assert all(vars(MAGI_FIXED).values()) and not any(vars(MAGI_REFERENCE).values())
