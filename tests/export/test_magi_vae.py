"""MAGI-1's autoencoder beside plain torch: its modules, driven by the runtime in tiles."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from magi_parts import draw_vae, vae_config, write_vae
from magi_vit import Vit, code_in_tiles

from mc_engines.errors import CheckpointError
from mc_export.checkpoint import check_tensors
from mc_export.export_bundle import count_steps
from mc_export.magi_checkpoint import load_magi_checkpoint
from mc_export.magi_family import MAGI_FAMILY
from mc_export.magi_vae_components import (
    describe_vae,
    vae_components,
    vae_positions,
    vae_tensors,
)
from mc_runtime.tiled_vae import open_decoder, open_encoder, resize_grid
from mc_runtime.vae import VaeParts

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4
SCALE = 0.18215
SIZES = dict(
    patch_size=2, patch_length=2, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, z_chans=3,
    video_size=12, video_length=4,
)  # fmt: skip
TILE = (2, 8, 8)


class DictSource:
    """A checkpoint in memory."""

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return frozenset(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def load(self, name):
        return self.tensors[name]


class ModuleRunner:
    """Runs the module behind a graph."""

    def __init__(self, source):
        self.module, self.output = source.module, source.outputs[0]

    def run(self, inputs, weights=None):
        given, held = (
            {k: torch.tensor(v) for k, v in (x or {}).items()} for x in (inputs, weights)
        )
        with torch.no_grad():
            module = torch.func.functional_call(self.module, held, (), given)
            return {self.output: module.numpy()}


class Case:
    """A small autoencoder at random, and the same one in plain torch."""

    def __init__(self):
        self.config = vae_config(**SIZES)
        self.tensors = draw_vae(self.config)
        source = DictSource(self.tensors)
        sources = {s.name: s for s in vae_components(self.config, source)}
        described = describe_vae(self.config, SCALE, 4) | {"tile": TILE, "overlap": 2}
        parts = VaeParts(
            described,
            lambda name, form: ModuleRunner(sources[name]),
            lambda name, layer: {k: v.numpy() for k, v in sources[name].layers[layer]().items()},
            lambda file: {k: v.numpy() for k, v in vae_positions(source).items()},
        )
        self.decoder, self.encoder = open_decoder(parts), open_encoder(parts)

    def draw(self, frames, height, width):
        draw = np.random.default_rng(frames * height + width)
        return draw.standard_normal((3, frames, height, width), np.float32)

    @torch.no_grad()
    def expected(self, latents):
        vit = Vit(self.config, self.tensors, "decoder")
        values = torch.from_numpy(latents) / SCALE
        video = code_in_tiles(vit.decode, values, TILE, 2, "original")
        return video.clamp(-1, 1).permute(1, 2, 3, 0).numpy()

    @torch.no_grad()
    def expected_latents(self, frames):
        vit = Vit(self.config, self.tensors, "encoder")
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
        return code_in_tiles(vit.encode, pixels, (4, 16, 16), 0.5, "blended").numpy() * SCALE


@pytest.fixture(scope="module")
def case():
    return Case()


# One tile, one that is smaller than positions were learnt for, several, and ends that are short.
EXTENTS = [(2, 6, 6), (4, 3, 5), (4, 8, 8), (3, 13, 7), (2, 14, 19)]


@pytest.mark.parametrize("extent", EXTENTS)
def test_decoding_equals_plain_torch(case, extent):
    latents = case.draw(*extent) * np.float32(SCALE)
    got, state = case.decoder.decode(latents)
    expected = case.expected(latents)
    assert (got.dtype, got.shape) == (np.float32, expected.shape)
    assert np.abs(got - expected).max() <= TOLERANCE
    assert not state.tensors


def test_chunks_are_decoded_by_themselves(case):
    latents = case.draw(8, 10, 9) * np.float32(SCALE)
    whole, state = case.decoder.decode(latents)
    first, state = case.decoder.decode(latents[:, :4], state)
    second, _ = case.decoder.decode(latents[:, 4:], state)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)


@pytest.mark.parametrize("extent", EXTENTS)
def test_encoding_equals_plain_torch(case, extent):
    sizes = [2 * size for size in extent]
    frames = np.random.default_rng(0).integers(0, 256, (*sizes, 3), np.uint8)
    got, expected = case.encoder.encode(frames), case.expected_latents(frames)
    assert (got.dtype, got.shape) == (np.float32, expected.shape)
    assert np.abs(got - expected).max() <= TOLERANCE


@settings(deadline=None, max_examples=50)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_positions_are_resized_as_torch_interpolates(grid, sizes):
    values = np.random.default_rng(0).standard_normal((*grid, 2), np.float32)
    cells = torch.from_numpy(values).permute(3, 0, 1, 2)[None]
    expected = F.interpolate(cells, size=sizes, mode="trilinear", align_corners=False)
    got = resize_grid(values, sizes)
    np.testing.assert_allclose(got, expected[0].permute(1, 2, 3, 0).numpy(), atol=1e-5)


def test_what_does_not_fit_is_refused(case):
    with pytest.raises(ValueError) as error:
        case.decoder.decode(np.zeros((4, 2, 6, 6), np.float32))
    assert str(error.value) == (
        "latents: expected float32 (3, F, h, w), got float32 (4, 2, 6, 6). "
        "Give latents as the transformer knows them."
    )
    for shape in ((3, 4, 4, 3), (2, 5, 4, 3), (0, 4, 4, 3), (2, 4, 4)):
        with pytest.raises(ValueError) as error:
            case.encoder.encode(np.zeros(shape, np.uint8))
        assert str(error.value) == (
            "video: expected uint8 (n, height, width, 3), n a multiple of 2, height and width of "
            f"2, got uint8 {shape}. Crop the video."
        )


# ---- the checkpoint


def test_every_tensor_of_the_original_is_asked_for():
    config = vae_config()
    drawn = draw_vae(vae_config(**SIZES))
    expected = vae_tensors(vae_config(**SIZES))
    assert expected == {name: tuple(tensor.shape) for name, tensor in drawn.items()}
    assert len(vae_tensors(config)) == 2 * (24 * 10 + 2 + 2 + 4)
    assert vae_tensors(config)["decoder.last_layer.weight"] == (3, 4, 3, 3, 3)


def test_the_manifest_has_what_driving_it_takes():
    assert describe_vae(vae_config(), SCALE, 12) == {
        "z_dim": 16, "spatial_factor": 8, "temporal_factor": 4, "latents_scale": SCALE,
        "layers": 24, "positions": [4, 32, 32], "tile": [3, 32, 32], "overlap": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name ViTVAE, got AutoencoderKL. "),
        ({"model_type": "vit_ncthw"}, "model_type vit, got vit_ncthw. "),
        ({"use_rope": True}, "use_rope False, got True. "),
        ({"ln_in_attn": False}, "ln_in_attn True, got False. "),
        (
            {"embed_dim": 100},
            "embed_dim that 16 heads and the 256 pixels of a patch divide, got 100. ",
        ),
    ],
)
def test_another_network_is_refused(change, message):
    config = vae_config()
    (config if change.keys() <= config.keys() else config["ddconfig"]).update(change)
    with pytest.raises(CheckpointError) as error:
        vae_tensors(config)
    assert str(error.value) == (
        f"vae config: expected {message}Use the autoencoder that MAGI-1 was released with."
    )


def test_what_a_configuration_leaves_out_is_as_in_the_original():
    config = vae_config()
    del config["ddconfig"]["with_cls_token"], config["ddconfig"]["patch_size"]
    assert vae_tensors(config) == vae_tensors(vae_config())
    del config["ddconfig"]["qkv_bias"]
    with pytest.raises(CheckpointError, match="expected qkv_bias True, got False"):
        vae_tensors(config)


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(GOLDEN / "magi-a", tmp_path / "checkpoint")


def test_an_autoencoder_is_found(checkpoint):
    write_vae(checkpoint)
    opened = load_magi_checkpoint(checkpoint)
    check_tensors("vae", opened.vae.tensors, MAGI_FAMILY.tensors(opened)["vae"])
    assert "vae" not in MAGI_FAMILY.missing(opened)
    assert MAGI_FAMILY.describe(opened, None)["vae"]["tile"] == [3, 32, 32]
    assert count_steps(opened) == 19 + 2 * 6 + 4 + 1  # six components, four layers, a table


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"z_chans": 16}, "expected z_chans 8, for which the transformer was trained, got 16."),
        ({"patch_length": 2}, "expected patch_length 4, for which the transformer was trained, "),
        ({"patch_size": 16}, "expected patch_size 8, for which the transformer was trained, got "),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(checkpoint, sizes, message):
    folder = write_vae(checkpoint, **{"embed_dim": 1024} | sizes)
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(checkpoint)
    assert str(error.value).startswith(f"{folder}/config.json: {message}")


@pytest.mark.parametrize("fps", [7, 32, 100])
def test_a_frame_rate_that_does_not_fit_the_tiles_is_refused(checkpoint, fps):
    write_vae(checkpoint)
    file = checkpoint / "config.json"
    file.write_text(re.sub(r'"fps": \d+', f'"fps": {fps}', file.read_text()))
    with pytest.raises(CheckpointError, match=f"a whole part of 24 frames, got {fps}\\. Take"):
        load_magi_checkpoint(checkpoint)
