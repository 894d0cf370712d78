"""UniPC of order 2 on the flow's noise levels, as a table of coefficients and one pure step.

`sampler_table` turns steps and shift into numbers once per run; `sampler_step` then advances the
latents of one chunk by a handful of array operations. The loop keeps one `SamplerState` per chunk
of a window. `sigma_table` also gives the timesteps that the model is told, and from which the
caching policy's distances come.

With noise levels s (sigma), a = 1 - s, l = log(a / s), velocity v and predicted clean latents
m = x - s*v, one step from s0 to s with r = s / s0 and h = l - l0 is

    predictor   x' = r*x + (1-r) * (m0 + (m1 - m0) / (2*q))           q = (l1 - l0) / h < 0
    corrector   x  = r*y + (1-r) * (m0 + c1 * (m1 - m0) / q + c2 * (m - m0))

where y is the sample that the step before started from, m0 and m1 are the clean latents predicted
there and one step earlier, and m is the one predicted now. Of first order the terms with q are
absent and c2 = 1/2.
"""

__all__ = [
    "SamplerState",
    "SamplerTable",
    "init_sampler",
    "sampler_step",
    "sampler_table",
    "sigma_table",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_runtime.options import FirstSample, SigmaTable

TRAIN_TIMESTEPS = 1000
SIGMA_RANGES: dict[SigmaTable, tuple[float, float]] = {
    "diffusers": (1.0, 1 / TRAIN_TIMESTEPS),
    "skyreels": (float(np.float32(1 - 1 / TRAIN_TIMESTEPS)), 0.0),
}


@dataclass(frozen=True)
class SamplerTable:
    """What the steps of every chunk have in common; made once per run by `sampler_table`.

    Attributes:
        sigmas: Noise levels from 1 (noise) to 0 (clean), shape (N+1,), float32.
        timesteps: What the model is told in step k, shape (N,), int64, 0 to 999.
        correctors: Per step the factors of y, m, m0, m1 in the sample, shape (N, 4), float64; the
            first row takes the latents as they are.
        predictors: Per step the factors of x, m0, m1 in the next sample, shape (N, 3), float64.
        first_sample: What the corrector of the second step starts from, see `sampler_step`.
    """

    sigmas: NDArray[np.float32]
    timesteps: NDArray[np.int64]
    correctors: NDArray[np.float64]
    predictors: NDArray[np.float64]
    first_sample: FirstSample


@dataclass(frozen=True)
class SamplerState:
    """What one chunk remembers between its steps. Its arrays belong to it: nobody writes there.

    Attributes:
        step: Steps taken so far.
        sample: y, the sample that the last step started from; None before the first.
        clean: Clean latents predicted in the last two steps, newest first.
    """

    step: int = 0
    sample: NDArray[np.float32] | None = None
    clean: tuple[NDArray[np.float32], ...] = ()


def sigma_table(
    steps: int, shift: float, kind: SigmaTable
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """List the noise levels of a run and the timesteps that the model is told.

    Both tables sample the flow evenly and shift it towards noise by
    `shift*s / (1 + (shift-1)*s)`. `diffusers` runs from 1, lowered by 1e-6 so that its logarithm
    stays finite, towards 1/1000; `skyreels` from 0.999 (as a float32) towards 0. The end point
    itself is replaced by 0.

    Args:
        steps: Denoising steps N.
        shift: Above 1 puts more steps where there is much noise.
        kind: Whose table.

    Returns:
        Sigmas, shape (N+1,), and timesteps, shape (N,), `1000 * sigma` cut to whole numbers.

    Source:
        diffusers 0.42.1, scheduling_unipc_multistep.py, flow sigmas; SkyReels-V2 abed76f,
        fm_solvers_unipc.py.

    Example:
        >>> sigma_table(50, 8.0, "diffusers")[1][-4:].tolist()
        [413, 341, 254, 146]
        >>> sigma_table(50, 8.0, "skyreels")[1][-4:].tolist()
        [409, 337, 249, 140]
    """
    even = np.linspace(*SIGMA_RANGES[kind], steps + 1)[:-1]
    sigmas = shift * even / (1 + (shift - 1) * even)
    if kind == "diffusers":
        sigmas[0] -= 1e-6
    timesteps = (sigmas * TRAIN_TIMESTEPS).astype(np.int64)
    return np.append(sigmas, 0.0).astype(np.float32), timesteps


def sampler_table(
    steps: int, shift: float, kind: SigmaTable, first_sample: FirstSample
) -> SamplerTable:
    """Compute the coefficients of every step of a run, in float64 from the float32 sigmas.

    Args:
        steps: Denoising steps N.
        shift: Of the sigma table.
        kind: Whose sigma table.
        first_sample: `copied` or `aliased`, see `sampler_step`.

    Returns:
        The table that `sampler_step` reads.

    Source:
        UniPC, https://arxiv.org/abs/2302.04867: UniP-2 and UniC-2 for data prediction with
        B(h) = exp(-h) - 1; the first and the last step are of first order.
    """
    sigmas, timesteps = sigma_table(steps, shift, kind)
    levels = [float(sigma) for sigma in sigmas]
    return SamplerTable(
        sigmas=sigmas,
        timesteps=timesteps,
        correctors=np.array([_corrector(levels, step) for step in range(steps)]),
        predictors=np.array([_predictor(levels, step) for step in range(steps)]),
        first_sample=first_sample,
    )


def init_sampler() -> SamplerState:
    """Start a chunk that has taken no step."""
    return SamplerState()


def sampler_step(
    table: SamplerTable,
    state: SamplerState,
    velocity: NDArray[np.float32],
    latents: NDArray[np.float32],
) -> tuple[NDArray[np.float32], SamplerState]:
    """Advance the latents of one chunk by one step: correct the sample, then predict the next.

    `table.first_sample` says which y the second step's corrector sees. `copied` is UniPC: the
    latents that the first step started from. `aliased` is diffusers' pipeline: it hands the
    scheduler a view of its latents and then overwrites them, so y is what the first step made.

    Args:
        table: Of this run.
        state: Of this chunk, after as many steps as it has taken.
        velocity: The model's output for `latents` after guidance, the same shape.
        latents: What the step before returned (or the noise), any shape.

    Returns:
        The next latents and the state after this step; the arguments stay as they were.

    Raises:
        ValueError: The chunk has taken all its steps, or the shapes differ.
    """
    step = state.step
    if step == len(table.timesteps):
        raise ValueError(
            f"sampler: expected at most {step} steps of a chunk, got one more. "
            "Start the next chunk with init_sampler()."
        )
    if velocity.shape != latents.shape:
        raise ValueError(
            f"velocity: expected shape {latents.shape}, got {velocity.shape}. "
            "Pass the velocity of the same chunk."
        )
    start = latents if state.sample is None else state.sample
    clean = (latents - table.sigmas[step] * velocity, *state.clean)
    sample = _combine(table.correctors[step], (start, *clean))
    following = _combine(table.predictors[step], (sample, *clean))
    if step == 0 and table.first_sample == "aliased":
        sample = following.copy()  # the caller may write into the one it gets
    return following, SamplerState(step + 1, sample, clean[:2])


def _combine(
    factors: NDArray[np.float64], arrays: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Add up `factor * array`; where an array is still missing, its factor is 0."""
    first, *others = [
        float(factor) * array for factor, array in zip(factors, arrays, strict=False) if factor
    ]
    for other in others:
        first += other
    return first


def _order(levels: Sequence[float], step: int) -> int:
    """Order of the predictor of `step`, and of the corrector one step later."""
    return 1 if step in (0, len(levels) - 2) else 2


def _log_ratio(sigma: float) -> float:
    """Logarithm of signal over noise, l = log((1 - s) / s)."""
    return math.log((1.0 - sigma) / sigma)


def _history_ratio(levels: Sequence[float], step: int) -> float:
    """Ratio q of the step from `step` to the next: how far back m1 lies, in units of h."""
    before, here, there = (_log_ratio(levels[k]) for k in (step - 1, step, step + 1))
    return (before - here) / (there - here)


def _predictor(levels: Sequence[float], step: int) -> tuple[float, float, float]:
    """Factors of x, m0, m1 (the module's docstring) in the step from `step` to the next."""
    keep = levels[step + 1] / levels[step]
    bend = 0.0
    if _order(levels, step) == 2:
        bend = (1.0 - keep) / (2.0 * _history_ratio(levels, step))
    return keep, 1.0 - keep - bend, bend


def _corrector(levels: Sequence[float], step: int) -> tuple[float, float, float, float]:
    """Factors of y, m, m0, m1 (the module's docstring) in the sample at `step`."""
    if step == 0:
        return 1.0, 0.0, 0.0, 0.0
    keep = levels[step] / levels[step - 1]
    move = 1.0 - keep
    if _order(levels, step - 1) == 1:
        return keep, move / 2, move / 2, 0.0
    q = _history_ratio(levels, step - 1)
    c1, c2 = _corrector_weights(_log_ratio(levels[step]) - _log_ratio(levels[step - 1]), q)
    return keep, move * c2, move * (1.0 - c1 / q - c2), move * c1 / q


def _corrector_weights(h: float, q: float) -> tuple[float, float]:
    """Solve UniC's two order conditions: c1 + c2 = b1, q*c1 + c2 = b2."""
    growth = math.expm1(-h)
    phi = growth / -h - 1.0
    b1 = phi / growth
    b2 = 2.0 * (phi / -h - 0.5) / growth
    c1 = (b1 - b2) / (1.0 - q)
    return c1, b1 - c1
