"""From a MAGI-1 checkpoint with all of its parts, over a bundle, to an mp4 of a prompt."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from magi_parts import write_whole
from magi_vit import Vit, code_in_tiles
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

from mc_engines.building.bounds import VideoLimits, bound_symbols
from mc_engines.building.compile import Request, build_plan, count_attention_kernels
from mc_engines.building.library import open_library
from mc_engines.bundle import Bundle
from mc_engines.errors import BundleError
from mc_export.checkpoint import read_json
from mc_export.cli import main as export
from mc_runtime.caption import clean_caption
from mc_runtime.generate_cli import main as generate
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.video import read_frames

CASE = Path(__file__).parent.parent / "golden" / "magi-a"
PROMPT = "A Cat walks &amp; sits on the <b>grass</b>"
RUN = ["--num-frames", "48", "--num-inference-steps", "4"]
SCALE = 0.18215
TOLERANCE = 1e-4


def invoke(command, *arguments, code=0):
    result = CliRunner().invoke(command, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_whole(CASE, tmp_path_factory.mktemp("magi") / "checkpoint", special=True)


@pytest.fixture(scope="module")
def bundle(checkpoint):
    target = checkpoint.with_name("magi.bundle")
    result = invoke(export, "--model", "magi", "--checkpoint", checkpoint, "-o", target)
    assert "skipped" not in result.stderr
    return target


@pytest.fixture(scope="module")
def pipeline(bundle):
    return VideoPipeline.from_bundle(bundle, threads=1)


@pytest.fixture(scope="module")
def vits(checkpoint):
    config = read_json(checkpoint / "vae" / "config.json")
    tensors = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    return {half: Vit(config, tensors, half) for half in ("encoder", "decoder")}


def decode(vit, latents):
    """Frames as bytes, from latents as the transformer knows them."""
    video = code_in_tiles(vit.decode, torch.from_numpy(latents) / SCALE, (3, 32, 32), 8, "original")
    return (video.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def _means(frames):
    """Brightness of every block of 8x8 pixels."""
    return frames.reshape(len(frames), 8, 8, 12, 8, 3).mean((2, 4, 5)).ravel()


def test_the_bundle_lacks_nothing(bundle):
    opened = Bundle.open(bundle)
    assert opened.manifest.missing == ()
    assert (bundle / "tokenizer" / "tokenizer.json").is_file()
    assert not list((bundle / "tokenizer").glob("*.safetensors"))
    names = [f"vae_{half}_{part}" for half in ("encoder", "decoder") for part in ("embed", "block")]
    for name in ("text_layer", "text_norm", "vae_decoder_head", *names):
        assert {"fp32", "fp16", "bf16"} <= opened.component(name).graphs.keys()


@torch.no_grad()
def test_the_embedding_of_a_prompt_is_that_of_transformers(checkpoint, pipeline):
    folder = checkpoint / "t5" / "t5-v1_1-xxl"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5EncoderModel.from_pretrained(folder).eval()
    for prompt in ("", PROMPT):
        ids = tokenizer(
            clean_caption(prompt), max_length=64, padding="max_length", return_tensors="pt"
        )
        hidden = model(**ids).last_hidden_state[:, ids.attention_mask[0] > 0]
        got = pipeline.embed_text("prompt", prompt, pytest.fail)
        assert got.shape == hidden.shape  # without padding
        assert np.abs(got - hidden.numpy()).max() <= TOLERANCE


def test_a_long_prompt_is_cut_at_the_captions_length(pipeline):
    notes = []
    embedding = pipeline.embed_text("prompt", "a dog " * 200, notes.append)
    assert embedding.shape == (1, 64, 32)
    assert notes[0].startswith("prompt: expected at most 64 tokens, got ")


def test_a_prompt_becomes_a_video(bundle, tmp_path, vits):
    video, latents = tmp_path / "out.mp4", tmp_path / "out.npz"
    invoke(generate, bundle, "--prompt", PROMPT, *RUN, "-o", video, "--save-latents", latents)
    frames = list(read_frames(video))
    assert len(frames) == 48
    assert frames[0].shape == (64, 96, 3)
    expected = decode(vits["decoder"], np.load(latents)["latents"])
    # An mp4 loses much of noise, but little of what blocks of pixels have in common.
    assert np.corrcoef(_means(np.stack(frames)), _means(expected))[0, 1] > 0.8


def test_chunks_have_frames_as_soon_as_they_are_clean(pipeline, vits):
    generation = pipeline.generate(PROMPT, num_frames=48, num_inference_steps=4)
    for number, chunk in enumerate(generation):
        assert (chunk.index, chunk.frames.shape) == (number, (24, 64, 96, 3))
        expected = decode(vits["decoder"], chunk.latents).astype(int)
        assert np.abs(chunk.frames - expected).max() <= 1  # where a value lies between two bytes


@torch.no_grad()
def test_frames_are_encoded_as_in_plain_torch(pipeline, vits):
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 96, 3), np.uint8)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
    tile = 12, 256, 256
    expected = code_in_tiles(vits["encoder"].encode, pixels, tile, 1 / 8, "blended") * SCALE
    assert np.abs(pipeline.encoder.encode(frames) - expected.numpy()).max() <= TOLERANCE


def test_a_video_is_continued(pipeline):
    frames = np.random.default_rng(0).integers(0, 256, (24, 64, 96, 3), np.uint8)
    video = pipeline.run(PROMPT, video=frames, num_frames=48, num_inference_steps=4)
    np.testing.assert_array_equal(video.latents[:, :6], pipeline.encoder.encode(frames))
    assert video.frames.shape == (48, 64, 96, 3)


def test_without_its_tokenizer_a_bundle_takes_no_prompt(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "magi.bundle", copy_function=shutil.copyfile)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(BundleError, match=r"tokenizer"):
        VideoPipeline.from_bundle(copy).generate(PROMPT)


def test_the_graphs_of_text_and_frames_compile(bundle):
    """With TensorRT-RTX: compiled, not executed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")
    opened, library = Bundle.open(bundle), open_library("tensorrt-rtx")
    sizes = bound_symbols(opened.manifest.config, VideoLimits(256, 256, 97, 6))
    names = [n for n in opened.manifest.components if n.startswith(("text_layer", "vae_"))]
    assert len(names) == 7
    for name in names:
        for form in ("fp16", "bf16"):
            graph, path = opened.graph(name, form), opened.graph_path(name, form)
            plan = build_plan(library, graph, path, Request((80, 120), [sizes]))
            if name.endswith("_block"):
                assert count_attention_kernels(plan) == 1
