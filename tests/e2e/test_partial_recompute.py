"""Recomputing some tokens of a chunk, against diffusers' blocks over keys that are kept by hand.

The reference passes over all tokens every time and keeps only what was asked for: of a token that
is reused, neither the output nor the keys. Finished chunks are evaluated again in every row. Reused
tokens keep their residual, or go on along the line through their last two velocities.
"""

from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch

from mc_runtime.patches import unpatchify
from mc_runtime.sampler import init_sampler, sampler_step, sampler_table
from mc_runtime.schedule import step_matrix
from motioncache import Plan, Policy

TOLERANCE = 1e-4


class RandomSubsets:
    """A policy that recomputes none, some or all tokens after the first step, and notes which."""

    def __init__(self, seed, extrapolation):
        self.draw, self.masks = np.random.default_rng(seed), []
        self.policy = Policy(
            "random",
            lambda shape, scope: (shape.tokens, 0),
            self.plan_step,
            extrapolation=extrapolation,
        )

    def plan_step(self, state, distance):
        tokens, step = state
        share = self.draw.choice([0, 0.1, 0.5, 0.9, 1]) if step else 1
        self.masks.append(self.draw.random(tokens) < share)
        return Plan(self.masks[-1]), (tokens, step + 1)


class KeptKeys:
    """Self-attention over keys and values that are kept from pass to pass.

    Attributes:
        kept: Per branch, keys and values of the whole window, shape (2, tokens, H, D).
        branch: Of the coming pass.
        first: Slot of the chunk's first token in the coming pass.
        mask: Tokens of the chunk whose keys are renewed in the coming pass.
    """

    def __init__(self, tokens, heads, head_dim):
        self.kept = torch.full((2, 2, tokens, heads, head_dim), torch.nan)
        self.branch, self.first, self.mask = 0, 0, None

    def __call__(self, attn, hidden_states, text, attention_mask, rotary_emb):
        q, k, v = (
            x[0].unflatten(-1, (attn.heads, -1))
            for x in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        )
        kept = self.kept[self.branch]
        slots = self.first + torch.from_numpy(np.flatnonzero(self.mask))
        kept[0, slots], kept[1, slots] = rotate(k, rotary_emb)[self.mask], v[self.mask]
        keys, values = kept[:, : self.first + len(k)]
        scores = torch.einsum("qhd,khd->hqk", rotate(q, rotary_emb), keys) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return attn.to_out[0](mixed.flatten(1)[None])


def rotate(x, angles):
    """Turn neighbouring pairs of x, shape (L, H, D), as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2)


class Reference:
    """diffusers' transformer on one chunk of a window at a time."""

    def __init__(self, transformer, options, latents):
        self.model, self.fps = transformer, [0 if options.fps == 16 else 1]
        cos, sin = transformer.rope(torch.from_numpy(latents[None]))
        self.angles = torch.complex(cos[0, ..., 0::2], sin[0, ..., 1::2])
        config = transformer.config
        self.keys = [
            KeptKeys(len(self.angles), config.num_attention_heads, config.attention_head_dim)
            for _ in transformer.blocks
        ]
        for block, keys in zip(transformer.blocks, self.keys, strict=True):
            block.attn1.set_processor(keys)

    def embed(self, latents):
        return self.model.patch_embedding(torch.from_numpy(latents[None])).flatten(2).mT

    def run_blocks(self, x, embedding, timestep, branch, chunk, mask):
        """Return the output of the last block for all tokens, and the embedded timestep."""
        model, tokens = self.model, x.shape[1]
        time, modulation, text, _ = model.condition_embedder(
            torch.tensor([timestep]), torch.from_numpy(embedding)
        )
        if model.config.inject_sample_info:
            modulation = modulation + model.fps_projection(model.fps_embedding.weight[self.fps])
        angles = self.angles[chunk * tokens : (chunk + 1) * tokens]
        for block, keys in zip(model.blocks, self.keys, strict=True):
            keys.branch, keys.first, keys.mask = branch, chunk * tokens, mask
            x = block(x, text, modulation.unflatten(-1, (6, -1)), angles, None)
        return x, time

    def head(self, out, time):
        shift, scale = (self.model.scale_shift_table + time[:, None]).chunk(2, dim=1)
        return self.model.proj_out(self.model.norm_out(out) * (1 + scale) + shift)[0]


class Lines:
    """Every token's velocities with the steps they were computed in, one list per token."""

    def __init__(self, share):
        self.share, self.known = share, {}

    def go_on(self, where, step, mask, computed):
        tokens = self.known.setdefault(where, [[] for _ in mask])
        for token in np.flatnonzero(mask):
            tokens[token].append((step, computed[token].numpy()))
        return torch.from_numpy(np.stack([self.foretell(token, step) for token in tokens]))

    def foretell(self, known, step):
        (b, last), (a, before) = known[-1], known[max(len(known) - 2, 0)]
        if a == b:
            return last
        ahead = min(step - b, b - a) / (b - a)
        return last + np.float32(self.share * ahead) * (last - before)


@torch.no_grad()
def denoise(transformer, options, inputs, masks, extrapolation):
    """Denoise one window; `masks` gives the tokens to recompute, one after the other."""
    latents = inputs["latents"].copy()
    embeddings = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
    reference = Reference(transformer, options, latents)
    chunks = np.split(latents, latents.shape[1] // options.causal_block_size, axis=1)
    steps, residuals, lines = options.num_inference_steps, {}, Lines(extrapolation)
    table = sampler_table(steps, options.flow_shift, options.sigma_table, options.first_sample)
    states = [init_sampler() for _ in chunks]
    for row in step_matrix(len(chunks), steps, options.ar_step).step:
        for chunk, step in enumerate(row):
            x, velocities = reference.embed(chunks[chunk]), []
            for branch, embedding in enumerate(embeddings):
                where = branch, chunk
                if step > steps:
                    every = np.ones(x.shape[1], np.bool_)
                    reference.run_blocks(x, embedding, 0, *where, every)
                elif step > 0:
                    mask = next(masks)
                    timestep = int(table.timesteps[step - 1])
                    y, time = reference.run_blocks(x, embedding, timestep, *where, mask)
                    if extrapolation is None:
                        chosen = torch.from_numpy(mask)[None, :, None]
                        residuals[where] = torch.where(chosen, y - x, residuals.get(where, 0))
                        rows = reference.head(x + residuals[where], time)
                    else:
                        rows = lines.go_on(where, step, mask, reference.head(y, time))
                    patch, shape = transformer.config.patch_size, chunks[chunk].shape
                    velocities.append(unpatchify(rows.numpy(), patch, shape))
            if velocities:
                cond, uncond = velocities
                velocity = uncond + np.float32(options.guidance_scale) * (cond - uncond)
                chunks[chunk], states[chunk] = sampler_step(
                    table, states[chunk], velocity, chunks[chunk]
                )
    return np.concatenate(chunks, axis=1)


@pytest.mark.parametrize("extrapolation", [None, 0.0, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_partial_passes_equal_those_over_kept_keys(golden, diffusers, seed, extrapolation):
    policy = RandomSubsets(seed, extrapolation)
    options = golden.options
    chunks = list(
        golden.pipeline.generate(
            options=options, decode=False, policy=policy.policy, **golden.inputs
        )
    )
    transformer = deepcopy(diffusers(golden.checkpoint).transformer)
    expected = denoise(transformer, options, golden.inputs, iter(policy.masks), extrapolation)
    latents = np.concatenate([chunk.latents for chunk in chunks], axis=1)
    assert np.abs(latents - expected).max() <= TOLERANCE
    # That reuse changes what comes out, by far more than that, shows that it took place.
    assert np.abs(latents - golden.expected["latents_uncached"]).max() > 0.05
    computed = sum((Counter(chunk.computed) for chunk in chunks), Counter())
    counted = np.array([mask.sum() for mask in policy.masks])
    tokens = len(policy.masks[0])
    assert computed["full"] == (counted == tokens).sum()
    assert computed["reuse"] == (counted == 0).sum()
    assert computed["partial"] == len(counted) - computed["full"] - computed["reuse"]
    assert computed["tokens"] == counted.sum() + computed["clean"] * tokens
