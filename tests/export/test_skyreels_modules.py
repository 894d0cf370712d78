"""The transformer's modules, filled from a saved model, beside diffusers' own on that model."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from mc_engines.errors import CheckpointError
from mc_engines.published import PUBLISHED
from mc_export.checkpoint import load_checkpoint
from mc_export.random_source import RandomSource
from mc_export.skyreels import Combine, Motion, Rotate
from mc_export.skyreels_components import (
    describe_transformer,
    transformer_components,
    transformer_tensors,
)

SMALL = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    ffn_dim=48,
    num_layers=2,
    text_dim=20,
    freq_dim=32,
    inject_sample_info=True,
    rope_max_seq_len=64,
)
SIZES = st.fixed_dictionaries(
    dict(
        num_attention_heads=st.integers(1, 4),
        attention_head_dim=st.sampled_from([8, 12, 16, 24, 32]),
        ffn_dim=st.sampled_from([24, 40, 100]),
        text_dim=st.sampled_from([12, 20]),
        eps=st.sampled_from([1e-6, 1e-3]),
        inject_sample_info=st.booleans(),
    )
)
FEW = settings(max_examples=12, deadline=None)
# A chunk of these tests: 2 latent frames of 4x6 latents.
FRAMES, POSITIONS = 2, 6
LENGTH = FRAMES * POSITIONS


@torch.no_grad()
def make(**change):
    """diffusers' model, and our components as they come out of the files that it saves."""
    torch.manual_seed(0)
    model = SkyReelsV2Transformer3DModel(**SMALL | change).eval()
    for parameter in model.parameters():  # norms start at one, biases at zero
        parameter.add_(torch.randn_like(parameter) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "transformer")
        part = load_checkpoint(Path(folder)).transformer
        return model, {s.name: s for s in transformer_components(part.config, part.tensors)}


def call(source, layer, *inputs):
    """A component with the weights of one of its layers."""
    return functional_call(source.module, source.layers[layer](), inputs)


def distance(got, expected):
    """Largest error, relative to the largest value where that is above one."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


class Cache:
    """Keys and values of two chunks, and a block that fills them; what is unwritten is rubbish."""

    def __init__(self, model, sources, layer, text):
        self.source, self.layer = sources["block"], layer
        self.cross = call(sources["context"], layer, text)
        size = 1, model.config.num_attention_heads, 2 * LENGTH, model.config.attention_head_dim
        self.k, self.v = torch.full(size, 1e3), torch.full(size, 1e3)
        grid = torch.empty(1, 16, 2 * FRAMES, 4, 6)
        cos, sin = (part[0, :, 0] for part in model.rope(grid))
        self.cos, self.sin = cos[:, ::2], sin[:, ::2]

    def run(self, tokens, x, modulation, visible):
        """Compute some tokens; padding rows, whose token is -1, are never named in the map."""
        slots = self.k.shape[2]
        rows = {int(token): slots + row for row, token in enumerate(tokens) if token >= 0}
        kv_map = torch.tensor([rows.get(s, s) for s in range(visible)], dtype=torch.int32)
        frame_ids = (tokens % LENGTH // POSITIONS).to(torch.int32)
        rope = self.cos[tokens], self.sin[tokens]
        inputs = x, frame_ids, modulation, *rope, *self.cross, self.k, self.v, kv_map
        y, k_new, v_new = call(self.source, self.layer, *inputs)
        real = tokens >= 0
        self.k[:, :, tokens[real]] = k_new[:, :, real]
        self.v[:, :, tokens[real]] = v_new[:, :, real]
        return y[:, real]


def attend_with_diffusers(model, layer, text, parts, sees):
    """diffusers' block over all parts at once, each of them tokens, x and modulation.

    `sees[i][j]` says which tokens of part j the tokens of part i see.
    """
    tokens = torch.cat([part[0] for part in parts])
    x = torch.cat([part[1] for part in parts], dim=1)
    modulation = torch.cat([m[t % LENGTH // POSITIONS] for t, _, m in parts])
    rope = [part[:, tokens] for part in model.rope(torch.empty(1, 16, 2 * FRAMES, 4, 6))]
    rows = zip(parts, sees, strict=True)
    mask = torch.cat([torch.cat(row, dim=1).expand(len(part[0]), -1) for part, row in rows])
    block = model.blocks[layer]
    y = block(x, text, modulation.transpose(0, 1)[None], rope, mask[None, None])
    return y.split([len(part[0]) for part in parts], dim=1)


@torch.no_grad()
@FEW
@given(
    sizes=SIZES,
    layer=st.integers(0, 1),
    chosen=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH).filter(any),
    padding=st.integers(0, 3),
)
def test_full_and_partial_passes_equal_diffusers_block(sizes, layer, chosen, padding):
    """A chunk, the next, and again some tokens of it on new inputs, the others' keys being stale.

    diffusers computes all three at once: the stale tokens and the new ones side by side, masked.
    """
    model, sources = make(**sizes)
    channels = model.proj_out.in_features
    chosen = torch.tensor(chosen)
    first, second = torch.arange(LENGTH), torch.arange(LENGTH, 2 * LENGTH)
    parts = [
        (tokens, torch.randn(1, len(tokens), channels), torch.randn(FRAMES, 6, channels) * 0.3)
        for tokens in (first, second, second[chosen])
    ]
    text = torch.randn(1, 5, channels)
    all_, none = torch.ones(1, LENGTH, dtype=bool), torch.zeros(1, LENGTH, dtype=bool)
    new = torch.ones(1, int(chosen.sum()), dtype=bool)
    sees = [[all_, none, ~new], [all_, all_, ~new], [all_, ~chosen[None], new]]
    expected = attend_with_diffusers(model, layer, text, parts, sees)

    cache = Cache(model, sources, layer, text)
    assert distance(cache.run(*parts[0], LENGTH), expected[0]) <= 1e-5
    assert distance(cache.run(*parts[1], 2 * LENGTH), expected[1]) <= 1e-5
    tokens, x, modulation = parts[2]
    tokens = torch.cat([tokens, torch.full((padding,), -1)])
    x = torch.cat([x, torch.full((1, padding, channels), 1e3)], dim=1)
    assert distance(cache.run(tokens, x, modulation, 2 * LENGTH), expected[2]) <= 1e-5


def test_rotary_pairs_are_moved_exactly():
    model, sources = make()
    heads, size = 2, 16
    order = [
        head * size + 2 * pair + odd
        for head in range(heads)
        for odd in (0, 1)
        for pair in range(size // 2)
    ]
    for layer, block in enumerate(model.blocks):
        weights, attention = sources["block"].layers[layer](), block.attn1
        q, k, v = weights["qkv.weight"].split(heads * size, dim=1)
        bias = weights["qkv.bias"].split(heads * size)
        assert torch.equal(q, attention.to_q.weight.T[:, order])
        assert torch.equal(k, attention.to_k.weight.T[:, order])
        assert torch.equal(v, attention.to_v.weight.T)
        assert torch.equal(bias[0], attention.to_q.bias[order])
        assert torch.equal(weights["q_norm.weight"], attention.norm_q.weight[order])
        assert torch.equal(weights["k_norm.weight"], attention.norm_k.weight[order])
        assert torch.equal(weights["cross_q.weight"], block.attn2.to_q.weight.T)
    x, angles = torch.randn(1, 1, 7, size), torch.rand(7, size // 2) * 6
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(1), angles)
    got = Rotate()(x[..., order[:size]], angles.cos(), angles.sin())
    assert distance(got, torch.cat([pairs.real, pairs.imag], dim=-1)) <= 1e-6


@torch.no_grad()
@FEW
@given(sizes=SIZES, fps=st.integers(0, 1))
def test_timestep_equals_the_condition_embedder(sizes, fps):
    model, sources = make(**sizes)
    steps = torch.tensor([999, 998, 751, 500, 33, 1, 0])
    embedder, text = model.condition_embedder, torch.zeros(1, 1, model.config.text_dim)
    head_modulation, modulation, *_ = embedder(steps, text)
    if model.config.inject_sample_info:
        modulation = modulation + model.fps_projection(model.fps_embedding(torch.tensor([fps])))
    module = sources["timestep"].module
    got = module(steps, torch.tensor([fps])) if sizes["inject_sample_info"] else module(steps)
    assert distance(got[0], modulation.unflatten(1, (6, -1))) <= 1e-6
    assert distance(got[1], head_modulation) <= 1e-6


@torch.no_grad()
@FEW
@given(sizes=SIZES)
def test_text_projection_equals_the_condition_embedder(sizes):
    model, sources = make(**sizes)
    embedding = torch.randn(1, 9, model.config.text_dim)
    expected = model.condition_embedder.text_embedder(embedding)
    assert distance(sources["text_projection"].module(embedding), expected) <= 1e-6


@torch.no_grad()
@FEW
@given(sizes=SIZES, patch=st.sampled_from([(1, 2, 2), (1, 1, 2)]), channels=st.integers(3, 5))
def test_embed_and_head_equal_a_model_without_blocks(sizes, patch, channels):
    change = dict(num_layers=0, patch_size=patch, in_channels=channels, out_channels=channels + 1)
    model, sources = make(**sizes | change)
    latents, steps = torch.randn(1, channels, 3, 4, 6), torch.tensor([700, 40, 0])
    text = torch.randn(1, 2, model.config.text_dim)
    forcing = dict(enable_diffusion_forcing=True, return_dict=False, fps=[1])
    (expected,) = model(latents, steps[None], text, **forcing)

    _, high, wide = patch
    places = [
        (slice(None), frame, slice(row, row + high), slice(column, column + wide))
        for frame in range(3)
        for row in range(0, 4, high)
        for column in range(0, 6, wide)
    ]
    patches = torch.stack([latents[0][place].flatten() for place in places])
    modules = {name: source.module for name, source in sources.items()}
    fps = [torch.tensor([1])] if sizes["inject_sample_info"] else []
    _, head_modulation = modules["timestep"](steps, *fps)
    frame_ids = torch.tensor([place[1] for place in places], dtype=torch.int32)
    rows = modules["head"](modules["embed"](patches[None]), frame_ids, head_modulation)[0]
    velocity = torch.empty_like(expected[0])
    for place, row in zip(places, rows, strict=True):
        velocity[place] = row.view(high, wide, -1).permute(2, 0, 1)
    assert distance(velocity, expected[0]) <= 1e-5


@FEW
@given(frames=st.integers(1, 4), positions=st.integers(1, 5), channels=st.integers(1, 9))
def test_motion_equals_its_formula(frames, positions, channels):
    draw = np.random.default_rng(frames)
    out = draw.normal(size=(1, frames, positions, channels)).astype(np.float32)
    previous = draw.normal(size=(1, positions, channels)).astype(np.float32)
    previous[0, 0] = 0  # where the epsilon decides
    got = Motion()(torch.from_numpy(out), torch.from_numpy(previous)).numpy()
    assert got.shape == (frames, positions)
    for f in range(frames):
        for p in range(positions):
            before = previous[0, p] if f == 0 else out[0, f - 1, p]
            change = sum(
                abs(float(a) - float(b)) for a, b in zip(out[0, f, p], before, strict=True)
            )
            size = sum(abs(float(b)) for b in before)
            expected = (change / channels) / (size / channels + 1e-8)
            assert got[f, p] == pytest.approx(expected, rel=1e-5)


@FEW
@given(recomputed=st.permutations(range(6)), count=st.integers(0, 6), channels=st.integers(1, 5))
def test_combine_equals_its_formula(recomputed, count, channels):
    rows = recomputed[:count]  # in any order
    draw = np.random.default_rng(count)
    x, residual = (draw.normal(size=(1, 6, channels)).astype(np.float32) for _ in range(2))
    y = draw.normal(size=(1, count, channels)).astype(np.float32)
    row_map = [6 + rows.index(token) if token in rows else token for token in range(6)]
    maps = (torch.tensor(ids, dtype=torch.int32) for ids in (rows, row_map))
    out, fresh = Combine()(*map(torch.from_numpy, (x, residual, y)), *maps)
    for token in range(6):
        if token in rows:
            expected = y[0, rows.index(token)]
            expected_residual = expected - x[0, token]
        else:
            expected = x[0, token] + residual[0, token]
            expected_residual = residual[0, token]
        np.testing.assert_array_equal(out[0, token], expected)
        np.testing.assert_array_equal(fresh[0, token], expected_residual)


def meta(config):
    with torch.device("meta"):
        return SkyReelsV2Transformer3DModel(**config)


def assert_same_tensors(config):
    expected = {name: tuple(tensor.shape) for name, tensor in meta(config).state_dict().items()}
    assert transformer_tensors(config) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_models(name):
    assert_same_tensors(dict(PUBLISHED[name].transformer))


@FEW
@given(sizes=SIZES, layers=st.integers(0, 3), channels=st.integers(1, 20))
def test_names_and_shapes_are_those_of_any_model(sizes, layers, channels):
    change = dict(num_layers=layers, in_channels=channels, out_channels=channels + 1)
    config = dict(meta(SMALL | sizes | change).config)
    assert_same_tensors({key: config[key] for key in PUBLISHED["skyreels-df-14b-540p"].transformer})


def test_the_manifest_says_what_a_program_must_know():
    assert describe_transformer(PUBLISHED["skyreels-df-1.3b-540p"].transformer) == {
        "layers": 30,
        "dim": 1536,
        "heads": 12,
        "head_dim": 128,
        "ffn_dim": 8960,
        "text_dim": 4096,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "fps_embedding": True,
        "rope_theta": 10000.0,
        "rope_axes": [44, 42, 42],
        "rope_max_positions": 1024,
        "key_layout": "half_split",
        "token_buckets": [0.25, 0.4, 0.5, 0.75, 1.0],
    }
    assert not describe_transformer(PUBLISHED["skyreels-df-14b-540p"].transformer)["fps_embedding"]


@pytest.mark.parametrize("size", [8, 12, 16, 24, 32, 64, 80, 128])
def test_rotary_axes_are_those_of_diffusers(size):
    config = dict(PUBLISHED["skyreels-df-1.3b-540p"].transformer) | {
        "attention_head_dim": size,
        "num_layers": 0,
    }
    rope = meta(config).rope
    assert describe_transformer(config)["rope_axes"] == [rope.t_dim, rope.h_dim, rope.w_dim]


class Recorder(RandomSource):
    """Random tensors, and the names of those that were loaded."""

    def __init__(self, config):
        super().__init__(transformer_tensors(config), torch.bfloat16, seed=0)
        self.loaded = []

    def load(self, name):
        self.loaded.append(name)
        return super().load(name)


def test_tensors_are_loaded_when_asked_for_and_layers_keep_their_type():
    config = dict(PUBLISHED["skyreels-df-1.3b-540p"].transformer) | SMALL
    tensors = Recorder(config)
    components = transformer_components(config, tensors)
    assert next(components).name == "text_projection"
    assert all(name.startswith("condition_embedder.text_embedder.") for name in tensors.loaded)
    others = {source.name: source for source in components}
    assert list(others) == ["context", "timestep", "embed", "block", "head", "motion", "combine"]
    assert not any(name.startswith("blocks.") for name in tensors.loaded)
    for name in ("context", "block"):
        parameters = dict(others[name].module.named_parameters())
        for layer, load in enumerate(others[name].layers):
            tensors.loaded.clear()
            weights = load()
            assert all(name.startswith(f"blocks.{layer}.") for name in tensors.loaded)
            assert {name: w.shape for name, w in weights.items()} == {
                name: parameter.shape for name, parameter in parameters.items()
            }
            assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_patch_of_several_frames_is_refused():
    config = dict(PUBLISHED["skyreels-df-1.3b-540p"].transformer) | {"patch_size": [2, 2, 2]}
    for entry in (transformer_tensors, describe_transformer):
        with pytest.raises(CheckpointError) as error:
            entry(config)
        assert str(error.value) == (
            "transformer: expected a patch of one latent frame, got patch_size (2, 2, 2). "
            "Use a SkyReels-V2 diffusion-forcing checkpoint."
        )


def test_every_export_is_proved_on_the_same_inputs():
    """So that the parity report, and with it the bundle's hash, is the same again."""
    config = PUBLISHED["skyreels-df-1.3b-540p"].transformer | SMALL
    tensors = RandomSource(transformer_tensors(config), torch.float32, seed=0)
    once, again = (
        {source.name: source.inputs for source in transformer_components(config, tensors)}
        for _ in range(2)
    )
    for name, inputs in once.items():
        for key, value in inputs.items():
            assert torch.equal(value, again[name][key]), f"{name}: {key}"
    block = once["block"]
    assert not torch.equal(block["k_cache"], block["v_cache"])
    assert not torch.equal(block["cross_k"], block["cross_v"])
