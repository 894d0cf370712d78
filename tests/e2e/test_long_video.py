"""Videos of several windows, against diffusers' long-video mode."""

from dataclasses import replace

import numpy as np
import pytest

TOLERANCE = 1e-4  # rounding alone leaves 6e-6

# Windows of 10 or 15 latent frames. An overlap of 21 frames is 6 latent frames: no whole chunks.
LAYOUTS = {
    "two windows": dict(num_frames=57, base_num_frames=37, overlap_history=17),
    "three windows": dict(num_frames=77, base_num_frames=37, overlap_history=17),
    "shorter last window": dict(num_frames=77, base_num_frames=57, overlap_history=17),
    "two windows, overlap cut": dict(num_frames=53, base_num_frames=37, overlap_history=21),
    "three windows, overlap cut": dict(num_frames=69, base_num_frames=37, overlap_history=21),
}


@pytest.fixture(params=[0, 20], ids=["clean prefix", "noisy prefix"])
def addnoise(request):
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_latents_equal_those_of_diffusers(golden, diffusers, layout, addnoise):
    options = replace(
        golden.options, num_inference_steps=6, seed=3, addnoise_condition=addnoise, **layout
    )
    shape = list(golden.inputs["latents"].shape)
    shape[1] = (options.num_frames + 3) // 4
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    inputs = golden.inputs | {"latents": noise}
    latents = golden.pipeline.run(options=options, decode=False, **inputs).latents
    expected = diffusers(golden.checkpoint).run(options, **inputs)
    assert latents.shape == expected.shape
    assert np.abs(latents - expected).max() <= TOLERANCE
