"""The size plan, against published figures, measurements, and the components themselves."""

import math
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from mc_engines.decoder_tape import DecoderShape
from mc_engines.host_sizes import hold_decoder
from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE
from mc_export.component import ComponentSource
from mc_export.random_source import RandomSource
from mc_export.size_plan import SizePlan, plan_sizes
from mc_export.size_table import render_plan
from mc_export.skyreels_components import transformer_components, transformer_tensors
from mc_export.t5 import text_encoder_components, text_encoder_tensors
from mc_export.wan_vae_components import vae_components, vae_tensors

GB = 1e9
SMALL, LARGE = "skyreels-df-1.3b-540p", "skyreels-df-14b-540p"
SIZES = {"540P": (544, 960), "720P": (720, 1280)}
TINY = {
    "transformer": dict(PUBLISHED[SMALL].transformer)
    | {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 20, "num_layers": 3}
    | {"text_dim": 8, "freq_dim": 8},
    "text_encoder": dict(UMT5_XXL)
    | {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 2, "vocab_size": 30},
    "vae": dict(WAN21_VAE) | {"base_dim": 4},
}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@cache
def real_parts(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        text = shapes_of(UMT5EncoderModel(UMT5Config(**UMT5_XXL)))
        del text["encoder.embed_tokens.weight"]  # the same table as shared.weight
        return {
            "transformer": shapes_of(SkyReelsV2Transformer3DModel(**PUBLISHED[name].transformer)),
            "text_encoder": text,
            "vae": shapes_of(AutoencoderKLWan(**WAN21_VAE)),
        }


def plan(name: str, size: str = "540P", parts: dict | None = None, **changes) -> SizePlan:
    height, width = SIZES[size]
    wanted = {"dtype": torch.bfloat16, "height": height, "width": width}
    wanted |= {"base_num_frames": 97, "chunk": 5} | changes
    return plan_sizes(PUBLISHED[name].transformer, parts or real_parts(name), **wanted)


# MotionCache's and FlowCache's accounts of SkyReels-V2 name these sizes, at 25 latent frames.
@pytest.mark.parametrize(
    ("name", "size", "kv", "residual"),
    [
        (SMALL, "540P", 9.40, 0.31),
        (SMALL, "720P", 16.6, 0.55),
        (LARGE, "540P", 41.8, 1.04),
        (LARGE, "720P", 73.7, 1.84),
    ],
)
def test_caches_have_the_known_sizes(name: str, size: str, kv: float, residual: float) -> None:
    got = plan(name, size)
    assert got.device.kv_per_branch / GB == pytest.approx(kv, rel=0.004)
    assert got.device.kv == 2 * got.device.kv_per_branch
    assert got.device.residual / GB == pytest.approx(residual, rel=0.015)
    assert got.cpu.kv == 2 * got.device.kv


@pytest.mark.parametrize(("name", "billions"), [(SMALL, 1.39), (LARGE, 14.05)])
def test_blocks_have_the_known_parameters(name: str, billions: float) -> None:
    counts = {component.name: component.parameters for component in plan(name).components}
    assert (counts["block"] + counts["context"]) / 1e9 == pytest.approx(billions, rel=0.003)


def test_tokens_of_a_540p_chunk_and_window() -> None:
    assert (plan(SMALL).chunk_tokens, plan(SMALL).window_tokens) == (10_200, 51_000)


def test_passes_hold_what_was_measured_in_onnx_runtime() -> None:
    """DF-1.3B's 30 layers, first chunk at 540P: 12.9 GB with weights, keys of one branch, inputs.

    Measured by `scripts/real_sizes.py`; 0.2 GB are the process and the weights inside graphs.
    """
    first = plan(SMALL, base_num_frames=17).cpu
    assert first.pass_plain == 0  # 5 GB of scores are never written
    held = first.kv_per_branch + first.weights + first.pass_fused + 0.2 * GB
    assert held / GB == pytest.approx(12.9, rel=0.1)
    cpu = plan(SMALL).cpu
    assert cpu.scores == 12 * 10_200 * 51_000 * 4
    held = cpu.kv + cpu.context + cpu.residual + cpu.weights
    assert cpu.peak == held + cpu.pass_fused + cpu.decode


def test_small_passes_are_planned_with_the_plain_attention() -> None:
    alone = {"transformer": real_parts(SMALL)["transformer"]}
    cpu = plan(SMALL, parts=alone, height=128, width=128).cpu
    assert cpu.scores < 256e6 and cpu.decode == cpu.pass_fused == 0
    assert cpu.scores < cpu.pass_plain
    assert cpu.peak == cpu.kv + cpu.context + cpu.residual + cpu.weights + cpu.pass_plain


def test_the_decoder_is_read_off_its_tensors() -> None:
    """The whole of Wan's, against a plan of a decoder that its configuration describes."""
    sizes = hold_decoder(DecoderShape.from_config(WAN21_VAE), 16, 16, 25, frames=20)
    assert plan(SMALL, height=128, width=128).cpu.decode == sizes.arenas


def test_float32_weights_are_used_where_they_are_mapped() -> None:
    assert plan(SMALL, dtype=torch.float32).cpu.weights == 0
    assert plan(SMALL).cpu.weights == 4 * 1_251_525_120
    one_layer = next(c for c in plan(LARGE).components if c.name == "block").parameters // 40
    assert plan(LARGE).cpu.weights == 4 * one_layer


def parameters(source: ComponentSource) -> int:
    if source.layers:
        return sum(tensor.numel() for layer in source.layers for tensor in layer().values())
    return sum(parameter.numel() for parameter in source.module.parameters())


def test_components_hold_what_the_adapters_give_them() -> None:
    shapes = {
        "transformer": transformer_tensors(TINY["transformer"]),
        "text_encoder": text_encoder_tensors(TINY["text_encoder"]),
        "vae": vae_tensors(TINY["vae"]),
    }
    sources = {part: RandomSource(shapes[part], torch.float32, 0) for part in shapes}
    made = [
        *transformer_components(TINY["transformer"], sources["transformer"]),
        *text_encoder_components(TINY["text_encoder"], sources["text_encoder"]),
        *vae_components(TINY["vae"], sources["vae"]),
    ]
    expected = {source.name: (max(1, len(source.layers)), parameters(source)) for source in made}
    expected = {name: size for name, size in expected.items() if size[1]}
    got = plan_sizes(
        TINY["transformer"],
        shapes,
        dtype=torch.float16,
        height=16,
        width=16,
        base_num_frames=17,
        chunk=5,
    ).components
    table = next(component for component in got if component.name == "text_embedding")
    assert table.parameters == 30 * 8
    assert {c.name: (c.layers, c.parameters) for c in got if c is not table} == expected
    assert all(component.bytes == 2 * component.parameters for component in got)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_tensor_is_counted_once(part: str, dtype: torch.dtype) -> None:
    shapes = real_parts(SMALL)[part]
    expected = dtype.itemsize * sum(map(math.prod, shapes.values()))
    assert plan(SMALL, parts={part: shapes}, dtype=dtype).bundle == expected


def test_the_largest_layer_decides_the_exports_peak() -> None:
    """A block without cross-attention's k and v: once in bfloat16, twice in float32."""
    layer = 6 * 5120**2 + 2 * 5120 * 13824
    assert plan(LARGE).export_peak / GB == pytest.approx(layer * 10 / GB + 0.31, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 540}, "height: expected a multiple of 16, got 540. Use 528 or 544."),
        ({"width": 8}, "width: expected a multiple of 16, got 8. Use 16."),
        (
            {"base_num_frames": 121},
            "base_num_frames: expected whole chunks of 5 latent frames, got 121. Use 117 or 137.",
        ),
        (
            {"base_num_frames": 98},
            "base_num_frames: expected whole chunks of 5 latent frames, got 98. Use 97 or 117.",
        ),
        (
            {"base_num_frames": 1},
            "base_num_frames: expected whole chunks of 5 latent frames, got 1. Use 17.",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(SMALL, **changes)
    assert str(caught.value) == message


def test_the_table_names_components_and_totals() -> None:
    lines = render_plan(plan(SMALL)).splitlines()
    cells = {line.rsplit(None, 3)[0].strip(): line.split()[-3:] for line in lines if line}
    assert cells["block"] == ["30", "1,251,525,120", "2.503"]
    rows = {line[:40].strip(): line[40:].split() for line in lines}
    assert rows["KV cache, one branch"] == ["18.801", "9.400"]
    assert "544 x 960 pixels, 97 frames a window, 10,200 tokens a chunk, 51,000 a window" in lines
    assert max(map(len, lines)) <= 100
