"""MAGI-1 against the published code: schedule, latents, every decision of every published cache.

tests/golden/README-magi.md says which code that is. The bundles are exported from the checkpoints
of the cases; the runtime is held against what the original computed, run by run.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mc_runtime.families.magi_schedule import MagiOptions, MagiSchedule, timestep_table
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.generation import generate_chunks
from mc_runtime.inputs import Inputs
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule import step_matrix
from motioncache import DecisionTrace, Mode, make_policy, none, replay
from motioncache.config import MAGI_REFERENCE

GOLDEN = Path(__file__).parent.parent / "golden"
SCHEDULE = json.loads((GOLDEN / "magi-schedule.json").read_text())
RUNS = list(json.loads((GOLDEN / "magi-a/case.json").read_text())["runs"])
SHARE = 0.999  # of the active tokens, where a distance may lie within rounding of the threshold
TOLERANCE = 1e-3  # rounding alone leaves 6e-5


class Case(NamedTuple):
    """A golden case, and its model as a bundle."""

    pipeline: VideoPipeline
    case: dict
    settings: dict
    inputs: dict
    expected: dict

    def options(self, **changes):
        sizes = {side: self.settings[f"video_size_{side[0]}"] for side in ("height", "width")}
        chosen = {"num_frames": self.settings["num_frames"], "num_inference_steps": 16}
        return MagiOptions(**(chosen | sizes | changes))

    def generate(self, policy, **changes):
        """Latents of the whole video, and the trace of the run."""
        options, pipeline = self.options(**changes), self.pipeline
        captions = self.inputs["caption_embs"][0][:, self.inputs["caption_mask"][0] > 0]
        special = self.inputs["special_tokens"].astype(np.float16).astype(np.float32)[None]
        null = pipeline.bundle.map_tensors("weights/null_text.safetensors")["embedding"][None]
        noise = self.inputs["noise"][0]
        config = pipeline.bundle.manifest.config
        inputs = Inputs((captions, null, special), noise, noise[:, :0], options, config, "golden")
        plan = pipeline.plan(options)
        passes = pipeline.passes, None, policy, lambda _: None
        generation = generate_chunks(pipeline.family, inputs, plan, *passes)
        latents = np.concatenate([chunk.latents for chunk in generation], axis=1)
        return latents, generation.trace


@pytest.fixture(scope="module", params=["magi-a", "magi-b"])
def golden(request, export):
    return open_case(request.param, export)


@pytest.fixture(scope="module")
def distilled(export):
    return open_case("magi-a", export)


def open_case(name, export):
    folder = GOLDEN / name
    return Case(
        VideoPipeline.from_bundle(export(folder, "magi"), threads=1),
        json.loads((folder / "case.json").read_text()),
        json.loads((folder / "config.json").read_text())["runtime_config"],
        dict(np.load(folder / "inputs.npz")),
        dict(np.load(folder / "expected.npz")),
    )


def published_policy(rules, own_keys):
    """MotionCache by the names of the published file, with its defects but for the key range."""
    kept = not rules["discard_nearly_clean_chunk"]
    settings = {
        "threshold": rules["token_rel_l1_thresh"],
        "chunk_threshold": rules["rel_l1_thresh"],
        "warmup_steps": rules["warmup_steps"] - 1,
        "coarse_steps": rules["chunk_wise_only_steps"],
        "weight_floor": rules["temporal_weight_floor"],
        "weight_power": rules["temporal_weight_power"],
        "token_distance": rules["tokenwise_l1_mode"] == "token",
        "first_reuse_cap": rules.get("initial_token_reuse_ratio", 1.0),
        "last_reuse_cap": rules.get("final_token_reuse_ratio", 1.0),
        "vote_frames": 4 if rules["enable_temporal_voting"] else None,
        "compat": replace(MAGI_REFERENCE, own_keys=own_keys, nearly_clean=kept),
    }
    return make_policy("motioncache", settings, "magi")


def policy_of(case, run):
    described = case.case["runs"][run]
    own_keys = described["kv_range_of_sparse_forwards"].startswith("own row")
    return published_policy(described["rules"], own_keys)


# Schedule


@pytest.mark.parametrize("name", SCHEDULE["timesteps"])
def test_timesteps_are_exact(name):
    steps, _, mode = name.partition("|")
    expected = np.array(SCHEDULE["timesteps"][name], np.float32)
    np.testing.assert_array_equal(timestep_table(int(steps), mode or "8,16,16"), expected)


@pytest.mark.parametrize("sequence", SCHEDULE["sequences"])
def test_the_wave_is_the_published_one(sequence):
    """A row here is a step there; stages of one step show the window's way."""
    window, given = sequence["window"], sequence["offset"]
    matrix = step_matrix(sequence["chunk_num"], window, 1, given)
    spans = [np.flatnonzero(active) for active in matrix.update]
    assert [span[0] for span in spans] == sequence["chunk_start"]
    assert [span[-1] + 1 for span in spans] == sequence["chunk_end"]
    stages = [matrix.step[row, spans[row]] for row in range(len(spans))]
    assert [stage.min() - 1 for stage in stages] == sequence["t_start"]
    assert [stage.max() for stage in stages] == sequence["t_end"]


def test_local_steps_key_ranges_and_extra_passes_are_the_published_ones(golden):
    options = golden.options()
    plan = golden.pipeline.plan(options)
    schedule = MagiSchedule.from_manifest(golden.pipeline.bundle.manifest.config, options)
    active = plan.shape.active
    steps = np.where(active, plan.matrices[0].step - 1, -1)
    np.testing.assert_array_equal(steps, golden.expected["local_step"])
    ranges = golden.expected["uncached_kv"]
    chunks = active.shape[1]
    for row, chunk in np.argwhere(active):
        seen = schedule.visible(chunk, steps[row, chunk])
        assert (seen.start, seen.stop) == tuple(ranges[row, chunk])
    for row in np.flatnonzero(golden.expected["uncached_flags"][:, 0]):
        clean = np.flatnonzero(active[row])[0] - 1
        seen = schedule.visible_clean(clean, given=False)
        assert (seen.start, seen.stop) == tuple(ranges[row, chunks])


def test_clean_and_nearly_clean_passes_are_made_where_the_original_makes_them(golden):
    _, trace = golden.generate(none())
    clean = (trace.mode[:, 0] == Mode.CLEAN).any(axis=1)
    np.testing.assert_array_equal(clean, golden.expected["uncached_flags"][:, 0] == 1)
    if golden.case["cfg_number"] == 1:
        copies = (trace.mode[:, 1] == Mode.FULL).any(axis=1)
        np.testing.assert_array_equal(copies, golden.expected["uncached_flags"][:, 1] == 1)


def test_the_work_of_an_uncached_run_is_known_before_it(golden):
    options = golden.options()
    config = golden.pipeline.bundle.manifest.config
    schedule = MagiSchedule.from_manifest(config, options)
    _, trace = golden.generate(none())
    prompt = int(golden.inputs["caption_mask"].sum()) + 2  # behind two special tokens
    captions = [min(prompt, 64)] * golden.case["chunks"]
    planned = plan_uncached(schedule, golden.pipeline.plan(options), captions, null=50)
    np.testing.assert_array_equal(planned.mode, trace.mode)
    flops = ModelFlops.from_manifest(config["transformer"])
    work = count_work(flops, planned, padded=False)
    assert count_work(flops, trace, padded=False) == work
    assert count_work(flops, trace, padded=True) == work


# Latents


def test_uncached_latents_are_the_published_ones(golden):
    latents, trace = golden.generate(none())
    error = np.abs(latents - golden.expected["uncached_final"]).max()
    assert error <= golden.case["tolerances"]["final_max_abs"]
    assert not np.isin(trace.mode, (Mode.REUSE, Mode.PARTIAL)).any()


def test_twelve_steps_take_the_published_shortcut(distilled):
    latents, _ = distilled.generate(none(), num_inference_steps=12)
    error = np.abs(latents - distilled.expected["uncached12_final"]).max()
    assert error <= distilled.case["tolerances"]["final_max_abs"]


@pytest.mark.parametrize("run", RUNS)
def test_decisions_and_latents_of_a_published_cache_are_the_published_ones(distilled, run):
    latents, trace = distilled.generate(policy_of(distilled, run))
    expected = distilled.expected[f"{run}_mask"]
    found = trace.recompute[:, 0]
    assert ((found >= 0) == (expected >= 0)).all()
    assert (found == expected)[expected >= 0].mean() >= SHARE
    assert np.abs(latents - distilled.expected[f"{run}_final"]).max() <= TOLERANCE


@pytest.mark.parametrize("run", [run for run in RUNS if run != "mc_near"])
def test_with_the_published_masks_forced_the_latents_are_the_published_ones(distilled, run):
    """mc_near is left out: what it mixes where depends on more than the masks."""
    policy = policy_of(distilled, run)
    masks = np.repeat(distilled.expected[f"{run}_mask"][:, None], 2, axis=1)
    switches = asdict(policy.switches)
    trace = replay(DecisionTrace.from_masks(masks, 6, clean_pass=False, switches=switches))
    latents, _ = distilled.generate(trace)
    assert np.abs(latents - distilled.expected[f"{run}_final"]).max() <= TOLERANCE


# Ways to be wrong, each of which has to show


def test_another_key_range_shows(distilled):
    described = distilled.case["runs"]["mc"]
    latents, _ = distilled.generate(published_policy(described["rules"], own_keys=True))
    assert np.abs(latents - distilled.expected["mc_final"]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("switch", ["reuse_velocity", "force_last_step", "clean_pass"])
def test_every_mended_defect_shows(distilled, switch):
    policy = policy_of(distilled, "mc_loose_kvfix")
    changed = replace(policy.config, compat=replace(policy.switches, **{switch: True}))
    mended = make_policy("motioncache", vars(changed), "magi")
    latents, _ = distilled.generate(mended)
    assert np.abs(latents - distilled.expected["mc_loose_kvfix_final"]).max() > 10 * TOLERANCE


def test_velocities_come_nearer_to_the_run_without_reuse(distilled):
    """The figures of docs/decisions/010, on random weights."""
    policy = policy_of(distilled, "mc_kvfix")
    changed = replace(policy.config, compat=replace(policy.switches, reuse_velocity=True))
    latents, _ = distilled.generate(make_policy("motioncache", vars(changed), "magi"))
    uncached, increments = (distilled.expected[f"{run}_final"] for run in ("mc_none", "mc_kvfix"))
    found = [np.sqrt(np.square(each - uncached).mean()) for each in (increments, latents)]
    assert found == pytest.approx([0.125, 0.054], abs=5e-4)


def test_without_nearly_clean_guidance_the_latents_are_others(distilled):
    latents, _ = distilled.generate(none(), nearly_clean=False)
    assert np.abs(latents - distilled.expected["uncached_final"]).max() > 10 * TOLERANCE
