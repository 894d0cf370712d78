"""Held-out prompts: whether the judge finds in a video what its sentence says."""

__all__ = ["generate_prompts", "measure_background", "measure_prompts"]

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from scripts.train_mini.judge import Verdict, compare_captions, find_object, judge_clip
from scripts.train_mini.world import Scene

from mc_runtime import VideoPipeline

from .records import Record, take_records
from .scenes import held_out_scenes
from .weights import watch_scene

_PROMPTS = 100
_MARGIN = 3  # pixels around the object that are not background
_LEVELS = 4  # grey levels that a background may change by


def generate_prompts(pipeline: VideoPipeline) -> list[tuple[Scene, Record]]:
    """Return held-out scenes of one object, each with what its caption's video gave."""

    def measure(seed: int, scene: Scene) -> Record:
        frames, area = watch_scene(pipeline, seed, scene)
        verdict, background = vars(judge_clip(frames)), measure_background(frames)
        return {"area": area, "verdict": verdict, "background": background}

    scenes = held_out_scenes(_PROMPTS)
    return list(zip(scenes, take_records(pipeline, "prompts", scenes, measure), strict=True))


def measure_prompts(pipeline: VideoPipeline) -> str:
    """Return the judge's rates on generated videos, and on other captions, in words."""
    scenes, records = zip(*generate_prompts(pipeline), strict=True)
    verdicts = [Verdict(**record["verdict"]) for record in records]
    background = [record["background"] for record in records if record["background"] is not None]
    options = pipeline.default_options
    return "\n".join(
        (
            f"{len(records)} held-out prompts, {options.num_inference_steps} steps, guidance "
            f"{options.guidance_scale:g}, {options.num_frames} frames:",
            compare_captions(verdicts, scenes),
            f"  background, first to last frame: {np.mean(background):.1f} levels on average, "
            f"below {_LEVELS} in {np.mean(np.less(background, _LEVELS)):.0%} of the videos",
        )
    )


def measure_background(frames: NDArray[np.uint8]) -> float | None:
    """Return how much the background changes from first to last frame, in levels of 0 to 255.

    Background is what the object covers in neither of both frames, 3 pixels around it left out;
    the mean over its pixels and channels of the absolute change, None where there is none.
    """
    first, last = frames[[0, -1]].astype(float)
    _, covered = find_object(frames)
    still = ~binary_dilation(covered[[0, -1]].any(axis=0), iterations=_MARGIN)
    return float(np.abs(last - first)[still].mean()) if still.any() else None
