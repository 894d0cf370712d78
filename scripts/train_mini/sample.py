"""Sample skyreels-mini with diffusers' own pipeline and lay the frames out in a sheet.

`python -m scripts.train_mini.sample --steps 20 "a big red circle races left over sand"` writes
`sheet.png`: one row per prompt, eight frames. With `--prompts N` the captions of N held-out
scenes are taken, and the judge says how many it finds in the frames.
"""

__all__ = ["generate", "load_pipeline"]

import argparse

import numpy as np
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from numpy.typing import NDArray
from safetensors.torch import load_file
from scripts.frame_strip import lay_out
from transformers import AutoTokenizer, UMT5EncoderModel

from mc_engines.model_sizes import describe_video
from mc_engines.published import PUBLISHED

from .autoencoder import MODEL, load_vae
from .forcing import CHUNK
from .job import OUT, THREADS
from .judge import compare_captions, judge_clip
from .text import MAX_TOKENS
from .transformer import build_scheduler, build_transformer
from .world import SEEDS, SIZE, draw_scene

_SHEET = OUT / "sheet.png"
_GUIDANCE = describe_video(PUBLISHED["skyreels-mini"])["guidance_scale"]


def load_pipeline() -> SkyReelsV2DiffusionForcingPipeline:
    """Return diffusers' pipeline over the saved model, in float32."""
    # SkyReelsV2Transformer3DModel.from_pretrained of diffusers 0.42.1 wants accelerate.
    transformer = build_transformer()
    transformer.load_state_dict(load_file(MODEL / "transformer" / SAFETENSORS_WEIGHTS_NAME))
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=AutoTokenizer.from_pretrained(MODEL / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(MODEL / "text_encoder").float().eval(),
        transformer=transformer.eval(),
        vae=load_vae(),
        scheduler=build_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: SkyReelsV2DiffusionForcingPipeline,
    prompt: str,
    *,
    steps: int = 50,
    frames: int = 97,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """Generate one clip as the wave of chunks does, shape (frames, 64, 64, 3), uint8."""
    video = pipeline(
        prompt,
        height=SIZE,
        width=SIZE,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=_GUIDANCE,
        ar_step=max(1, steps // 10),
        causal_block_size=CHUNK,
        max_sequence_length=MAX_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return np.rint(video * 255).astype(np.uint8)


def judge_held_out(count: int, steps: int) -> None:
    """Generate held-out prompts, print the judge's rates and write the sheet."""
    pipeline = load_pipeline()
    scenes = [
        draw_scene(SEEDS["samples"] + index, "held_out", actors=1, plain=True)
        for index in range(count)
    ]
    clips = [
        generate(pipeline, scene.caption(), steps=steps, seed=index)
        for index, scene in enumerate(scenes)
    ]
    print(compare_captions([judge_clip(clip) for clip in clips], scenes))
    lay_out(clips).save(_SHEET)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="*")
    parser.add_argument("--prompts", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    if not arguments.prompt and not arguments.prompts:
        parser.error("prompt: expected one, or --prompts N, got neither. Name one.")
    torch.set_num_threads(THREADS)
    if arguments.prompts:
        judge_held_out(arguments.prompts, arguments.steps)
    else:
        mini = load_pipeline()
        videos = [generate(mini, prompt, steps=arguments.steps) for prompt in arguments.prompt]
        lay_out(videos).save(_SHEET)
