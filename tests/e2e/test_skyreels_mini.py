"""The small trained model, exported: it runs as diffusers does, with and without a schedule."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.train_mini.judge import judge_clip

from mc_export.fetch import PACKAGED
from mc_runtime import VideoPipeline
from mc_runtime.fidelity import compare_videos
from mc_runtime.flops import ModelFlops, count_work

PROMPT = "a big red circle drifts left over sand"
SETTINGS = {"num_frames": 37, "seed": 3}


@pytest.fixture(scope="module")
def mini(export) -> VideoPipeline:
    return VideoPipeline.from_bundle(export(PACKAGED), threads=2)


@pytest.fixture(scope="module")
def uncached(mini):
    return mini.run(PROMPT, **SETTINGS)


def test_the_bundle_knows_its_name_its_size_and_its_presets(mini) -> None:
    assert mini.bundle.manifest.model == "skyreels-mini"
    options = mini.default_options
    assert (options.height, options.width, options.guidance_scale) == (64, 64, 3)
    assert "motioncache:calibrated" in mini.bundle.manifest.presets


def test_it_shows_what_the_prompt_says(uncached) -> None:
    verdict = judge_clip(uncached.frames)
    assert (verdict.colour, verdict.shape, verdict.direction) == ("red", "circle", "left")


def test_the_schedule_saves_work_and_keeps_the_picture(mini, uncached) -> None:
    cached = mini.run(PROMPT, policy="motioncache:calibrated", **SETTINGS)
    flops = ModelFlops.from_manifest(mini.bundle.manifest.config["transformer"])
    work, whole = (count_work(flops, run.trace, padded=False).total for run in (cached, uncached))
    assert whole / work > 2
    assert compare_videos(uncached.frames, cached.frames).video.whole.psnr > 25
    assert judge_clip(cached.frames).colour == "red"


def test_trained_weights_give_diffusers_latents(mini, diffusers) -> None:
    options = replace(mini.default_options, num_frames=37, num_inference_steps=6)
    given = {
        "latents": mini.draw_noise(options),
        "prompt_embeds": mini.embed_text("prompt", PROMPT, print),
        "negative_prompt_embeds": mini.embed_text("negative_prompt", "", print),
    }
    ours = mini.run(**given, decode=False, options=options)
    theirs = diffusers(PACKAGED).run(options, **given)
    np.testing.assert_allclose(ours.latents, theirs, atol=1e-3)
