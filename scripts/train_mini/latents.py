"""Cache the latents and captions of training clips, so that the transformer never sees the VAE.

`python -m scripts.train_mini.latents --clips 2000` writes `latents/NNNNN.npz` shards of 16 clips
(latents in float16, captions); shards that exist are kept. `Cache` reads whatever is there.
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
from .world import draw_scene

_FOLDER = OUT / "latents"
_SHARD = 16
_FRAMES = 97  # 25 latent frames: 5 chunks


class Cache:
    """The cached clips in memory; `refresh` takes in shards written since."""

    def __init__(self) -> None:
        self._shards: list[NDArray[np.float16]] = []
        self._captions: list[str] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self._captions)

    def refresh(self) -> None:
        """Load the shards that were not there before."""
        for path in sorted(_FOLDER.glob("*.npz"))[len(self._shards) :]:
            with np.load(path) as shard:
                self._shards.append(shard["latents"])
                self._captions += shard["captions"].tolist()

    def draw(
        self, rng: np.random.Generator, batch: int, chunks: int
    ) -> tuple[Tensor, list[str], NDArray[np.int64]]:
        """Draw pieces of clips.

        Three of four begin where a clip begins; the others anywhere, and as the first latent frame
        of a video is special, those have at least one clean chunk to continue from.

        Returns:
            Latents, shape (B, 16, 5 * chunks, 16, 16); captions; number of clean chunks, (B,).
        """
        clean = np.where(rng.random(batch) < 0.25, rng.integers(1, chunks, batch), 0)
        pieces, captions = [], []
        for index, prefix in zip(rng.integers(len(self), size=batch), clean, strict=True):
            latents = self._shards[index // _SHARD][index % _SHARD]
            start = CHUNK * int(rng.integers(6 - chunks)) if prefix else 0
            pieces.append(latents[:, start : start + CHUNK * chunks])
            captions.append(self._captions[index])
        return torch.from_numpy(np.stack(pieces)).float(), captions, clean


def write_cache(clips: int) -> None:
    """Encode the clips of seeds 0, 1, ... in shards; those on disk are not done again."""
    begin_job()
    _FOLDER.mkdir(parents=True, exist_ok=True)
    vae = load_vae()
    for first in range(0, clips, _SHARD):
        path = _FOLDER / f"{first:06}.npz"
        if path.exists():
            continue
        scenes = [draw_scene(seed) for seed in range(first, first + _SHARD)]
        frames = np.stack([render_scene(scene, _FRAMES).frames for scene in scenes])
        latents = encode_clips(vae, frames).half().numpy()
        aside = path.with_suffix(".aside")
        with aside.open("wb") as file:
            np.savez(file, latents=latents, captions=[scene.caption() for scene in scenes])
        aside.replace(path)
        log(clips=first + _SHARD, std=float(latents.astype(np.float32).std()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2000)
    write_cache(parser.parse_args().clips)
