"""diffusers' own pipeline on a checkpoint, as a process that `mc-bench --baseline diffusers` asks.

It runs apart, so that the runtime needs no torch. Requests and replies are lines of JSON on stdin
and stdout, arrays are npz files; `serve` says which. Neighbours: `load_checkpoint` gives weights
under diffusers' names, whatever layout they have.

diffusers and transformers are in no extra: nothing else needs them.
"""

__all__ = ["SHARED_OPTIONS", "Baseline", "WindowNoise", "main", "serve"]

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from mc_engines.errors import McError, MissingExtraError
from mc_export.checkpoint import Checkpoint, Part, load_checkpoint

_MODULE = "diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing"
SHARED_OPTIONS = (
    *("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "fps", "ar_step"),
    *("causal_block_size", "base_num_frames", "overlap_history", "addnoise_condition"),
)  # in `GenerationOptions` and in diffusers' pipeline


class _Enough(Exception):
    """Ends a run that was only to warm up."""


class Baseline:
    """diffusers' SkyReels-V2 pipeline on a checkpoint, in float32 on the CPU.

    Args:
        checkpoint: Its transformer, and its VAE if it has one, are loaded.

    Raises:
        MissingExtraError: diffusers or transformers is not installed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._diffusers = _require_diffusers()
        self._module = importlib.import_module(_MODULE)
        self._transformer = _load(
            self._diffusers.SkyReelsV2Transformer3DModel, checkpoint.transformer
        )
        self._vae: Any = None
        if checkpoint.vae is not None:
            self._vae = _load(self._diffusers.AutoencoderKLWan, checkpoint.vae)

    def denoise(
        self,
        options: Mapping[str, Any],
        latents: NDArray[np.float32],
        rows: int | None = None,
        **embeddings: NDArray[np.float32],
    ) -> NDArray[np.float32] | None:
        """Denoise as `VideoPipeline.run` does with the same arguments.

        Args:
            options: Fields of `GenerationOptions`.
            latents: Noise of the whole video, shape (16, frames, h, w).
            rows: Stop after so many rows of the schedule.
            **embeddings: `prompt_embeds`, and `negative_prompt_embeds` with guidance, each
                (1, T, text_dim).

        Returns:
            Latents, shape (16, frames, h, w); None if it was stopped.
        """
        scheduler = self._diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=options["flow_shift"],
        )
        kind = self._module.SkyReelsV2DiffusionForcingPipeline
        pipeline = kind(None, None, self._transformer, self._vae, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        noise = WindowNoise(options, latents, pipeline.vae_scale_factor_temporal)

        def stop(_: Any, row: int, *rest: Any) -> dict[str, Any]:
            if row + 1 == rows:
                raise _Enough
            return {}

        try:
            # The pipeline's own `latents` fails and knows no later windows (diffusers 0.42.1).
            with (
                torch.inference_mode(),
                mock.patch.object(self._module, "randn_tensor", noise.of_window),
                mock.patch.object(torch, "randn_like", noise.of_prefix),
            ):
                result = pipeline(
                    prompt=None,
                    output_type="latent",
                    callback_on_step_end=stop,
                    **{name: options[name] for name in SHARED_OPTIONS},
                    **{name: torch.from_numpy(array) for name, array in embeddings.items()},
                ).frames
        except _Enough:
            return None
        video: NDArray[np.float32] = result[0].numpy()
        return video

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        """Decode latents (16, frames, h, w) to frames (n, height, width, 3); None without a VAE."""
        if self._vae is None:
            return None
        config = self._vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        with torch.inference_mode():
            pixels = self._vae.decode(torch.from_numpy(latents)[None] * std + mean).sample[0]
        pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
        frames: NDArray[np.uint8] = pixels.permute(1, 2, 3, 0).round().to(torch.uint8).numpy()
        return frames


class WindowNoise:
    """Gives diffusers the noise that `VideoPipeline` starts each window from, one after the other.

    Args:
        options: Fields of `GenerationOptions`.
        latents: Noise of the whole video, shape (16, frames, h, w).
        factor: Pixel frames of a latent frame.
    """

    def __init__(
        self, options: Mapping[str, Any], latents: NDArray[np.float32], factor: int
    ) -> None:
        # A window of n pixel frames has (n - 1) / factor + 1 latent ones.
        self._stride = (options["base_num_frames"] - options["overlap_history"]) // factor
        self._latents, self._seed, self._windows = latents, options["seed"], 0

    def of_window(self, shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        """Give a window its part; stands in for diffusers' `randn_tensor`."""
        first = self._windows * self._stride
        self._windows += 1
        return torch.tensor(self._latents[None, :, first : first + shape[2]])

    def of_prefix(self, like: torch.Tensor) -> torch.Tensor:
        """Noise on what a window takes over: the same in every row, as ours is."""
        draw = np.random.default_rng([self._seed, self._windows])
        return torch.from_numpy(draw.standard_normal(tuple(like.shape), np.float32))


def _require_diffusers() -> Any:
    try:
        importlib.import_module("transformers")  # diffusers offers no pipeline without it
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise MissingExtraError(
            f"baseline: expected diffusers and transformers, got none: {error}. "
            "Run: pip install diffusers==0.42.1 transformers"
        ) from error


def _load(kind: Any, part: Part) -> Any:
    """Build one of diffusers' models; its own way needs a folder in its own layout."""
    model = kind.from_config(part.config)
    names = part.tensors.names()
    model.load_state_dict({name: part.tensors.load(name).float() for name in names})
    return model.eval()


def serve(baseline: Baseline, requests: Iterable[str], replies: TextIO) -> None:
    """Answer requests until there are no more.

    A request has `inputs` (npz with `latents` and embeddings), `options` (fields of
    `GenerationOptions`), `rows` (of a warm-up, or null) and `output` (npz to write `latents` and
    `frames` to, or null). The reply has `seconds`: of denoising alone.

    Args:
        baseline: What runs.
        requests: Lines of JSON.
        replies: Where the lines of JSON go.
    """
    for line in requests:
        request = json.loads(line)
        with np.load(request["inputs"]) as stored:
            arrays = {name: stored[name] for name in stored}
        start = time.perf_counter()
        latents = baseline.denoise(request["options"], rows=request["rows"], **arrays)
        seconds = time.perf_counter() - start
        if request["output"] is not None and latents is not None:
            given: dict[str, Any] = {"latents": latents, "frames": baseline.decode(latents)}
            np.savez(request["output"], **{name: x for name, x in given.items() if x is not None})
        _reply(replies, {"seconds": seconds})


def _reply(replies: TextIO, value: Mapping[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def main() -> int:
    """Load the checkpoint, say so with the `versions`, and serve; an `error` is a reply too."""
    parser = argparse.ArgumentParser(description="Run diffusers for mc-bench.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints disturbs no reply
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        baseline = Baseline(load_checkpoint(arguments.checkpoint))
        packages = ("diffusers", "transformers", "torch")
        _reply(replies, {"versions": {name: metadata.version(name) for name in packages}})
        serve(baseline, sys.stdin, replies)
    except McError as error:
        _reply(replies, {"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
