"""Traces: what is kept, on the disk too, and what a replay forces."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motioncache import DecisionTrace, Mode, RunShape, Scope, replay

FRAMES, POSITIONS = 2, 3
TOKENS = FRAMES * POSITIONS
ACTIVE = np.array([[1, 0], [1, 1], [0, 1], [0, 1]], bool)  # two windows of two rows
SHAPE = RunShape(ACTIVE, (0, 2), 2, FRAMES, POSITIONS, 2)


def draw_masks(seed):
    masks = np.random.default_rng(seed).integers(0, 2, (4, 2, 2, TOKENS)).astype(np.int8)
    masks[0, 0, 0], masks[1, 1, 1] = 1, 0
    return np.where(ACTIVE[:, None, :, None], masks, np.int8(-1))


def make_trace(seed=0):
    trace = DecisionTrace.from_masks(draw_masks(seed), FRAMES, True, (0, 2))
    trace.run["note"] = "grün"
    trace.mode[2, :, 0], trace.bucket[2, :, 0] = Mode.CLEAN, TOKENS
    trace.distance[1, 0, 1] = 0.25
    trace.accumulated[1, 0, 1] = 0.1, 0.2, 0.3
    trace.engine_ms[:] = np.arange(16).reshape(4, 2, 2)
    trace.step[:] = ACTIVE
    return trace


def test_modes_and_counts_follow_from_masks():
    trace, masks = make_trace(), draw_masks(0)
    for at in np.ndindex(4, 2, 2):
        ones = int((masks[at] == 1).sum())
        if trace.mode[at] == Mode.CLEAN:
            continue
        expected = Mode.IDLE if masks[at][0] < 0 else Mode.PARTIAL
        expected = (
            {0: Mode.REUSE, TOKENS: Mode.FULL}.get(ones, expected)
            if ACTIVE[at[0], at[2]]
            else Mode.IDLE
        )
        assert trace.mode[at] == expected
        assert trace.bucket[at] == ones
    computed = int((masks == 1).sum()) + 2 * TOKENS
    counted = trace.count()
    assert (counted["clean"], counted["tokens"]) == (2, computed)
    assert counted["full"] == int((trace.mode == Mode.FULL).sum())
    assert trace.count(slice(0, 1)).keys() <= {"full", "partial", "reuse", "tokens"}


@given(seed=st.integers(0, 2**32 - 1))
def test_a_saved_trace_comes_back_whole(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("traces") / "no suffix"
    trace = make_trace(seed)
    trace.save(path)
    again = DecisionTrace.load(path)
    for name in ("recompute", "mode", "bucket", "distance", "accumulated", "weights", "step"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
        assert getattr(again, name).dtype == getattr(trace, name).dtype
    assert (again.window_start, again.run) == (trace.window_start, trace.run)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["no suffix", "no suffix.jsonl"]


def test_a_line_per_chunk_that_did_anything(tmp_path):
    trace = make_trace()
    trace.save(tmp_path / "t")
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(lines) == int((trace.mode >= 0).sum())
    found = next(line for line in lines if (line["row"], line["branch"]) == (1, "cond"))
    second = next(line for line in lines if line["row"] == 1 and line["chunk"] == 1)
    assert (found["window"], found["chunk"], found["distance"]) == (0, 0, None)
    assert (second["distance"], second["accumulated"]) == (
        0.25,
        {"min": 0.1, "mean": 0.2, "max": 0.3},
    )
    assert {line["window"] for line in lines if line["row"] >= 2} == {1}
    assert {line["mode"] for line in lines} <= {"reuse", "partial", "full", "clean"}
    assert all(line["tokens"] == TOKENS for line in lines if line["mode"] == "clean")


def test_reuse_is_counted_where_there_was_a_choice():
    masks = np.array([1, 1, 1, 0, 0, 0], np.int8).reshape(3, 1, 1, 2)
    trace = DecisionTrace.from_masks(masks, 1, True)
    assert trace.reused() is None
    trace.distance[1:] = 0.1
    np.testing.assert_allclose(trace.reused(), 0.75)


def test_a_replay_forces_every_decision():
    trace = make_trace(3)
    policy = replay(trace)
    policy.check(SHAPE)
    assert policy.clean_pass is True
    masks = draw_masks(3)
    for window, rows in enumerate((slice(0, 2), slice(2, 4))):
        for branch in (0, 1):
            for chunk in (0, 1):
                state = policy.init_state(SHAPE, Scope(window, branch, chunk))
                for row in np.flatnonzero(ACTIVE[rows, chunk]) + rows.start:
                    plan, state = policy.plan_step(state, 0.0)
                    assert (plan.recompute == (masks[row, branch, chunk] == 1)).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            RunShape(ACTIVE, (0, 2), 1, FRAMES, POSITIONS, 2),
            "trace: expected 4 rows, 1 branches, 2 chunks of 6 tokens, got 4 rows, 2 branches, "
            "2 chunks of 6 tokens. Replay it with the size, length, steps and guidance of its own "
            "run.",
        ),
        (
            RunShape(ACTIVE, (0, 2), 2, FRAMES, 4, 2),
            "trace: expected 4 rows, 2 branches, 2 chunks of 8 tokens, got 4 rows, 2 branches, "
            "2 chunks of 6 tokens. Replay it with the size, length, steps and guidance of its own "
            "run.",
        ),
        (
            RunShape(~ACTIVE, (0, 2), 2, FRAMES, POSITIONS, 2),
            "trace: expected chunks to take their steps in the rows of this run, got others. "
            "Replay it with the ar_step and the windows of its own run; one that was interrupted "
            "cannot be replayed.",
        ),
    ],
)
def test_a_trace_of_another_shape_is_refused(shape, message):
    with pytest.raises(ValueError) as error:
        replay(make_trace()).check(shape)
    assert str(error.value) == message


def test_masks_of_another_kind_are_refused():
    with pytest.raises(ValueError) as error:
        DecisionTrace.from_masks(np.zeros((2, 1, 1, 5), np.int64), 2, True)
    assert str(error.value) == (
        "recompute: expected int8 (rows, branches, chunks, L) with L a multiple of 2 frames, got "
        "int64 (2, 1, 1, 5). Pass 1, 0 and -1 as DecisionTrace.recompute has them."
    )


@pytest.mark.parametrize("content", ["text", "npz", "schema", "cut", "absent"])
def test_what_is_no_trace_is_refused(tmp_path, content):
    path = tmp_path / "t"
    make_trace().save(path)
    if content == "text":
        path.write_text("not a trace")
    elif content == "npz":
        with path.open("wb") as file:
            np.savez(file, latents=np.zeros(3))
    elif content == "schema":
        with np.load(path) as stored:
            arrays = dict(stored)
        arrays["header"] = np.array(json.dumps({"schema": "other/v9"}))
        with path.open("wb") as file:
            np.savez(file, **arrays)
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.unlink()
    with pytest.raises(ValueError) as error:
        DecisionTrace.load(path)
    assert str(error.value).startswith(f"{path}: expected a trace of a run, got: ")
    assert str(error.value).endswith(". Pass a file that mc-generate --trace wrote.")
