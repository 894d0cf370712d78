"""The modules of MAGI-1, filled from random checkpoints, beside the formulas in plain torch.

The formulas take the checkpoint's own layout: the text's keys and values head by head, slices of
both attentions in turn, keys repeated for the heads that share them, 1 added to the weights of
norms where they are applied.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import conv3d, gelu, layer_norm, silu

from mc_engines.errors import CheckpointError
from mc_engines.published import MAGI, published_name
from mc_export.magi_components import null_caption, transformer_components
from mc_export.magi_config import describe_transformer, transformer_tensors
from mc_export.parity import require_parity
from mc_export.random_source import RandomSource
from mc_export.tensor_source import SafetensorsSource
from mc_export.write_component import write_component

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = dict(MAGI["magi-4.5b"].transformer) | dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    caption_channels=12,
    caption_max_length=60,
    params_dtype="torch.float32",
)
SIZES = st.fixed_dictionaries(
    {
        "num_query_groups": st.sampled_from([1, 2, 4]),
        "kv_channels": st.sampled_from([8, 16, 24]),
        "gated_linear_unit": st.booleans(),
        "apply_layernorm_1p": st.booleans(),
        "layernorm_epsilon": st.sampled_from([1e-6, 1e-3]),
        "cond_hidden_ratio": st.sampled_from([0.25, 0.5]),
    }
)
FEW = settings(max_examples=12, deadline=None)


def make(**change):
    """A configuration, its random tensors, and the components made of them."""
    config = SMALL | change
    tensors = RandomSource(transformer_tensors(config), torch.float32, seed=0)
    return config, tensors, {s.name: s for s in transformer_components(config, tensors)}


def call(source, layer, *inputs):
    return functional_call(source.module, source.layers[layer](), inputs)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def distance(got, expected):
    """Largest error, relative to the largest value where that is above one."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def norm(x, config, tensors, name, plus=True):
    weight, bias = tensors.load(f"{name}.weight"), tensors.load(f"{name}.bias")
    if plus and config["apply_layernorm_1p"]:
        weight = weight + 1
    return layer_norm(x, (x.shape[-1],), weight, bias, config["layernorm_epsilon"])


def rotate(x, cos, sin):
    """Of (tokens, heads, D); the first 2 * cos.shape[1] channels."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attend(q, k, v):
    """Attention of (tokens, heads, D) with keys repeated for the heads that share them."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def layer_by_formula(config, tensors, layer, h, text, condition, cos, sin, keys, values):
    """Output (K, C), and keys and values (K, G, D); keys, values: of what is seen besides."""
    at = f"videodit_blocks.layers.{layer}."
    own = f"{at}self_attention."
    heads, size = config["num_attention_heads"], config["kv_channels"]

    def linear(x, name):
        return x @ tensors.load(f"{name}.weight").T

    u = norm(h, config, tensors, f"{own}linear_qkv.layer_norm", plus=False)
    q, qx, k, v = (
        linear(u, f"{own}linear_qkv.{part}").unflatten(-1, (-1, size))
        for part in ("q", "qx", "k", "v")
    )
    q = rotate(norm(q, config, tensors, f"{own}q_layernorm"), cos, sin)
    k = rotate(norm(k, config, tensors, f"{own}k_layernorm"), cos, sin)
    qx = norm(qx, config, tensors, f"{own}q_layernorm_xattn")
    kvx = linear(text, f"{own}linear_kv_xattn").unflatten(-1, (-1, 2 * size))
    kx, vx = kvx.chunk(2, dim=-1)
    kx = norm(kx, config, tensors, f"{own}k_layernorm_xattn")
    seen = attend(q, torch.cat([keys, k]), torch.cat([values, v]))
    read = attend(qx, kx, vx)
    width = heads * size // 8
    slices = [
        part
        for pair in zip(seen.split(width, -1), read.split(width, -1), strict=True)
        for part in pair
    ]
    a = linear(torch.cat(slices, dim=-1), f"{own}linear_proj")
    gates = linear(silu(condition), f"{at}ada_modulate_layer.proj.0")
    gate, ffn_gate = (gates + tensors.load(f"{at}ada_modulate_layer.proj.0.bias")).tanh().chunk(2)
    h = h + norm(a * gate, config, tensors, f"{at}self_attn_post_norm")
    m = linear(norm(h, config, tensors, f"{at}mlp.layer_norm", plus=False), f"{at}mlp.linear_fc1")
    if config["gated_linear_unit"]:
        first, second = m.chunk(2, dim=-1)
        m = silu(first) * second
    else:
        m = gelu(m)
    m = linear(m, f"{at}mlp.linear_fc2")
    return h + norm(m * ffn_gate, config, tensors, f"{at}mlp_post_norm"), k, v


@torch.no_grad()
@FEW
@given(sizes=SIZES, layer=st.integers(0, 1), rows=st.integers(1, 5), cached=st.integers(0, 4))
def test_a_block_equals_its_formula(sizes, layer, rows, cached):
    """With some keys in the cache and a slot that is not seen."""
    config, tensors, sources = make(**sizes)
    dim, groups, size = config["hidden_size"], config["num_query_groups"], config["kv_channels"]
    condition = draw(int(dim * config["cond_hidden_ratio"]))
    h, text = draw(rows, dim), draw(7, dim, seed=1)
    angles = draw(rows, 3 * (size // 8)) * 3
    keys, values = draw(cached, groups, size, seed=2), draw(cached, groups, size, seed=3)
    expected = layer_by_formula(
        config, tensors, layer, h, text, condition, angles.cos(), angles.sin(), keys, values
    )
    unseen = torch.full((1, groups, 1, size), 1e3)
    cache = [torch.cat([unseen, x.transpose(0, 1)[None]], dim=2) for x in (keys, values)]
    kv_map = torch.arange(1, 1 + cached + rows, dtype=torch.int32)
    cross = call(sources["context"], layer, text[None])
    y, k_new, v_new = call(
        sources["block"],
        layer,
        *(h[None], condition[None], angles.cos(), angles.sin(), *cross, *cache, kv_map),
    )
    assert distance(y[0], expected[0]) <= 1e-5
    assert distance(k_new[0].transpose(0, 1), expected[1]) <= 1e-5
    assert distance(v_new[0].transpose(0, 1), expected[2]) <= 1e-5


def to_patches(latents):
    c, f, h, w = latents.shape
    split = latents.reshape(c, f, h // 2, 2, w // 2, 2)
    return split.permute(1, 2, 4, 0, 3, 5).reshape(1, -1, 4 * c)


@torch.no_grad()
@FEW
@given(doubled=st.booleans(), scale=st.sampled_from([1, 0.1]), channels=st.integers(1, 5))
def test_embed_and_head_take_the_latents_of_the_user(doubled, scale, channels):
    inner = 2 * channels if doubled else channels
    config, tensors, sources = make(
        in_channels=inner, out_channels=inner, half_channel_vae=doubled, x_rescale_factor=scale
    )
    latents = draw(channels, 2, 4, 6)
    taken = latents * scale
    taken = torch.cat([taken, taken]) if doubled else taken
    kernel = tensors.load("x_embedder.weight")
    expected = conv3d(taken[None], kernel, stride=(1, 2, 2))[0].flatten(1).T
    x = sources["embed"].module(to_patches(latents))
    assert distance(x[0], expected) <= 1e-5

    out = draw(12, config["hidden_size"])
    rows = norm(out, config, tensors, "videodit_blocks.final_layernorm")
    rows = rows @ tensors.load("final_linear.linear.weight").T
    velocity = rows.reshape(2, 2, 3, 2, 2, inner).permute(5, 0, 1, 3, 2, 4).reshape(inner, 2, 4, 6)
    velocity = velocity[:channels] / scale
    patches = sources["head"].module(out[None])
    got = patches.reshape(2, 2, 3, 2, 2, channels).permute(5, 0, 1, 3, 2, 4)
    assert distance(got.reshape(channels, 2, 4, 6), velocity) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("distilled", [False, True])
def test_timesteps_equal_their_formula(distilled, dtype):
    """Sinusoids are rounded to the type that the configuration names."""
    _, tensors, sources = make(distill=distilled, params_dtype=f"torch.{dtype}")
    times, rows = torch.tensor([0.0, 0.3, 0.9999]), torch.tensor([1, 0, 1])
    lengths = torch.tensor([32.0, 8.0, 4.0])

    def embed(scalars):
        exponents = -math.log(10_000) * torch.arange(128) / 128
        angles = scalars[:, None] * exponents.double().exp().float() * 1000
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        hidden = waves.to(getattr(torch, dtype)).float()
        for name in ("t_embedder.mlp.0", "t_embedder.mlp.2"):
            hidden = silu(hidden) if name.endswith("2") else hidden
            hidden = hidden @ tensors.load(f"{name}.weight").T + tensors.load(f"{name}.bias")
        return hidden

    null = tensors.load("y_embedder.null_caption_embedding")[[-2, -1, -2]]
    text = null @ tensors.load("y_embedder.y_proj_adaln.0.weight").T
    expected = embed(times) + text + tensors.load("y_embedder.y_proj_adaln.0.bias")
    inputs = [times, rows]
    if distilled:
        inputs.append(lengths)
        expected = expected + embed(lengths)
    assert ("distill" in sources["timestep"].inputs) == distilled
    assert distance(sources["timestep"].module(*inputs), expected) <= 1e-6


@torch.no_grad()
def test_text_and_motion_equal_their_formulas():
    _, tensors, sources = make()
    caption = draw(5, 12)
    text = caption @ tensors.load("y_embedder.y_proj_xattn.0.weight").T
    text = silu(text + tensors.load("y_embedder.y_proj_xattn.0.bias"))
    assert distance(sources["text_projection"].module(caption[None])[0], text) <= 1e-6
    latents, previous = draw(16, 3, 4, 6), draw(16, 1, 4, 6, seed=1)
    frames = torch.cat([previous, latents], dim=1)
    change = (frames[:, 1:] - frames[:, :-1]).abs()
    expected = change.reshape(16, 3, 2, 2, 3, 2).mean((0, 3, 5)).flatten(1)
    rows = to_patches(latents).reshape(1, 3, 6, 64)
    assert distance(sources["motion"].module(rows, to_patches(previous)), expected) <= 1e-6


def test_the_null_caption_ends_where_it_is_no_longer_seen():
    config, tensors, _ = make()
    null = tensors.load("y_embedder.null_caption_embedding")
    assert torch.equal(null_caption(config, tensors)["embedding"], null[:50])
    short, tensors, _ = make(caption_max_length=20)
    assert null_caption(short, tensors)["embedding"].shape == (20, 12)


# ---- names, sizes, types


@pytest.mark.parametrize(
    ("name", "weights"), [("magi-a", "inference_weight.distill"), ("magi-b", "inference_weight")]
)
def test_names_and_shapes_are_those_of_the_original_code(name, weights):
    source = SafetensorsSource(GOLDEN / name / weights)
    config = SMALL | dict(hidden_size=128, ffn_hidden_size=256, kv_channels=32)
    config |= dict(caption_channels=32, caption_max_length=64)
    config |= dict.fromkeys(("in_channels", "out_channels"), 8 if name == "magi-a" else 16)
    expected = {key: source.shape(key) for key in source.names()}
    assert transformer_tensors(config) == expected


@pytest.mark.parametrize(("name", "billions"), [("magi-4.5b", 4.44), ("magi-24b-distill", 23.86)])
def test_blocks_have_the_known_parameters(name, billions):
    shapes = transformer_tensors(MAGI[name].transformer)
    blocks = [shape for key, shape in shapes.items() if ".layers." in key]
    assert sum(map(math.prod, blocks)) / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("name", MAGI)
def test_published_configurations_are_found_and_described(name):
    config = MAGI[name].transformer
    assert published_name(config) == name
    source = RandomSource({"rope.bands": (16,)}, torch.float32, seed=0)
    described = describe_transformer(config, source)
    large, distilled = name.startswith("magi-24b"), name.endswith("distill")
    assert described.pop("rope_bands") == source.load("rope.bands").tolist()
    assert described == {
        "layers": 48 if large else 34,
        "dim": 6144 if large else 3072,
        "heads": 48 if large else 24,
        "key_heads": 8,
        "head_dim": 128,
        "ffn_dim": 16384 if large else 12288,
        "gated_ffn": large,
        "text_projection_layers": 1,
        "text_dim": 4096,
        "max_text_tokens": 800,
        "condition_dim": 1536 if large else 768,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "norm_eps": 1e-6,
        "distilled": distilled,
        "key_layout": "half_split",
        "token_buckets": [0.1, 0.25, 0.5, 0.75, 1.0],
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_name": "other"}, "expected model_name videodit_ardf, got other. Use a"),
        ({"t_patch_size": 2}, "expected t_patch_size 1, got 2. Use a MAGI-1 checkpoint."),
        ({"cond_gating_ratio": 0.5}, "expected cond_gating_ratio 1.0, got 0.5. "),
        ({"out_channels": 8}, "expected sizes of a MAGI-1 model, got out_channels 8. "),
        ({"num_query_groups": 3}, "expected sizes of a MAGI-1 model, got num_query_groups 3. "),
        ({"kv_channels": 12}, "expected sizes of a MAGI-1 model, got kv_channels 12. "),
        ({"params_dtype": "int8"}, "expected sizes of a MAGI-1 model, got params_dtype int8. "),
    ],
)
def test_other_models_are_refused(change, problem):
    for entry in (
        transformer_tensors,
        lambda config: next(transformer_components(config, RandomSource({}, torch.float32, 0))),
    ):
        with pytest.raises(CheckpointError) as error:
            entry(SMALL | change)
        assert str(error.value).startswith(f"transformer: {problem}")


class Recorder(RandomSource):
    """Random tensors, and the names of those that were loaded."""

    def __init__(self, config):
        super().__init__(transformer_tensors(config), torch.bfloat16, seed=0)
        self.loaded = []

    def load(self, name):
        self.loaded.append(name)
        return super().load(name)


def test_tensors_are_loaded_when_asked_for_and_layers_keep_their_type():
    """But for the weights of norms that 1 was added to: the sum is float32."""
    tensors = Recorder(SMALL)
    components = transformer_components(SMALL, tensors)
    assert next(components).name == "text_projection"
    assert all(name.startswith("y_embedder.y_proj_xattn.") for name in tensors.loaded)
    others = {source.name: source for source in components}
    assert not any(".layers." in name for name in tensors.loaded)
    for name in ("context", "block"):
        parameters = dict(others[name].module.named_parameters())
        for layer, load in enumerate(others[name].layers):
            tensors.loaded.clear()
            weights = load()
            at = f"videodit_blocks.layers.{layer}."
            assert all(key.startswith(at) for key in tensors.loaded)
            assert {key: w.shape for key, w in weights.items()} == {
                key: parameter.shape for key, parameter in parameters.items()
            }
            wide = {key for key, weight in weights.items() if weight.dtype == torch.float32}
            assert wide == {
                key
                for key in weights
                if key.endswith("norm.weight") and key not in ("norm.weight", "ffn_norm.weight")
            }
            assert {weights[key].dtype for key in weights.keys() - wide} == {torch.bfloat16}


def test_placeholders_of_layers_take_no_memory():
    for name in ("context", "block"):
        for key, parameter in make()[2][name].module.named_parameters():
            assert parameter.untyped_storage().nbytes() == 4, key


def test_every_export_is_proved_on_the_same_inputs():
    once, again = ({name: s.inputs for name, s in make()[2].items()} for _ in range(2))
    for name, inputs in once.items():
        for key, value in inputs.items():
            np.testing.assert_array_equal(value, again[name][key], f"{name}: {key}")


# ---- graphs


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("block", dict(gated_linear_unit=True, num_attention_heads=6, apply_layernorm_1p=False)),
        ("timestep", dict(params_dtype="torch.bfloat16", distill=True)),
    ],
)
def test_graphs_of_what_the_golden_cases_lack_equal_their_modules(tmp_path, component, change):
    """Six heads that share two of keys, a gated feed-forward; sinusoids that are rounded."""
    _, _, sources = make(**change)
    _, rows = write_component(sources[component], tmp_path, None, "fp32")
    require_parity(rows)
    expected = {"fp32", "fp16", "bf16", "fp32-mha"} if component == "block" else {"fp32"}
    assert {row.form for row in rows} == expected
    assert not any(row.own_error for row in rows)
