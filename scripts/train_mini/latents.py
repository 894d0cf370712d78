"""Cache the latents and captions of training clips, so that the transformer never sees the VAE.

`python -m scripts.train_mini.latents` writes `latents/*.npz` shards of 16 clips (latents in
float16, captions): whole clips of 5 chunks, and many more of which only the first 2 chunks are
kept, as most of what there is to learn is how a clip begins. Shards that exist are kept.
"""

__all__ = ["Cache"]

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .autoencoder import encode_clips, load_vae
from .forcing import CHUNK
from .job import OUT, begin_job, log
from .render import render_scene
from .world import SEEDS, draw_scene

_FOLDER = OUT / "latents"
_SHARD = 16
_CHUNKS = 5  # of a whole clip
_SHORT = 2 * CHUNK  # latent frames of a beginning


class Cache:
    """The cached clips in memory."""

    def __init__(self) -> None:
        self._clips: list[tuple[NDArray[np.float16], str]] = []
        for path in sorted(_FOLDER.glob("*.npz")):
            with np.load(path) as shard:
                self._clips += zip(shard["latents"], shard["captions"].tolist(), strict=True)
        self._whole = [clip for clip in self._clips if clip[0].shape[1] == _CHUNKS * CHUNK]

    def draw(
        self, rng: np.random.Generator, batch: int, chunks: int
    ) -> tuple[Tensor, list[str], NDArray[np.int64]]:
        """Draw pieces of clips.

        A single chunk begins a clip, as do three of four pairs and windows. The others continue
        at least one clean chunk, for the first latent frame of a video is special; a pair does so
        anywhere in a whole clip.

        Returns:
            Latents, shape (B, 16, 5 * chunks, 16, 16); captions; number of clean chunks, (B,).
        """
        clean = np.zeros(batch, np.int64)
        if chunks > 1:
            clean = np.where(rng.random(batch) < 0.25, rng.integers(1, chunks, batch), 0)
        pieces, captions = [], []
        for prefix in clean:
            clips = self._whole if prefix or CHUNK * chunks > _SHORT else self._clips
            latents, caption = clips[rng.integers(len(clips))]
            start = CHUNK * int(rng.integers(_CHUNKS + 1 - chunks)) if prefix else 0
            pieces.append(latents[:, start : start + CHUNK * chunks])
            captions.append(caption)
        return torch.from_numpy(np.stack(pieces)).float(), captions, clean


def write_cache(start: int, clips: int, latent_frames: int) -> None:
    """Encode the clips of seeds from `start` in shards; those on disk are not done again.

    Args:
        start: The first seed.
        clips: How many, in whole shards: as many more as fill the last one.
        latent_frames: Of each clip.
    """
    vae = load_vae()
    for first in range(start, start + clips, _SHARD):
        path = _FOLDER / f"{latent_frames}-{first:06}.npz"
        if path.exists():
            continue
        scenes = [draw_scene(seed) for seed in range(first, first + _SHARD)]
        frames = np.stack([render_scene(scene, 4 * latent_frames - 3).frames for scene in scenes])
        latents = encode_clips(vae, frames).half().numpy()
        aside = path.with_suffix(".aside")
        with aside.open("wb") as file:
            np.savez(file, latents=latents, captions=[scene.caption() for scene in scenes])
        aside.replace(path)
        log(seed=first + _SHARD, std=float(latents.astype(np.float32).std()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--beginnings", type=int, default=1536)
    arguments = parser.parse_args()
    begin_job()
    _FOLDER.mkdir(parents=True, exist_ok=True)
    write_cache(SEEDS["clips"], arguments.clips, _CHUNKS * CHUNK)
    write_cache(SEEDS["beginnings"], arguments.beginnings, _SHORT)
