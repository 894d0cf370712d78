"""Train the VAE of skyreels-mini: 4 times smaller each way and in time, 16 channels.

`python -m scripts.train_mini.autoencoder` begins with the linear codec of `linear.py`, trains on,
prints the PSNR on held-out clips, and writes `vae/` with one common scale of the latents whenever
that PSNR is the best so far. `encode_clips` is what `latents.py` caches with.
"""

__all__ = ["build_vae", "encode_clips", "load_vae", "measure_psnr", "to_video"]

import argparse
import time

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from .job import OUT, begin_job, cosine, load_training, log, save_training
from .linear import init_linear, linear_only, restore_nonlinear
from .muon import build_optimizers, descend
from .render import render_scene
from .world import SEEDS, draw_scene

MODEL = OUT / "skyreels-mini"
_CHECKPOINT = "vae.pt"
_POOL = 32  # clips in memory to cut from; one is replaced each step
_KL_WEIGHT = 5e-5
_SHAPES = (*3 * ((4, 13, 32),), (2, 17, 48))  # batch, frames, pixels; in turn
_RATES = 3e-4, 5e-5  # of Muon and of AdamW; higher ones tear the linear codec apart
_MEASURED = 24, 9  # clips and frames that the linear codec is solved on


def build_vae(latents_std: float = 1.0) -> AutoencoderKLWan:
    """Return the untrained VAE; `latents_std` is the common scale that its config carries."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[latents_std] * 16,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def load_vae() -> AutoencoderKLWan:
    """Return the trained VAE as the last run saved it, in float32."""
    return AutoencoderKLWan.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).eval()


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Return frames of shape (B, T, h, w, 3), uint8, as (B, 3, T, h, w) from -1 to 1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, frames: NDArray[np.uint8]) -> Tensor:
    """Return the normalised latents of clips.

    Args:
        vae: The trained VAE.
        frames: shape (B, T, 64, 64, 3), uint8.

    Returns:
        shape (B, 16, (T - 1) // 4 + 1, 16, 16), of unit variance over all channels together.
    """
    return vae.encode(to_video(frames)).latent_dist.mode() / vae.config.latents_std[0]


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLWan, clips: int = 8, frames: int = 17) -> tuple[float, float]:
    """Return the mean PSNR of held-out clips in dB, and the latents' common standard deviation."""
    scenes = (draw_scene(SEEDS["vae"] + index, "held_out") for index in range(clips))
    video = to_video(np.stack([render_scene(scene, frames).frames for scene in scenes]))
    latents = vae.encode(video).latent_dist.mode()
    error = ((vae.decode(latents).sample - video) / 2).square().mean(dim=(1, 2, 3, 4))
    return float((-10 * error.log10()).mean()), float(latents.std())


class _Pool:
    """Training clips in memory, of which one is replaced at each cut."""

    def __init__(self, first_seed: int) -> None:
        self.seed = first_seed
        self.clips = np.stack([self._render() for _ in range(_POOL)])

    def _render(self) -> NDArray[np.uint8]:
        self.seed += 1
        return render_scene(draw_scene(self.seed)).frames

    def cut(self, rng: np.random.Generator, batch: int, frames: int, size: int) -> Tensor:
        """Return random pieces, shape (batch, 3, frames, size, size), from -1 to 1."""
        self.clips[self.seed % _POOL] = self._render()
        pieces = []
        for clip in rng.integers(_POOL, size=batch):
            t, y, x = (int(rng.integers(n - m + 1)) for n, m in ((97, frames), *2 * ((64, size),)))
            pieces.append(self.clips[clip, t : t + frames, y : y + size, x : x + size])
        return to_video(np.stack(pieces))


def _compute_loss(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(video).latent_dist
    difference = vae.decode(posterior.sample()).sample - video
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    squared = difference.square().mean()
    return squared + 0.02 * difference.abs().mean() + _KL_WEIGHT * kl, squared.detach()


def _export(vae: AutoencoderKLWan, best: float) -> float:
    """Write the VAE if its held-out PSNR beats `best`; return the better of the two."""
    psnr, latents_std = measure_psnr(vae)
    log(held_out_psnr=psnr, latents_std=latents_std)
    if psnr > best:
        whole = build_vae(latents_std)
        whole.load_state_dict(vae.state_dict())
        whole.half().save_pretrained(MODEL / "vae")
    return max(psnr, best)


def start_vae() -> AutoencoderKLWan:
    """Return the VAE that training begins with: the linear codec inside the whole architecture."""
    torch.manual_seed(0)
    vae = build_vae()
    clips, frames = _MEASURED
    scenes = (draw_scene(seed) for seed in range(clips))
    video = to_video(np.stack([render_scene(scene, frames).frames for scene in scenes]))
    init_linear(vae, video)
    with linear_only(vae):
        log(linear_psnr=measure_psnr(vae)[0])
    restore_nonlinear(vae, video)
    return vae


def train(steps: int) -> None:
    """Train from the last checkpoint on; every 5 minutes write one and, if it is the best, the VAE.

    Args:
        steps: Steps in all.
    """
    begin_job()
    resumed = (OUT / _CHECKPOINT).exists()
    vae = build_vae() if resumed else start_vae()
    optimizers = build_optimizers(vae, *_RATES, others=("conv_in", "conv_out"))
    start = load_training(_CHECKPOINT, {"vae": vae}, optimizers)
    best = measure_psnr(load_vae())[0] if resumed else _export(vae, best=0.0)
    rng, pool = np.random.default_rng(start), _Pool(10 * start)
    saved = time.monotonic()
    for step in range(start, steps):
        loss, squared = _compute_loss(vae, pool.cut(rng, *_SHAPES[step % len(_SHAPES)]))
        norm = descend(loss, vae, optimizers, cosine(step, steps))
        if step % 20 == 0:
            psnr = -10 * (squared / 4).log10().item()
            log(step=step, loss=loss.item(), psnr=psnr, norm=norm)
        if time.monotonic() - saved > 300 or step == steps - 1:
            saved = time.monotonic()
            save_training(_CHECKPOINT, step + 1, {"vae": vae}, optimizers)
            best = _export(vae, best)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    train(parser.parse_args().steps)
