"""Which chunk takes which step in which row, and how a long video is cut into windows.

The pipeline calls `validate_options`, then `plan_windows`; the loop over a window follows its
`step_matrix`. What a step does to the latents is `mc_runtime.sampler`'s business.
"""

__all__ = [
    "WAN_GRID",
    "LatentGrid",
    "StepMatrix",
    "Window",
    "check_frames",
    "check_multiple",
    "plan_windows",
    "step_matrix",
    "validate_options",
]

import bisect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_runtime.option_values import check_values
from mc_runtime.options import GenerationOptions
from mc_runtime.sampler import sigma_table


@dataclass(frozen=True)
class LatentGrid:
    """How many pixels a latent, and how many latents a token, stands for.

    Attributes:
        temporal_factor: Frames per latent frame.
        spatial_factor: Pixels per latent along height and width.
        patch_size: Latents per token along time, height and width.
        first_frames: Frames of the first latent frame, which a causal VAE makes of a single one.
    """

    temporal_factor: int = 4
    spatial_factor: int = 8
    patch_size: tuple[int, int, int] = (1, 2, 2)
    first_frames: int = 1

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames that the VAE makes of `num_frames` frames; an incomplete one is dropped."""
        return (num_frames - self.first_frames) // self.temporal_factor + 1

    def tokens(self, height: int, width: int) -> tuple[int, int]:
        """Tokens along height and width of a frame of so many pixels."""
        _, down, across = self.patch_size
        return height // self.spatial_factor // down, width // self.spatial_factor // across

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames that the VAE makes of `latent_frames` latent frames."""
        return (latent_frames - 1) * self.temporal_factor + self.first_frames


WAN_GRID = LatentGrid()


@dataclass(frozen=True)
class StepMatrix:
    """The order of work in one window: chunks move down the rows in a staggered wave.

    Attributes:
        step: shape (rows, chunks), int64: 0 while the chunk has not started, k in the row of its
            k-th step, N+1 once it is done.
        update: shape (rows, chunks), bool: True where the chunk takes a step.
    """

    step: NDArray[np.int64]
    update: NDArray[np.bool_]


def step_matrix(num_chunks: int, steps: int, ar_step: int, ready_chunks: int = 0) -> StepMatrix:
    """Let every chunk take its N steps, `ar_step` rows after the chunk before it.

    A chunk never waits longer than until the one before is done: from `ar_step = N` on, chunks
    are denoised one after the other. `ar_step = 0` denoises all together. Rows are counted until
    the last chunk takes its last step, so N + min(ar_step, N) * (chunks that are not ready - 1).

    Args:
        num_chunks: Chunks of the window.
        steps: Denoising steps N of a chunk.
        ar_step: Rows that a chunk lags behind the one before.
        ready_chunks: Chunks at the start that are done already: the prefix.

    Returns:
        The matrix of this window, without rows if every chunk is ready.

    Source:
        SkyReels-V2 abed76f, diffusion_forcing_pipeline.py, generate_timestep_matrix, in closed
        form.

    Example:
        >>> step_matrix(3, steps=4, ar_step=2, ready_chunks=1).step.tolist()
        [[5, 1, 0], [5, 2, 0], [5, 3, 1], [5, 4, 2], [5, 5, 3], [5, 5, 4]]
    """
    waiting = num_chunks - ready_chunks
    lag = min(ar_step, steps)
    rows = np.arange(steps + lag * (waiting - 1) if waiting else 0)[:, None]
    starts = lag * np.arange(waiting)
    step = np.full((len(rows), num_chunks), steps + 1, dtype=np.int64)
    step[:, ready_chunks:] = (rows + 1 - starts).clip(0, steps + 1)
    return StepMatrix(step, (step > 0) & (step <= steps))


@dataclass(frozen=True)
class Window:
    """The latent frames that are denoised together, and where they lie in the video.

    Attributes:
        first: Latent frame of the video at which the window begins.
        frames: Latent frames of the window, whole chunks.
        prefix: Latent frames at its start that are given: those of the video from `first` on. They
            are never changed. Whole chunks, but for families that take the rest of one.
        skip: Latent frames at its start that the window before has put into the video; the window
            adds its frames from there on.
    """

    first: int
    frames: int
    prefix: int
    skip: int


@dataclass(frozen=True)
class _Layout:
    """How videos of any length are cut into windows; all counts in latent frames."""

    base: int
    overlap: int
    chunk: int
    prefix: int

    @classmethod
    def of(cls, options: GenerationOptions, prefix: int, grid: LatentGrid) -> "_Layout":
        return cls(
            base=grid.latent_frames(options.base_num_frames),
            overlap=grid.latent_frames(options.overlap_history),
            chunk=options.causal_block_size,
            prefix=prefix,
        )

    def count(self, total: int) -> int:
        """Windows that a video of `total` latent frames needs."""
        return 1 + max(0, math.ceil((total - self.base) / (self.base - self.overlap)))

    def window(self, total: int, index: int) -> Window:
        """Cut out one window; of its prefix, drop from the end what fills no chunk."""
        first = index * (self.base - self.overlap)
        given = self.overlap if index else self.prefix
        return Window(
            first=first,
            frames=min(total - first, self.base),
            prefix=given - given % self.chunk,
            skip=self.overlap if index else 0,
        )

    def fits(self, total: int) -> bool:
        """Whether the last window fills whole chunks and has something to denoise."""
        last = self.window(total, self.count(total) - 1)
        return last.frames % self.chunk == 0 and last.frames > last.prefix


def plan_windows(
    options: GenerationOptions, prefix_latent_frames: int = 0, grid: LatentGrid = WAN_GRID
) -> tuple[Window, ...]:
    """Cut a video into windows that hand latents to the next one, as diffusers does.

    A video of at most `base_num_frames` is one window. Otherwise every window begins where the
    last `overlap_history` frames of the one before begin and takes their latents as its prefix;
    the last window may be shorter. An overlap that fills no whole chunk is cut at its end:
    the latent frames from `prefix` to `skip` are denoised once more, from their own noise, but
    the video keeps those of the window before.

    Continuing a given video differs in the first window alone: its prefix is the encoding of the
    last `overlap_history` frames of that video, with the same cut at the end, and `num_frames`
    counts these frames too. The prefix stays in the video: what comes out begins with the VAE's
    round trip of the given frames, and only what exceeds them is new. (diffusers puts the given
    video in front of it, where its last frames are seen a second time.)

    Args:
        options: Accepted by `validate_options` with the same prefix and grid.
        prefix_latent_frames: Encoded latent frames of the video to continue, at most those of
            `overlap_history`; 0 without one.
        grid: Of the model.

    Returns:
        The windows in the order of time.

    Source:
        diffusers 0.42.1, pipeline_skyreels_v2_diffusion_forcing.py and
        pipeline_skyreels_v2_diffusion_forcing_v2v.py.

    Example:
        >>> plan_windows(GenerationOptions(num_frames=177))[1]
        Window(first=20, frames=25, prefix=5, skip=5)
    """
    layout = _Layout.of(options, prefix_latent_frames, grid)
    total = grid.latent_frames(options.num_frames)
    return tuple(layout.window(total, index) for index in range(layout.count(total)))


def validate_options(
    options: GenerationOptions, prefix_latent_frames: int = 0, grid: LatentGrid = WAN_GRID
) -> None:
    """Refuse whatever the schedule, the sampler or the model's grid cannot do, and say the way out.

    Args:
        options: What the user asks for.
        prefix_latent_frames: As for `plan_windows`.
        grid: Of the model.

    Raises:
        ValueError: A setting that cannot be generated; the message names the nearest that can.
    """
    check_values(options)
    check_multiple("height", options.height, grid.spatial_factor * grid.patch_size[1])
    check_multiple("width", options.width, grid.spatial_factor * grid.patch_size[2])
    _check_steps(options)
    _check_base(options, grid)
    _check_overlap(options, grid)
    if 0 < prefix_latent_frames < options.causal_block_size:
        raise ValueError(
            f"video to continue: expected at least {grid.pixel_frames(options.causal_block_size)} "
            f"frames, a chunk of {options.causal_block_size} latent frames, "
            f"got {prefix_latent_frames} latent frames. Pass a longer video."
        )
    check_frames(options, prefix_latent_frames, grid)


def check_frames(
    options: GenerationOptions, prefix_latent_frames: int = 0, grid: LatentGrid = WAN_GRID
) -> None:
    """Refuse a `num_frames` of which a window would not fill whole chunks, or would add nothing.

    diffusers does not check this: it leaves the frames that fill no chunk as noise.

    Args:
        options: Their windows (`base_num_frames`, `overlap_history`) are valid.
        prefix_latent_frames: As for `plan_windows`.
        grid: Of the model.

    Raises:
        ValueError: With the nearest counts below and above that can be generated.
    """
    layout = _Layout.of(options, prefix_latent_frames, grid)
    beyond = f" beyond the {prefix_latent_frames} given" if prefix_latent_frames else ""
    expected = f"a count that fills whole chunks of {layout.chunk} latent frames{beyond}"
    _check_count("num_frames", options.num_frames, expected, layout.fits, grid)


def _check_count(
    name: str, got: int, expected: str, fits: Callable[[int], bool], grid: LatentGrid
) -> None:
    """Refuse a frame count whose latent frames do not fit; there is always a larger one that does.

    Raises:
        ValueError: With the nearest counts below and above.
    """
    latent = grid.latent_frames(got)
    if got == grid.pixel_frames(latent) and fits(latent):
        return
    below = next((count for count in range(latent, 0, -1) if fits(count)), None)
    above = next(count for count in itertools.count(latent + 1) if fits(count))
    choices = [str(grid.pixel_frames(count)) for count in (below, above) if count is not None]
    raise ValueError(f"{name}: expected {expected}, got {got}. Use {' or '.join(choices)}.")


def _check_base(options: GenerationOptions, grid: LatentGrid) -> None:
    """Hold a window to two chunks or more, so that it can overlap the next and go on."""
    chunk = options.causal_block_size
    expected = f"a count that fills two or more whole chunks of {chunk} latent frames"
    _check_count(
        "base_num_frames",
        options.base_num_frames,
        expected,
        lambda count: count >= 2 * chunk and count % chunk == 0,
        grid,
    )


def _check_overlap(options: GenerationOptions, grid: LatentGrid) -> None:
    """Hold the overlap between one chunk, which it must fill, and the window, which must go on.

    Raises:
        ValueError: With the nearest overlap that is possible.
    """
    low = options.causal_block_size
    high = grid.latent_frames(options.base_num_frames) - 1
    latent = grid.latent_frames(options.overlap_history)
    if options.overlap_history == grid.pixel_frames(latent) and low <= latent <= high:
        return
    raise ValueError(
        f"overlap_history: expected {grid.temporal_factor}k + 1 frames from one chunk "
        f"({grid.pixel_frames(low)}) to below base_num_frames ({grid.pixel_frames(high)}), "
        f"got {options.overlap_history}. Use {grid.pixel_frames(min(max(latent, low), high))}."
    )


def check_multiple(name: str, got: int, unit: int, reason: str = "") -> None:
    """Hold a size to whole units.

    Args:
        name: Of the size, for the message.
        got: The size.
        unit: What it has to be a multiple of.
        reason: What the unit is, where the name does not say it.

    Raises:
        ValueError: With the nearest sizes below and above.
    """
    if got % unit or not got:
        below = got - got % unit
        choices = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"{name}: expected a multiple of {unit}{reason}, got {got}. Use {choices}."
        )


def _check_steps(options: GenerationOptions) -> None:
    """Hold the step count to where the model can tell the first two timesteps apart.

    diffusers' scheduler loses count when they are equal and fails at the last step.

    Raises:
        ValueError: With the largest count that this shift allows.
    """

    def repeats(steps: int) -> bool:
        timesteps = sigma_table(steps, options.flow_shift, options.sigma_table)[1]
        return steps > 1 and bool(timesteps[0] == timesteps[1])

    steps = options.num_inference_steps
    if repeats(steps):
        most = bisect.bisect_left(range(1, steps), True, key=repeats)
        raise ValueError(
            f"num_inference_steps: expected at most {most} with flow_shift "
            f"{options.flow_shift:g}, or the first two timesteps are equal, got {steps}. "
            "Use fewer steps or a lower flow_shift."
        )
