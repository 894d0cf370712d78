"""The VAE: what is left of a held-out clip that went through it and back."""

__all__ = ["measure_codec"]

import numpy as np
from scripts.train_mini.render import render_scene
from scripts.train_mini.world import SEEDS, Scene, draw_scene

from mc_runtime import VideoPipeline
from mc_runtime.vae import to_uint8

from .records import Record, take_records


def measure_codec(pipeline: VideoPipeline, clips: int = 20) -> str:
    """Return the PSNR of held-out clips of 97 frames and of every kind, in words."""

    def measure(place: int, scene: Scene) -> Record:
        frames = render_scene(scene).frames
        pixels, _ = pipeline.decoder.decode(pipeline.encoder.encode(frames), None)
        error = np.square(to_uint8(pixels).astype(float) - frames).mean()
        return {"psnr": float(10 * np.log10(255**2 / error))}

    scenes = [draw_scene(SEEDS["kinds"] + index, "held_out") for index in range(clips)]
    psnr = [record["psnr"] for record in take_records(pipeline, "codec", scenes, measure)]
    return (
        f"VAE, {len(psnr)} held-out clips of 97 frames: PSNR {np.mean(psnr):.1f} dB, "
        f"the worst clip {min(psnr):.1f} dB"
    )
