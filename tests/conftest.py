"""What tests of several folders share: a tiny model, its bundle, the golden cases, diffusers.

An export takes most of a minute, so each is made once a session.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from diffusers.pipelines.skyreels_v2 import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    pipeline_skyreels_v2_diffusion_forcing,
    pipeline_skyreels_v2_diffusion_forcing_v2v,
)
from magi_parts import write_whole
from safetensors.torch import load_file
from tiny_checkpoint import make_tiny_checkpoint
from transformers import AutoTokenizer, UMT5EncoderModel

from mc_export.diffusers_baseline import SHARED_OPTIONS, WindowNoise
from mc_export.export_bundle import export_bundle
from mc_export.families import FAMILIES
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule import WAN_GRID

GOLDEN = Path(__file__).parent / "golden"
# Two threads wait for each other longer than such small tensors take.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> Callable[..., Path]:
    """Export a checkpoint's folder, once a session; return the bundle's."""

    @cache
    def export(checkpoint: Path, family: str = "skyreels") -> Path:
        target = tmp_path_factory.mktemp("bundles") / f"{checkpoint.name}.bundle"
        export_bundle(FAMILIES[family].load(checkpoint), target)
        return target

    return export


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint with every part, the transformer's weights in two files."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", shards=2)


@pytest.fixture(scope="session")
def tiny_bundle(export, tiny_checkpoint) -> Path:
    """The bundle of `tiny_checkpoint`. A test that changes it changes a copy."""
    return export(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny(tiny_bundle) -> VideoPipeline:
    """The pipeline of `tiny_bundle`."""
    return VideoPipeline.from_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def whole_magi_bundle(export, tmp_path_factory) -> Path:
    """A golden case of MAGI-1 with text encoder and VAE. A test that changes it changes a copy."""
    folder = tmp_path_factory.mktemp("magi") / "whole"
    return export(write_whole(GOLDEN / "magi-a", folder), "magi")


@dataclass(frozen=True)
class Golden:
    """A golden case: what tests/golden/README.md describes, and the pipeline of its bundle."""

    checkpoint: Path
    pipeline: VideoPipeline
    options: GenerationOptions
    inputs: dict[str, Any]
    expected: dict[str, Any]


@pytest.fixture(scope="session")
def golden_case(export) -> Callable[[str], Golden]:
    """Look up a golden case by its name."""

    @cache
    def golden_case(name: str) -> Golden:
        folder = GOLDEN / name
        case = json.loads((folder / "case.json").read_text())
        height, width = (8 * size for size in case["latent_hw"])
        options = GenerationOptions(
            num_frames=WAN_GRID.pixel_frames(case["frames"]),
            height=height,
            width=width,
            num_inference_steps=case["steps"],
            addnoise_condition=0,
            **{
                key: case[key]
                for key in ("flow_shift", "guidance_scale", "fps", "ar_step", "causal_block_size")
            },
        )
        inputs, expected = (
            dict(np.load(folder / f"{kind}.npz")) for kind in ("inputs", "expected")
        )
        inputs["latents"] = inputs.pop("noise")
        pipeline = VideoPipeline.from_bundle(export(folder), threads=1)
        return Golden(folder, pipeline, options, inputs, expected)

    return golden_case


@pytest.fixture(scope="session", params=["skyreels-a", "skyreels-b"])
def golden(request, golden_case) -> Golden:
    """Each golden case."""
    return golden_case(request.param)


class Diffusers:
    """diffusers' pipelines on a checkpoint: what ours are held against.

    Attributes:
        transformer: SkyReelsV2Transformer3DModel.
        vae: AutoencoderKLWan, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.transformer = _open_diffusers(SkyReelsV2Transformer3DModel, folder / "transformer")
        self.vae = self.tokenizer = self.text_encoder = None
        if (folder / "vae").is_dir():
            self.vae = _open_diffusers(AutoencoderKLWan, folder / "vae")
        if (folder / "text_encoder").is_dir():
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
            self.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")

    def run(
        self,
        options: GenerationOptions,
        latents: Any,
        video: Any = None,
        output_type: str = "latent",
        **texts: Any,
    ) -> Any:
        """Generate with the options and inputs of `VideoPipeline.run`.

        Latent frame i starts from latents[:, i] whatever its window is, and noise is added to
        a prefix once per window, as `VideoPipeline` draws it.

        Args:
            options: Of the generation.
            latents: Noise of the whole video, shape (16, frames, h, w).
            video: Frames to continue, shape (n, height, width, 3), uint8.
            output_type: `latent`, or `np` for frames.
            **texts: Prompts, or embeddings as arrays.

        Returns:
            Latents (16, frames, h, w), or frames (n, height, width, 3) in [0, 1].
        """
        module, kind, given = (
            (pipeline_skyreels_v2_diffusion_forcing, SkyReelsV2DiffusionForcingPipeline, {})
            if video is None
            else (
                pipeline_skyreels_v2_diffusion_forcing_v2v,
                SkyReelsV2DiffusionForcingVideoToVideoPipeline,
                {"video": video.astype(np.float32) / 255},
            )
        )
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=options.flow_shift
        )
        pipeline = kind(self.tokenizer, self.text_encoder, self.transformer, self.vae, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        noise = WindowNoise(asdict(options), latents, WAN_GRID.temporal_factor)
        with (
            mock.patch.object(module, "randn_tensor", noise.of_window),
            mock.patch.object(torch, "randn_like", noise.of_prefix),
        ):
            result = pipeline(
                output_type=output_type,
                return_dict=False,
                prompt=texts.pop("prompt", None),
                **{name: getattr(options, name) for name in SHARED_OPTIONS},
                **{name: _to_torch(value) for name, value in texts.items()},
                **given,
            )[0]
        return result[0].numpy() if output_type == "latent" else result[0]


def _open_diffusers(kind: Any, folder: Path) -> Any:
    """Load a model; diffusers 0.42.1's own way needs accelerate, only to save memory."""
    model = kind.from_config(kind.load_config(folder))
    files = map(load_file, folder.glob("*.safetensors"))
    model.load_state_dict({name: x for tensors in files for name, x in tensors.items()})
    return model.eval()


def _to_torch(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@pytest.fixture(scope="session")
def diffusers() -> Callable[[Path], Diffusers]:
    """Open a checkpoint's folder with diffusers."""
    return cache(Diffusers)
