"""The procedural world of skyreels-mini, its judge, and the pass its transformer trains with."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.train_mini import (
    autoencoder,
    forcing,
    judge,
    latents,
    linear,
    muon,
    render,
    text,
    transformer,
    world,
)
from scripts.train_mini.world import Actor, Scene

SEEDS = st.integers(0, 2**31)


def place(shape: str = "circle", motion: str = "stays", start: tuple[float, float] = (32, 32)):
    return Actor(shape, "red", "small", motion, start, start)


def show(*actors: Actor, pan: str = "", cut: int = 0) -> Scene:
    return Scene(actors, ("sand", "bricks")[: 2 if cut else 1], pan, cut, seed=7)


@settings(max_examples=5, deadline=None)
@given(SEEDS)
def test_a_seed_gives_one_scene_and_one_clip(seed: int) -> None:
    first, second = (world.draw_scene(seed, "any") for _ in range(2))
    assert first == second
    clips = [render.render_scene(scene, 9) for scene in (first, second)]
    np.testing.assert_array_equal(clips[0].frames, clips[1].frames)


def test_two_seeds_differ() -> None:
    assert len({world.draw_scene(seed).caption() for seed in range(50)}) > 40


def test_a_tenth_of_the_combinations_is_held_out() -> None:
    parts = (world.SHAPES, world.COLOURS, world.MOTIONS, world.BACKGROUNDS)
    combinations = list(itertools.product(*parts))
    share = np.mean([world.is_held_out(combination) for combination in combinations])
    assert 0.08 < share < 0.13


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_training_never_sees_a_held_out_combination(seed: int) -> None:
    train, held_out = (world.draw_scene(seed, split) for split in ("train", "held_out"))
    assert not any(map(world.is_held_out, train.combinations()))
    assert all(map(world.is_held_out, held_out.combinations()))


def test_pans_cuts_and_pairs_have_their_share() -> None:
    scenes = [world.draw_scene(seed, "any") for seed in range(1000)]
    assert 0.25 < np.mean([len(scene.actors) == 2 for scene in scenes]) < 0.35
    assert 0.09 < np.mean([bool(scene.pan) for scene in scenes]) < 0.15
    assert 0.055 < np.mean([bool(scene.cut) for scene in scenes]) < 0.105
    plain = [world.draw_scene(seed, "any", plain=True) for seed in range(100)]
    assert not any(scene.pan or scene.cut for scene in plain)


def test_the_caption_follows_the_grammar() -> None:
    other = Actor("cross", "blue", "big", "races left", (40, 20), (40, 20))
    assert show(place()).caption() == "a small red circle stays over sand"
    assert show(place(), other).caption() == (
        "a small red circle stays and a big blue cross races left over sand"
    )
    assert show(place(), pan="left").caption().endswith("over sand while the camera pans left")
    assert show(place(), cut=40).caption().endswith("over sand then cut to bricks")


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(1, 400))
def test_objects_stay_inside_the_walls(seed: int, frames: int) -> None:
    for actor in world.draw_scene(seed, "any").actors:
        path = render.trace_path(actor, frames)
        assert path.min() >= actor.radius - 1e-9
        assert path.max() <= world.SIZE - actor.radius + 1e-9
        steps = np.abs(np.diff(path, axis=0))
        assert steps.max(initial=0) <= max(map(abs, actor.velocity)) + 1e-9


def test_an_object_begins_anew_after_a_cut() -> None:
    actor = replace(place(motion="drifts right"), restart=(20.0, 50.0))
    path = render.trace_path(actor, 60, cut=40)
    np.testing.assert_allclose(path[[0, 40]], [(32, 32), (20, 50)])


def test_the_mask_covers_every_change_and_little_else() -> None:
    scene = show(place(motion="races left"), place("square", start=(20, 50)))
    clip = render.render_scene(scene, 49)
    changed = np.abs(np.diff(clip.frames.astype(int), axis=0)).max(-1) > 2
    assert not (changed & ~clip.moving[1:]).any()
    assert clip.moving.mean() < 0.12
    assert not clip.moving[:, 58:].any(), "the still square is not in the mask"


def test_still_scenes_have_an_empty_mask() -> None:
    clip = render.render_scene(show(place()), 12)
    assert not clip.moving.any()
    assert (clip.frames == clip.frames[0]).all()


def test_pans_and_cuts_move_everything() -> None:
    assert render.render_scene(show(place(), pan="left"), 6).moving.all()
    cut = render.render_scene(show(place(), cut=4), 8).moving
    assert cut[4].all()
    assert not np.delete(cut, 4, axis=0).any()


def test_a_pan_slides_the_background() -> None:
    frames = render.render_scene(replace(show(pan="left"), actors=()), 9).frames.astype(int)
    np.testing.assert_allclose(frames[8, :, 2:], frames[0, :, :-2], atol=1)  # 8 / 4 pixels


def test_the_later_object_passes_before_the_earlier() -> None:
    front = replace(place("square"), colour="blue")
    frames = render.render_scene(show(place(), front), 1).frames
    assert tuple(frames[0, 32, 32]) == world.COLOURS["blue"]


def test_the_judge_is_right_and_shuffled_captions_are_chance() -> None:
    verdicts, scenes = judge.judge_scenes(60)
    own = judge.rate_verdicts(verdicts, scenes)
    shuffled = judge.rate_verdicts(verdicts, judge.shift_captions(scenes))
    assert own.keys() == {"colour", "shape", "direction", "still"}
    assert min(map(np.mean, own.values())) >= 0.99
    assert max(map(np.mean, shuffled.values())) < 0.5


@pytest.mark.parametrize(
    ("part", "broken", "expected"),
    [
        ("judge_clip", lambda *_: judge.Verdict("", "", "", False), "right on 99%"),
        ("shift_captions", list, "chance under the next captions"),
    ],
)
def test_a_judge_that_fails_is_refused(monkeypatch, part, broken, expected) -> None:
    monkeypatch.setattr(judge, part, broken)
    with pytest.raises(SystemExit, match=expected):
        judge.check_judge(3)


def test_the_judge_sees_no_object_where_there_is_none() -> None:
    frames = render.render_scene(replace(show(), actors=()), 9).frames
    assert judge.judge_clip(frames) == judge.Verdict("", "", "", False)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(1, 5), st.data())
def test_noise_levels_follow_the_wave(seed: int, chunks: int, data: st.DataObject) -> None:
    clean = np.array([data.draw(st.integers(0, chunks - 1)) for _ in range(6)])
    sigma = forcing.draw_levels(np.random.default_rng(seed), 6, chunks, clean)
    assert (np.diff(sigma, axis=1) >= 0).all(), "later chunks are noisier"
    assert ((sigma > 0) & (sigma < 1)).any(1).all()
    assert all((row[:prefix] == 0).all() for row, prefix in zip(sigma, clean, strict=True))
    place = sigma / (forcing.SHIFT - (forcing.SHIFT - 1) * sigma)
    both = (sigma[:, 1:] < 1) & (sigma[:, :-1] > 0)
    np.testing.assert_allclose(np.diff(place, axis=1)[both], forcing.LAG, atol=1e-9)


def test_noise_levels_stay_where_they_are_wanted() -> None:
    sigma = forcing.draw_levels(np.random.default_rng(0), 500, 1, np.zeros(500, int), (0.2, 0.9))
    low, high = forcing.shift_level(np.array([0.2, 0.9]))
    assert low <= sigma.min() < low + 0.02 and high - 0.02 < sigma.max() <= high


def test_what_objects_cover_is_where_their_colour_is() -> None:
    for seed in range(40):
        scene = world.draw_scene(seed, actors=1)
        frames = render.render_scene(scene, 9).frames
        cover = render.cover_objects(scene, 9)
        colour = np.array(world.COLOURS[scene.actors[0].colour])
        assert (frames[cover == 1] == colour).all()
        assert abs(frames[cover == 0].astype(int) - colour).max(-1).min() > 0
        groups = latents._cover_groups(scene, 3)
        np.testing.assert_allclose(groups[0] / 255, cover[0], atol=0.002)
        np.testing.assert_allclose(groups[2] / 255, cover[5:9].mean(0), atol=0.002)


def test_latents_near_objects_are_those_that_see_one() -> None:
    cover = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    cover[0, 0, 20, 33] = 7  # in the latent of row 5, column 8, and within 2 pixels of row 4
    near = latents.Batch(torch.zeros(0), [], np.zeros(1), cover).near_objects()
    assert near.nonzero()[:, 2:].tolist() == [[4, 7], [4, 8], [5, 7], [5, 8]]


def test_pixels_are_cut_into_tokens_in_the_models_order() -> None:
    pixels = torch.arange(2 * 3 * 64 * 64).reshape(2, 3, 64, 64).float()
    tokens = transformer.cut_into_tokens(pixels).reshape(2, 3, 8, 8, 8, 8)
    for frame, row, column in ((0, 0, 0), (2, 3, 5), (1, 7, 1)):
        rows, columns = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
        torch.testing.assert_close(tokens[1, frame, row, column], pixels[1, frame, rows, columns])


def test_objects_weigh_as_much_as_the_rest_but_not_in_noise() -> None:
    near = torch.zeros(2, 1, 1, 10, 10, dtype=torch.bool)
    near[..., :1] = True  # a tenth
    weights = transformer.weigh_errors(near, torch.tensor([[0.5], [0.99]]))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[0, ..., 0] / weights[0, ..., 1], torch.full((1, 1, 10), 8.0))
    assert weights[1].min() == weights[1].max()


def test_a_frame_alone_stands_where_it_stands_in_the_video() -> None:
    model = transformer.build_transformer(layers=1, heads=1)
    whole = forcing._rotation(model, torch.zeros(1, 16, 5, 8, 8), 0)
    alone = forcing._rotation(model, torch.zeros(1, 16, 1, 8, 8), 3)
    torch.testing.assert_close(alone, whole[3 * 16 : 4 * 16])


def test_levels_are_those_of_the_sampler() -> None:
    scheduler = transformer.build_scheduler()
    scheduler.set_timesteps(50)
    expected = scheduler.sigmas[:50].numpy()
    start = 1 - np.arange(50) / 50 * 0.999  # diffusers' table begins at 1 and ends at 1 / 1000
    np.testing.assert_allclose(forcing.shift_level(start), expected, atol=0.02)


def test_half_of_the_chunks_are_led_by_a_frame_with_less_noise() -> None:
    sigma = np.full((1000, 1), 0.5)
    levels = forcing.draw_led_levels(np.random.default_rng(0), sigma)
    led = levels[:, 1] > 0.5
    assert 450 < led.sum() < 550
    np.testing.assert_array_equal(levels[~led], 0.5)
    np.testing.assert_array_equal(levels[led, 1:], levels[led, 1:2].repeat(4, axis=1))
    assert 0.93 < levels[led, 1:].min() < 0.95 and 0.99 < levels[led, 1:].max() < 1
    assert (levels[led, 0] < levels[led, 1]).all() and levels[led, 0].min() < 0.2


@pytest.mark.parametrize(
    "timesteps", [[[700, 999], [0, 333]], [[*range(10, 20)], [*range(700, 710)]]]
)
@pytest.mark.parametrize("sample", [0, 1])
def test_the_training_pass_equals_diffusers(sample: int, timesteps: list[list[int]]) -> None:
    torch.manual_seed(0)
    model = transformer.build_transformer(layers=2, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    tokenizer = text.build_tokenizer()
    encoder = text.build_text_encoder(len(tokenizer)).eval()
    captions = ["a small red circle races left over sand", ""]
    x = torch.randn(2, 16, 10, 8, 8)
    times = torch.tensor(timesteps)
    with torch.no_grad():
        embeddings, bias = text.embed_captions(tokenizer, encoder, captions)
        ours, _ = forcing.predict_velocity(model, x, times, embeddings, bias)
        padded = torch.zeros(2, text.MAX_TOKENS, text.TEXT_DIM)
        padded[:, : embeddings.shape[1]] = embeddings
        one = slice(sample, sample + 1)  # diffusers 0.42.1 adds fps to a batch of one alone
        theirs = model(
            x[one],
            times[one].repeat_interleave(10 // times.shape[1], dim=1),
            padded[one],
            enable_diffusion_forcing=True,
            fps=[1],
            return_dict=False,
        )[0]
    torch.testing.assert_close(ours[one], theirs, atol=2e-5, rtol=1e-4)


def test_every_word_of_the_captions_is_a_token() -> None:
    tokenizer = text.build_tokenizer()
    for seed in range(200):
        ids = tokenizer(world.draw_scene(seed, "any").caption()).input_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_orthogonalise_levels_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((24, 64), (64, 24)):
        matrix = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        ours = muon.orthogonalise(matrix)
        values = torch.linalg.svdvals(ours)
        assert 0.3 < values.min() <= values.max() < 1.3
        assert (
            torch.linalg.norm(
                left.T @ ours @ right.T - torch.diag(torch.diag(left.T @ ours @ right.T))
            )
            < 1e-3
        )


def test_the_vae_begins_as_a_linear_codec() -> None:
    torch.manual_seed(0)
    vae = autoencoder.build_vae()
    scenes = [world.draw_scene(seed) for seed in range(6)]
    frames = np.stack([render.render_scene(scene, 9).frames for scene in scenes])
    video = autoencoder.to_video(frames)
    linear.init_linear(vae, video)
    with torch.no_grad():
        with linear.linear_only(vae):
            before = vae.encode(video).latent_dist.mode()
            linear_video = vae.decode(before).sample
        linear.restore_nonlinear(vae, video)
        after = vae.encode(video).latent_dist.mode()
        whole_video = vae.decode(before).sample
    assert ((linear_video - video) / 2).square().mean() < 10**-2.9, "29 dB"
    torch.testing.assert_close(before[:, :, 1:].std(), torch.tensor(1.0), atol=0.02, rtol=0)
    assert (after - before).std() < 0.05 * before.std()
    assert (whole_video - linear_video).std() < 0.05 * linear_video.std()
