"""Models and settings drawn at random, against diffusers' pipeline and its transformer.

One model is stored in bfloat16, as published ones are; both sides compute in float32.
"""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_tiny_checkpoint

from mc_runtime.options import GenerationOptions
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.transformer import KeyCache

CHUNK = 5
TOLERANCE = 1e-4  # rounding alone leaves 2e-6


@pytest.fixture(scope="module", params=[1, 2])
def model(request, tmp_path_factory, export, diffusers):
    """A pipeline, diffusers on the same checkpoint, and the seed of both."""
    draw = np.random.default_rng(request.param)
    checkpoint = make_tiny_checkpoint(
        tmp_path_factory.mktemp("random") / f"model-{request.param}",
        seed=request.param,
        layers=int(draw.integers(1, 4)),
        heads=int(draw.integers(1, 5)),
        head_dim=2 * int(draw.integers(6, 24)),
        ffn_dim=int(draw.integers(40, 200)),
        text_dim=int(draw.integers(8, 64)),
        fps_embedding=request.param == 1,
        dtype=torch.float32 if request.param == 1 else torch.bfloat16,
        parts=("transformer",),
    )
    return (
        VideoPipeline.from_bundle(export(checkpoint), threads=1),
        diffusers(checkpoint),
        request.param,
    )


def draw_options(draw, **fixed):
    drawn = GenerationOptions(
        num_frames=4 * CHUNK * int(draw.integers(1, 4)) - 3,
        height=16 * int(draw.integers(1, 5)),
        width=16 * int(draw.integers(1, 5)),
        num_inference_steps=int(draw.integers(1, 9)),
        guidance_scale=draw.uniform(2, 7),
        flow_shift=draw.uniform(1, 12),
        fps=int(draw.choice([16, 24])),
        ar_step=int(draw.integers(1, 7)),
        addnoise_condition=0,
    )
    return GenerationOptions(**asdict(drawn) | fixed)


def draw_inputs(draw, options, text_dim):
    frames, height, width = (options.num_frames + 3) // 4, options.height // 8, options.width // 8
    texts = {
        name: draw.standard_normal((1, int(draw.integers(1, 12)), text_dim), np.float32)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    return texts | {"latents": draw.standard_normal((16, frames, height, width), np.float32)}


@pytest.mark.parametrize(
    ("setting", "fixed"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (4, {"ar_step": 0}),
        (5, {"guidance_scale": 1.0}),
        (6, {"num_inference_steps": 1}),
    ],
)
def test_latents_equal_those_of_diffusers(model, setting, fixed):
    pipeline, oracle, seed = model
    draw = np.random.default_rng([seed, setting])
    options = draw_options(draw, **fixed)
    inputs = draw_inputs(draw, options, pipeline.transformer.config.text_dim)
    latents = pipeline.run(options=options, decode=False, **inputs).latents
    expected = oracle.run(options, **inputs)
    assert np.abs(latents - expected).max() <= TOLERANCE, options


@torch.no_grad()
def test_one_forward_equals_that_of_diffusers(model):
    pipeline, oracle, seed = model
    draw = np.random.default_rng([seed, 0])
    options = draw_options(draw, num_frames=57)
    inputs = draw_inputs(draw, options, pipeline.transformer.config.text_dim)
    latents, embedding = inputs["latents"], inputs["prompt_embeds"]
    timesteps = draw.integers(0, 1000, latents.shape[1] // CHUNK)
    oracle.transformer._set_ar_attention(CHUNK)
    expected = oracle.transformer(
        hidden_states=torch.from_numpy(latents[None]),
        timestep=torch.from_numpy(timesteps.repeat(CHUNK)[None]),
        encoder_hidden_states=torch.from_numpy(embedding),
        enable_diffusion_forcing=True,
        fps=[0 if options.fps == 16 else 1],
        return_dict=False,
    )[0]
    velocity = forward(pipeline.transformer, latents, embedding, timesteps, options.fps)
    assert np.abs(velocity - expected[0].numpy()).max() <= TOLERANCE


def forward(transformer, latents, embedding, timesteps, fps):
    """Pass over the chunks of a window, each at its own timestep."""
    config = transformer.config
    _, _, height, width = latents.shape
    size = (CHUNK, height // 2, width // 2)
    tokens = np.prod(size)
    conditions = transformer.encode_timesteps(timesteps, fps)
    context = transformer.encode_context(embedding)
    cache = KeyCache(config, len(timesteps) * tokens)
    parts = []
    for chunk, part in enumerate(np.split(latents, len(timesteps), axis=1)):
        angles = config.rope.tables(*size, first_frame=chunk * CHUNK)
        row = slice(chunk, chunk + 1)
        out = transformer.recompute(
            transformer.embed(patchify(part, config.patch_size)),
            np.arange(tokens),
            conditions.modulation[row],
            angles,
            context,
            cache,
            chunk * tokens,
        )
        rows = transformer.head(out, conditions.head_modulation[row])
        parts.append(unpatchify(rows, config.patch_size, part.shape))
    return np.concatenate(parts, axis=1)
