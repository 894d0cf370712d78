"""Cache the latents and captions of training clips, so that the transformer never sees the VAE.

`python -m scripts.train_mini.latents` writes `latents/*.npz` shards of 16 clips (latents in
float16, captions): whole clips of 5 chunks, and many more of which only the first 2 chunks are
kept, as most of what there is to learn is how a clip begins. Shards that exist are kept.
"""

__all__ = ["Batch", "Cache"]

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .autoencoder import encode_clips, load_vae
from .forcing import CHUNK
from .job import OUT, begin_job, log
from .render import cover_objects, render_scene
from .world import SEEDS, Scene, draw_scene

_FOLDER = OUT / "latents"
_SHARD = 16
_CHUNKS = 5  # of a whole clip
_SHORT = 2 * CHUNK  # latent frames of a beginning
_CELL = 4  # pixels of a latent, both ways, and frames of one


@dataclass(frozen=True)
class Batch:
    """Pieces of clips.

    Attributes:
        latents: shape (B, 16, frames, 16, 16).
        captions: One per piece.
        clean: How many chunks of each piece are a finished prefix, shape (B,).
        cover: How much of each pixel objects cover, shape (B, frames, 64, 64), 0 to 255.
        first: Place of the first frame in the clip that the model shall see; of all pieces.
    """

    latents: Tensor
    captions: list[str]
    clean: NDArray[np.int64]
    cover: Tensor
    first: int = 0

    def near_objects(self) -> Tensor:
        """Latents at or beside an object, shape (B, frames, 16, 16), bool."""
        return F.max_pool2d(self.cover.float(), 2 * _CELL, _CELL, _CELL // 2) > 0


@dataclass(frozen=True)
class _Entry:
    """A cached clip; `latents` has shape (16, frames, 16, 16), `cover` (frames, 64, 64)."""

    latents: NDArray[np.float16]
    cover: NDArray[np.uint8]
    caption: str
    plain: bool  # one object, no pan, no cut


class Cache:
    """The cached clips in memory."""

    def __init__(self) -> None:
        paths = sorted(_FOLDER.glob("*.npz"))
        self._clips = [entry for path in paths for entry in _load_shard(path)]
        self._plain = [clip for clip in self._clips if clip.plain]

    def draw(
        self, rng: np.random.Generator, batch: int, frames: int, *, plain: bool = False
    ) -> Batch:
        """Draw pieces of clips.

        A single frame comes from anywhere in the first chunk. A single chunk begins a clip, as do
        three of four pairs and windows. The others continue at least one clean chunk, for the first
        latent frame of a video is special; a pair does so anywhere in a whole clip.

        Args:
            rng: Source of randomness.
            batch: B.
            frames: 1, or whole chunks.
            plain: From clips of one object without pan and cut alone.
        """
        clips = self._plain if plain else self._clips
        whole = [clip for clip in clips if len(clip.cover) == _CHUNKS * CHUNK]
        chunks = max(1, frames // CHUNK)
        first = int(rng.integers(CHUNK)) if frames < CHUNK else 0
        clean = np.zeros(batch, np.int64)
        if chunks > 1:
            clean = np.where(rng.random(batch) < 0.25, rng.integers(1, chunks, batch), 0)
        pieces = []
        for prefix in clean:
            choice = whole if prefix or frames > _SHORT else clips
            clip = choice[rng.integers(len(choice))]
            start = CHUNK * int(rng.integers(_CHUNKS + 1 - chunks)) if prefix else first
            cut = slice(start, start + frames)
            pieces.append((clip.latents[:, cut], clip.cover[cut], clip.caption))
        latents, cover, captions = zip(*pieces, strict=True)
        return Batch(
            torch.from_numpy(np.stack(latents)).float(),
            list(captions),
            clean,
            torch.from_numpy(np.stack(cover)),
            first,
        )


def _load_shard(path: Path) -> list[_Entry]:
    """Read a shard; where the objects are is drawn again from its seeds."""
    with np.load(path) as shard:
        latents, captions = shard["latents"], shard["captions"].tolist()
    seed = int(path.stem.partition("-")[2])
    scenes = [draw_scene(seed + index) for index in range(len(latents))]
    if [scene.caption() for scene in scenes] != captions:
        raise SystemExit(f"{path}: expected clips of the world as it is. Delete the file.")
    return [
        _Entry(clip, _cover_groups(scene, clip.shape[1]), scene.caption(), scene.is_plain())
        for clip, scene in zip(latents, scenes, strict=True)
    ]


def _cover_groups(scene: Scene, latent_frames: int) -> NDArray[np.uint8]:
    """Return what objects cover on average over the frames of each latent one: 4, the first 1."""
    cover = cover_objects(scene, _CELL * latent_frames - _CELL + 1)
    later = cover[1:].reshape(-1, _CELL, *cover.shape[1:]).mean(1)
    return np.rint(255 * np.concatenate([cover[:1], later])).astype(np.uint8)


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
