"""The measurements of skyreels-mini, each against a count by hand."""

import sys
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.train_mini import job, latents, muon, render, transformer, world
from scripts.train_mini.evaluate import motion, policies, prompts, records, scenes, weights

from mc_export.fetch import PACKAGED
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.sampler import sampler_table
from mc_runtime.transformer import KeyCache
from motioncache import DecisionTrace


def test_tokens_move_where_any_of_their_pixels_does() -> None:
    moving = np.random.default_rng(0).random((9, 64, 64)) < 0.002
    tokens = weights.to_tokens(moving)
    assert tokens.shape == (3, 64) and 0 < tokens.sum() < tokens.size
    for frame, span in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for position in range(64):
            top, left = 8 * (position // 8), 8 * (position % 8)
            pixels = moving[span, top : top + 8, left : left + 8]
            assert tokens[frame, position] == pixels.any()


def test_the_area_counts_pairs_that_are_in_order() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, 40).astype(np.float32)  # with ties, which count half
    moves = rng.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[moves] for b in scores[~moves]]
    assert weights.rank_tokens(scores, moves) == pytest.approx(np.mean(pairs))
    assert weights.rank_tokens(scores, np.ones(40, bool)) is None
    assert weights.rank_tokens(scores, np.zeros(40, bool)) is None


def test_changes_are_those_of_more_than_8_levels() -> None:
    frames = np.full((3, 64, 64, 3), 100, np.uint8)
    frames[1:, 3, 4, 2] = 91
    frames[2, 5, 6, 0] = 108
    changes = weights.find_changes(frames)
    assert np.argwhere(changes).tolist() == [[0, 3, 4], [1, 3, 4]], "the first takes the second's"


def test_a_trace_is_scored_after_the_warm_up_on_the_prompts_branch() -> None:
    frames = np.full((17, 64, 64, 3), 50, np.uint8)
    frames[8:, :8, :8] = 200  # one token moves, in latent frame 2
    moves = np.zeros((5, 64), bool)
    moves[2, 0] = True
    right, wrong = moves.ravel().astype(np.float16), 1 - moves.ravel().astype(np.float16)
    trace = SimpleNamespace(
        step=np.array([[weights.WARMUP_STEPS + 1], [weights.WARMUP_STEPS + 2]], np.int16),
        weights=np.array([[[wrong], [wrong]], [[right], [wrong]]]),
    )
    assert weights.score_trace(trace, frames) == pytest.approx(1)


def test_watching_changes_nothing_and_records_every_step(tiny) -> None:
    options = {"num_frames": 37, "height": 64, "width": 64, "num_inference_steps": 3}
    plain = tiny.run("x", **options)
    watched = tiny.run("x", policy=weights.watch(), **options)
    np.testing.assert_array_equal(plain.latents, watched.latents)
    assert isinstance(watched.trace, DecisionTrace)
    active = watched.trace.step > 0
    assert np.isfinite(watched.trace.weights.astype(np.float32)).all(axis=(1, 3))[active].all()


def test_given_clips_are_noised_to_the_level_of_their_step(tiny, monkeypatch) -> None:
    """With one chunk, motion is that of a direct pass over what the schedule expects."""
    monkeypatch.setattr(weights, "_EVERY", 1)
    options = replace(tiny.default_options, height=64, width=64, num_inference_steps=8)
    watched = copy(tiny)
    watched.__class__ = type("Small", (type(tiny),), {"default_options": options})
    latents = np.random.default_rng(3).standard_normal((16, 5, 8, 8), np.float32)
    monkeypatch.setattr(watched, "plan", lambda _: tiny.plan(replace(options, num_frames=17)))
    passes = list(weights._forced_passes(watched, latents, "x", seed=4))
    assert [chunk for chunk, _ in passes] == [0, 0, 0], "steps 6 to 8, after a warm-up of 5"
    table = sampler_table(8, options.flow_shift, options.sigma_table, options.first_sample)
    noise = np.random.default_rng(4).standard_normal(latents.shape, np.float32)
    context = tiny.transformer.encode_context(tiny.embed_text("prompt", "x", print))
    conditions = tiny.transformer.encode_timesteps(table.timesteps, 24)
    config = tiny.transformer.config
    for step, (_, got) in zip((5, 6, 7), passes, strict=True):
        sigma = table.sigmas[step]
        x = (1 - sigma) * latents + sigma * noise
        out = tiny.transformer.recompute(
            tiny.transformer.embed(patchify(x, config.patch_size)),
            np.arange(80),
            conditions.modulation[step : step + 1],
            config.rope.tables(5, 4, 4),
            context,
            KeyCache(config, 80),
            0,
        )
        head = tiny.transformer.head(out, conditions.head_modulation[step : step + 1])
        clean = x - sigma * unpatchify(head, config.patch_size, x.shape)
        for frame in range(5):
            later, earlier = max(frame, 1), max(frame, 1) - 1
            change = np.abs(clean[:, later] - clean[:, earlier])  # (16, 8, 8): 4 x 4 tokens
            change = change.reshape(16, 4, 2, 4, 2).mean(axis=(0, 2, 4)).ravel()
            np.testing.assert_allclose(got[0][frame], change, rtol=1e-4)
            a, b = out.reshape(5, 16, -1)[[later, earlier]]
            relative = np.abs(a - b).mean(-1) / np.abs(b).mean(-1)
            np.testing.assert_allclose(got[1][frame], relative, rtol=1e-4)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_scenes_are_held_out_and_of_their_kind(kind: scenes.Kind) -> None:
    drawn = scenes.held_out_scenes(3, kind)
    assert len({scene.caption() for scene in drawn}) == 3
    for scene in drawn:
        assert all(map(world.is_held_out, scene.combinations()))
        assert bool(scene.cut) == (kind == "cut")
        assert bool(scene.pan) == (kind == "pan")
        assert len(scene.actors) == (2 if kind == "two" else 1)
        verbs = {"static": "stays", "slow": "drifts", "fast": "races"}
        assert kind not in verbs or scene.actors[0].motion.startswith(verbs[kind])


def test_no_use_of_seeds_reaches_anothers() -> None:
    assert world.SEEDS["clips"] == 0
    assert np.diff(sorted(world.SEEDS.values())).min() >= 100_000


def test_the_background_is_judged_without_the_object() -> None:
    actor = world.Actor("circle", "red", "big", "races right", (20, 32), (20, 32))
    frames = render.render_scene(world.Scene((actor,), ("sand",), "", 0, 3), 17).frames
    assert prompts.measure_background(frames) < 0.5
    for change in ((6, 6, 6), (6, 0, -6)):
        other = frames.copy()
        other[-1] = np.clip(frames[-1].astype(int) + change, 0, 255)
        expected = np.abs(change).mean()
        assert prompts.measure_background(other) == pytest.approx(expected, abs=0.5)
    red = np.zeros_like(frames) + np.uint8([215, 40, 40])
    assert prompts.measure_background(red) is None


@pytest.mark.parametrize("kind", ["cut", "pan", "slow", "fast", "static"])
def test_cuts_and_pans_are_seen_in_frames(kind: scenes.Kind) -> None:
    clips = [render.render_scene(scene).frames for scene in scenes.held_out_scenes(5, kind)]
    assert [motion.has_cut(frames) for frames in clips] == 5 * [kind == "cut"]
    assert sum(motion.has_pan(frames) for frames in clips) == (5 if kind == "pan" else 0)


def test_records_that_are_on_file_are_not_measured_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(records, "OUT", tmp_path)
    pipeline = SimpleNamespace(bundle=SimpleNamespace(model_hash="a" * 64))
    measured = []

    def scene(name: str) -> SimpleNamespace:
        return SimpleNamespace(caption=lambda: name)

    def measure(place, case):
        if case.caption() == "stop":
            raise KeyboardInterrupt
        measured.append(case.caption())
        return {"place": place}

    with pytest.raises(KeyboardInterrupt):
        records.take_records(pipeline, "x", [scene("a"), scene("b"), scene("stop")], measure)
    expected = [{"caption": name, "place": place} for place, name in enumerate("abc")]
    cases = [scene(name) for name in "abc"]
    assert records.take_records(pipeline, "x", cases, measure) == expected
    assert measured == ["a", "b", "c"]
    assert records.take_records(pipeline, "x", [scene("b")], measure)[0]["caption"] == "b"
    pipeline.bundle.model_hash = "b" * 64
    records.take_records(pipeline, "x", cases, measure)
    assert measured == ["a", "b", "c", "b", "a", "b", "c"]


def test_the_long_video_has_20_chunks(tiny) -> None:
    plan = tiny.plan(replace(tiny.default_options, num_frames=policies.LONG_FRAMES))
    assert sum(window.frames - window.skip for window in plan.windows) == 20 * 5


def bench_report(speedup: float, psnr: float | None, diffusers: float | None) -> dict[str, Any]:
    scores = {"psnr": psnr, "ssim": 0.9, "lpips": None, "frames": 97, "identical": 0}
    policy = {
        "policy": "motioncache:calibrated",
        "speedup": speedup,
        "flops_ratio": {"every_chunk_every_row": 2 * speedup, "chunk_causal": speedup},
        "reuse_ratio": 0.5,
        "fidelity": {"mean": {"whole": scores, "moving": scores}},
    }
    return {
        "policies": [policy],
        "diffusers": None if diffusers is None else {"none_speedup": diffusers},
        "caveats": [],
    }


def test_the_table_of_policies_has_every_ratio_and_the_means_of_all() -> None:
    reports = {"slow": bench_report(2, 30, 2.5), "fast": bench_report(4, 40, 2.5)}
    heads, slow, fast, both = policies.render_policies(reports)
    assert heads.split()[:4] == ["wall,", "diffusers", "wall,", "none"]
    numbers = ["0.5", "30", "0.9", "-", "30", "0.9", "-"]
    assert slow.split() == ["slow", "motioncache:calibrated", "5", "2", "4", "2", *numbers]
    assert fast.split()[2:6] == ["10", "4", "8", "4"]
    assert both.split()[:6] == ["all", "motioncache:calibrated", "7.5", "3", "6", "3"]
    (_, alone) = policies.render_policies({"long": bench_report(2, None, None)})
    assert alone.split()[2] == "-" and alone.split()[7] == "-"


def test_a_chunk_without_a_difference_has_no_psnr() -> None:
    chunk = {"whole": {"psnr": None, "frames": 20}, "moving": {"psnr": 31.25, "frames": 3}}
    policy = {"fidelity": {"prompts": [{"chunks": [chunk]}]}}
    assert policies._chunk_cell(policy, 0) == "same / 31.2"
    chunk["moving"]["frames"] = 0
    assert policies._chunk_cell(policy, 0) == "same / still"


def test_matrices_of_one_shape_are_trained_as_if_alone() -> None:
    def train(together: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
        groups = [matrices] if together else [[matrix] for matrix in matrices]
        optimizers = [muon._Muon(group, lr=0.1) for group in groups]
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            for matrix in matrices:
                matrix.grad = torch.randn(4, 6, generator=draw)
            for optimizer in optimizers:
                optimizer.step()
        return [matrix.detach() for matrix in matrices]

    for ours, alone in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(ours, alone)


def test_matrices_of_decayed_parts_shrink_where_nothing_pulls_at_them() -> None:
    model = torch.nn.ModuleDict({"text": torch.nn.Linear(4, 6), "image": torch.nn.Linear(4, 6)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = sum(0 * parameter.sum() for parameter in model.parameters())
    optimizers = muon.build_optimizers(model, 0.02, 2e-3, (), decayed=("text",))
    muon.descend(loss, model, optimizers, factor=0.5)
    before["text.weight"] *= 1 - 0.5 * 0.02 * 0.1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_the_learning_rate_is_a_trapezoid() -> None:
    rates = [job.trapezoid(step, 1000) for step in range(1000)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert set(rates[99:800]) == {1.0}
    assert rates[800::50] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [job.trapezoid(step, 5000) for step in range(800)] == rates[:800], "can be prolonged"
    again = [job.trapezoid(step, 5000, first=400) for step in range(400, 800)]
    assert again[:2] == pytest.approx([0.01, 0.02]) and again[99:] == rates[499:800]


CLIPS = {0: 0, 1: 1, 10: 100_000, 11: 100_001}  # seeds, by the hundreds of their latents


@pytest.fixture
def cache(tmp_path, monkeypatch) -> latents.Cache:
    """Two whole clips and two beginnings; a latent's value is 100 * clip + its frame."""
    for first, frames in ((0, 25), (100_000, 10)):
        values = 100 * np.arange(2)[:, None] + (1000 if frames == 10 else 0) + np.arange(frames)
        stored = np.broadcast_to(values[:, None, :, None, None], (2, 16, frames, 2, 2))
        captions = [world.draw_scene(first + clip).caption() for clip in range(2)]
        np.savez(
            tmp_path / f"{frames}-{first:06}.npz",
            latents=stored.astype(np.float16),
            captions=captions,
        )
    monkeypatch.setattr(latents, "_FOLDER", tmp_path)
    return latents.Cache()


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_pieces_begin_a_clip_or_continue_clean_chunks(cache, chunks: int) -> None:
    batch = cache.draw(np.random.default_rng(0), 200, 5 * chunks)
    drawn, clean = batch.latents, batch.clean
    assert drawn.shape == (200, 16, 5 * chunks, 2, 2) and batch.first == 0
    starts = drawn[:, 0, 0, 0, 0].numpy() % 100
    assert set(starts[clean == 0]) == {0}
    assert (clean < chunks).all() and (clean.mean() > 0) == (chunks > 1)
    assert set(starts[clean > 0]) <= {0, 5, 10, 15}
    scenes = {clip: world.draw_scene(seed) for clip, seed in CLIPS.items()}
    seen = set()
    for piece, cover, caption in zip(drawn.numpy(), batch.cover, batch.captions, strict=True):
        kind, frame = divmod(int(piece[0, 0, 0, 0]), 100)
        seen.add(kind)
        assert caption == scenes[kind].caption()
        np.testing.assert_array_equal(piece[0, :, 0, 0], piece[0, 0, 0, 0] + np.arange(5 * chunks))
        expected = latents._cover_groups(scenes[kind], frame + 5 * chunks)[frame:]
        np.testing.assert_array_equal(cover, expected)
    assert seen == ({0, 1} if chunks == 5 else {0, 1, 10, 11})


def test_single_frames_come_from_the_first_chunk(cache) -> None:
    rng, firsts = np.random.default_rng(0), set()
    for _ in range(40):
        batch = cache.draw(rng, 3, 1)
        assert batch.latents.shape == (3, 16, 1, 2, 2)
        assert set((batch.latents[:, 0, 0, 0, 0] % 100).tolist()) == {batch.first}
        firsts.add(batch.first)
    assert firsts == set(range(5))


def test_plain_clips_have_one_object(cache) -> None:
    expected = [seed for seed in CLIPS.values() if world.draw_scene(seed).is_plain()]
    assert len(cache._plain) == len(expected) < len(CLIPS)
    drawn = cache.draw(np.random.default_rng(0), 50, 5, plain=True).captions
    assert set(drawn) == {world.draw_scene(seed).caption() for seed in expected}


def test_latents_of_another_world_are_refused(cache, tmp_path) -> None:
    path = tmp_path / "25-000000.npz"
    with np.load(path) as shard:
        np.savez(path, latents=shard["latents"], captions=["a", "b"])
    with pytest.raises(SystemExit, match=r"expected clips of the world as it is\. Delete the file"):
        latents.Cache()


def test_a_training_can_begin_from_the_weights_in_the_package() -> None:
    mini = transformer.build_mini()
    transformer.load_packaged(mini)
    head = load_file(PACKAGED / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(
        mini.transformer.proj_out.weight.detach(), head["proj_out.weight"].float()
    )
    words = load_file(PACKAGED / "text_encoder" / "model.safetensors")
    torch.testing.assert_close(
        mini.text_encoder.shared.weight.detach(), words["shared.weight"].float()
    )
