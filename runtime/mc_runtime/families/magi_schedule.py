"""When and under what conditions MAGI-1 computes: timesteps, key ranges, guidance; tensors aside.

Neighbours: the manifest's `config.schedule` has the constants of a model, `magi` follows them.
Chunks move through a window in stages: a chunk takes as many steps in a stage as it lags behind the
one before, and the stages count the chunks of a window. Time runs from 0, noise, to 1, clean.

Source: SandAI-org/MAGI-1 6ff822e, inference/pipeline/video_generate.py and
inference/model/dit/dit_model.py.
"""

__all__ = ["MagiBranch", "MagiOptions", "MagiSchedule", "timestep_table"]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.run_sizes import count_kept_chunks

SHIFT = 3.0  # towards noise
SHORTCUT_STEPS = 12
_STAGES = 4  # that step lengths are told, and shortcuts defined, for
_SLACK = 1e-7  # of the published comparison of timesteps
_NEARLY_CLEAN_SHARE = 0.3  # of what a chunk makes of itself alone
_PREFIX_RANGE = 8  # chunks that a given one sees where nothing else is said


@dataclass(frozen=True)
class MagiOptions:
    """Every setting of a generation that is not a tensor; what is not here is the model's own.

    Attributes:
        num_frames: Pixel frames of the whole video.
        height: Pixels.
        width: Pixels.
        num_inference_steps: Denoising steps N of every chunk.
        fps: Frames per second of the file.
        seed: Of the initial noise.
        overlap_history: Pixel frames of a given video, its last, that are continued.
        nearly_clean: Whether a distilled model is guided by what the oldest active chunk makes of
            itself alone, once it is nearly clean.
    """

    num_frames: int = 96
    height: int = 720
    width: int = 720
    num_inference_steps: int = 64
    fps: int = 24
    seed: int = 0
    overlap_history: int = 32
    nearly_clean: bool = True


@dataclass(frozen=True)
class MagiBranch:
    """One of the passes that guidance is made of.

    Attributes:
        name: For traces.
        prompted: Whether it sees the prompt; else the null caption.
        null_row: Row of the null caption, from its end, that its modulation is told.
        alone: Whether a chunk sees itself alone, and no chunk before it.
    """

    name: str
    prompted: bool
    null_row: int
    alone: bool = False


_GUIDED = (
    MagiBranch("text", prompted=True, null_row=1),
    MagiBranch("history", prompted=False, null_row=0),
    MagiBranch("uncond", prompted=False, null_row=0, alone=True),
)
_MAIN = MagiBranch("main", prompted=True, null_row=1)
_NEARLY_CLEAN = MagiBranch("nearly clean", prompted=True, null_row=1, alone=True)


@dataclass(frozen=True)
class MagiSchedule:
    """Constants of a model, and what follows from them for a number of steps.

    Attributes:
        num_inference_steps: Steps N of a chunk.
        window_chunks: Chunks that are denoised together, and stages of each.
        chunk_frames: Latent frames of a chunk.
        kv_ranges: By stage, how many chunks a chunk sees, itself included; empty for all.
        clean_kv_range: The same of a finished chunk in its clean pass; None for all.
        clean_timestep: Of that pass.
        guidance_passes: 3: text, history, uncond; 1 for a distilled model.
        guidance_timesteps: Where the scales begin to hold, ascending.
        history_guidance_scales: p of `(1 - p) * uncond + (p - q) * history + q * text`.
        text_guidance_scales: q.
        nearly_clean_timestep: Beyond it the oldest active chunk is guided by what it makes of
            itself alone; None switches that off.
        shortcut_mode: Lengths of a stage's three steps, in 8ths and 16ths of it, for 12 steps.
        distilled: Whether the model is told the length of its steps.
        max_text_tokens: The most that a prompt has, special tokens included.
    """

    num_inference_steps: int
    window_chunks: int
    chunk_frames: int
    kv_ranges: tuple[int, ...]
    clean_kv_range: int | None
    clean_timestep: float
    guidance_passes: int
    guidance_timesteps: tuple[float, ...]
    history_guidance_scales: tuple[float, ...]
    text_guidance_scales: tuple[float, ...]
    nearly_clean_timestep: float | None
    shortcut_mode: str
    distilled: bool
    max_text_tokens: int

    @classmethod
    def from_manifest(cls, config: Mapping[str, Any], options: MagiOptions) -> "MagiSchedule":
        """Read the constants of a model.

        Args:
            config: The manifest's `config`.
            options: Of the run.

        Returns:
            The schedule.
        """
        schedule = config["schedule"]
        known = {name: schedule[name] for name in cls.__dataclass_fields__ if name in schedule}
        lists = {name: tuple(v) for name, v in known.items() if isinstance(v, list)}
        changed: dict[str, Any] = {"num_inference_steps": options.num_inference_steps}
        changed |= {name: config["transformer"][name] for name in ("distilled", "max_text_tokens")}
        if not options.nearly_clean:
            changed["nearly_clean_timestep"] = None
        return cls(**(known | lists | changed))

    @property
    def stage_steps(self) -> int:
        """Steps of a stage, and by how many a chunk lags behind the one before."""
        return self.num_inference_steps // self.window_chunks

    @cached_property
    def timesteps(self) -> NDArray[np.float32]:
        """Of every step, and 1 behind them; shape (N + 1,)."""
        return timestep_table(self.num_inference_steps, self.shortcut_mode)

    @property
    def told_lengths(self) -> NDArray[np.float32]:
        """What a distilled model is told of its steps' lengths: twice how many fill a stage."""
        steps = self.num_inference_steps
        shortest = 4 if steps == SHORTCUT_STEPS else steps / _STAGES
        return np.float32(2 * shortest) / _step_lengths(steps, self.shortcut_mode)

    @property
    def branches(self) -> tuple[MagiBranch, ...]:
        """The passes of guidance; what one of them has no weight in may be left out."""
        if self.guidance_passes > 1:
            return _GUIDED
        return (_MAIN,) if self.nearly_clean_timestep is None else (_MAIN, _NEARLY_CLEAN)

    def weights(self, step: int, oldest: bool) -> tuple[float, ...]:
        """Return how much of each branch's velocity a step takes.

        Args:
            step: Of the chunk, from 0.
            oldest: Whether it is the first that is active.

        Returns:
            A factor per branch; they add up to 1.
        """
        timestep = float(self.timesteps[step])
        if self.guidance_passes == 1:
            if self.nearly_clean_timestep is None:
                return (1.0,)
            alone = _NEARLY_CLEAN_SHARE * (oldest and timestep > self.nearly_clean_timestep)
            return 1 - alone, alone
        starts = np.asarray(self.guidance_timesteps) - _SLACK
        number = int((starts < timestep).sum()) - 1
        p, q = self.history_guidance_scales[number], self.text_guidance_scales[number]
        return q, p - q, 1 - p

    def takes_part(self, number: int, chunk: int, active: Mapping[int, int]) -> bool:
        """Say whether a branch is evaluated for a chunk.

        Args:
            number: Of the branch.
            chunk: That takes a step.
            active: The step of every active chunk.

        Returns:
            Whether the chunk takes any of its velocity, or, where younger chunks see its keys, any
            active chunk does.
        """
        readers = [chunk] if self.branches[number].alone else active
        oldest = min(active)
        return any(self.weights(active[reader], reader == oldest)[number] for reader in readers)

    def visible(self, chunk: int, step: int) -> range:
        """Return the chunks whose keys a chunk sees in a step, its own included."""
        if not self.kv_ranges:
            return range(chunk + 1)
        return _last(chunk, self.kv_ranges[step // self.stage_steps])

    def clean_branches(self, given: bool) -> list[int]:
        """Return which branches evaluate a finished chunk, or a given one, clean.

        All that see chunks before them; a given chunk has its pass before the run, in which they
        all see the keys of the last of these branches.
        """
        numbers = [number for number, each in enumerate(self.branches) if not each.alone]
        return numbers[-1:] if given else numbers

    def visible_clean(self, chunk: int, given: bool) -> range:
        """Return the chunks whose keys a finished chunk, or a given one, sees in its clean pass."""
        if given and self.clean_kv_range is None:
            return _last(chunk, _PREFIX_RANGE)
        if self.clean_kv_range is None or not (given or self.kv_ranges):
            return range(chunk + 1)
        return _last(chunk, self.clean_kv_range)

    def kept_chunks(self, chunks: int, given: int) -> int:
        """Return how many chunks' keys have to be kept at once.

        Args:
            chunks: Of the video.
            given: Of them, those of a prefix.

        Returns:
            The most that lie between the first that anything sees and the newest.
        """
        kinds = [False, True] if given else [False]
        clean = [len(self.visible_clean(chunks, prefix)) for prefix in kinds]
        return count_kept_chunks(chunks, self.window_chunks, self.kv_ranges, clean)

    def slots(self, chunks: int, given: int) -> tuple[int, ...]:
        """Return how many chunks' keys each branch keeps; those that are seen alone for a window.

        Args:
            chunks: Of the video.
            given: Of them, those of a prefix.

        Returns:
            A count per branch.
        """
        kept, active = self.kept_chunks(chunks, given), min(self.window_chunks, chunks)
        return tuple(active if branch.alone else kept for branch in self.branches)


def _last(chunk: int, count: int) -> range:
    """A chunk and those before it, `count` in all."""
    return range(max(0, chunk + 1 - count), chunk + 1)


def timestep_table(steps: int, shortcut_mode: str) -> NDArray[np.float32]:
    """Compute the timesteps of a chunk: squared, then shifted towards noise.

    Args:
        steps: N.
        shortcut_mode: Of 12 steps: `8,16,16` or `16,16,8`, the lengths of a stage's three.

    Returns:
        shape (N + 1,), from 0 to 1.

    Example:
        >>> timestep_table(4, "8,16,16").astype(float).round(4).tolist()
        [0.0, 0.0217, 0.1, 0.3, 1.0]
    """
    if steps == SHORTCUT_STEPS:
        lengths = _step_lengths(steps, shortcut_mode) / 16
        u = np.append(np.cumsum(lengths) - lengths, 1.0)
    else:
        u = np.linspace(0, 1, steps + 1)
    squared = u.astype(np.float32) ** 2
    factor, slope = np.float32(1 / SHIFT), np.float32(1 / SHIFT - 1)
    timesteps: NDArray[np.float32] = factor * squared / (1 + slope * squared)
    return timesteps


def _step_lengths(steps: int, shortcut_mode: str) -> NDArray[np.float32]:
    """Say how many of a chunk's shortest steps each step spans; shape (N,)."""
    if steps != SHORTCUT_STEPS:
        return np.ones(steps, np.float32)
    sixteenths = [16 // int(part) for part in shortcut_mode.split(",")]
    return np.tile(np.array(sixteenths, np.float32), _STAGES)
