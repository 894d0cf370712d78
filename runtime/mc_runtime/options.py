"""What a generation is asked for, and what it gives back chunk by chunk.

The defaults of every option live here alone; the command lines read them from the fields.
"""

__all__ = ["Chunk", "FirstSample", "GenerationOptions", "SigmaTable", "Video"]

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from motioncache import DecisionTrace

SigmaTable = Literal["diffusers", "skyreels"]
FirstSample = Literal["aliased", "copied"]


@dataclass(frozen=True)
class GenerationOptions:
    """Every setting of one generation that is not a tensor. Names follow diffusers.

    Attributes:
        num_frames: Pixel frames of the whole video.
        height: Pixels.
        width: Pixels.
        num_inference_steps: Denoising steps N of every chunk.
        guidance_scale: g of `uncond + g * (cond - uncond)`; at 1 or below one branch runs.
        flow_shift: Shift of the sigma table towards noise.
        fps: Frames per second of the file, and the model's fps input where it has one.
        seed: Of the initial noise and of the noise added to a prefix.
        ar_step: Steps that a chunk lags behind the one before; 0 denoises all together.
        causal_block_size: Latent frames of a chunk.
        base_num_frames: Pixel frames of one window.
        overlap_history: Pixel frames that a later window takes over from the one before.
        addnoise_condition: Noise added to a prefix, in thousandths, and its timestep.
        sigma_table: Whose table of noise levels: diffusers' or the original SkyReels one.
        first_sample: What the corrector of a chunk's second step starts from: `copied` is textbook
            UniPC; `aliased` is what diffusers' pipeline does, which overwrites that sample.
    """

    num_frames: int = 97
    height: int = 544
    width: int = 960
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    flow_shift: float = 8.0
    fps: int = 24
    seed: int = 0
    ar_step: int = 5
    causal_block_size: int = 5
    base_num_frames: int = 97
    overlap_history: int = 17
    addnoise_condition: int = 20
    sigma_table: SigmaTable = "diffusers"
    first_sample: FirstSample = "aliased"


@dataclass(frozen=True)
class Chunk:
    """A chunk that is finished: its latents and frames, and what it cost.

    Attributes:
        index: Position among the chunks of the video, from 0.
        of: Number of chunks of the video.
        latents: shape (16, F, h, w), normalised as the transformer knows them.
        frames: Pixels, shape (frames, height, width, 3), uint8; None where the bundle has no VAE
            or the caller asked for latents alone.
        seconds: Wall time since the chunk before (or since the start), decoding included.
        decode_seconds: The part of it spent in the VAE.
        computed: Counts of passes and tokens, such as `{"full": 100, "clean": 2}`.
    """

    index: int
    of: int
    latents: NDArray[np.float32]
    frames: NDArray[np.uint8] | None
    seconds: float
    decode_seconds: float
    computed: dict[str, Any]


@dataclass(frozen=True)
class Video:
    """All chunks of a video, put together.

    Attributes:
        latents: shape (16, frames, h, w).
        frames: Pixels, shape (num_frames, height, width, 3), uint8; None without a VAE.
        trace: What the policy decided.
    """

    latents: NDArray[np.float32]
    frames: NDArray[np.uint8] | None
    trace: DecisionTrace
