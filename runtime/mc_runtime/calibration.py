"""Uncached runs of a bundle, and fitting the rescaling of a cache policy to them.

`record_changes` measures how much the block output of every chunk changes from step to step,
`fit_rescaling` predicts that from the change of the modulation. Both are for the rules that
rescale, those of SkyReels-V2; a rule that takes distances as they are needs `run_uncached` alone.
Neighbours: `calibration_job` runs them and then `search_threshold`; `motioncache.distance.rescale`
evaluates the polynomial in every run with the preset.
"""

__all__ = [
    "MAX_DEGREE",
    "MIN_STEPS",
    "Fit",
    "Reference",
    "Samples",
    "fit_rescaling",
    "join_samples",
    "measure_r_squared",
    "record_changes",
    "run_uncached",
]

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from mc_engines.runner import Array, Arrays, Runner
from mc_engines.specs import GraphSpec
from mc_runtime.distances import measure_distances
from mc_runtime.generation import Progress
from mc_runtime.options import Video
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.run_plan import RunPlan
from motioncache import none

MAX_DEGREE = 4  # of the published polynomials
MIN_STEPS = 3  # with different distances: a line, and one to judge it by


@dataclass(frozen=True)
class Samples:
    """How the modulation and the block output of chunks changed from one step to the next.

    Attributes:
        step: From 0, so at least 1; shape (n,), int64.
        distance: Relative change of the modulation, shape (n,), float64.
        change: mean |h_s - h_(s-1)| / mean |h_(s-1)| of a chunk's block output h in one guidance
            branch, shape (n,), float64.
    """

    step: NDArray[np.int64]
    distance: NDArray[np.float64]
    change: NDArray[np.float64]

    def after(self, step: int) -> "Samples":
        """Return those of later steps, such as the steps after a warm-up."""
        later = self.step > step
        return Samples(self.step[later], self.distance[later], self.change[later])


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Put the samples of several runs together."""
    return Samples(
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.distance for part in parts]),
        np.concatenate([part.change for part in parts]),
    )


@dataclass(frozen=True)
class Reference:
    """An uncached run, and what a run with a policy needs to be compared with it.

    Attributes:
        inputs: Arguments of `VideoPipeline.run`, `options` among them.
        video: What it gave. Its trace's time includes that of measuring the changes where they are
            measured, one look at the output per step.
    """

    inputs: Mapping[str, Any]
    video: Video


def run_uncached(
    pipeline: VideoPipeline,
    inputs: Mapping[str, Any],
    callback: Callable[[Progress], None] = lambda _: None,
) -> Reference:
    """Generate without a cache.

    Args:
        pipeline: Of the bundle.
        inputs: Arguments of `VideoPipeline.run`, with `options`.
        callback: Called after every row of the schedule.

    Returns:
        The run.

    Raises:
        ValueError: A setting or an input that cannot be generated from.
        EngineError: An engine failed, or computed NaN.
    """
    # The policy itself, not its name: looking one up would read the presets of the bundle, and a
    # damaged one could not be replaced.
    return Reference(inputs, pipeline.run(**inputs, policy=none(), callback=callback))


def record_changes(
    pipeline: VideoPipeline,
    inputs: Mapping[str, Any],
    callback: Callable[[Progress], None] = lambda _: None,
) -> tuple[Reference, Samples]:
    """Generate without a cache and measure how much changes from step to step.

    Args:
        pipeline: Of the bundle.
        inputs: Arguments of `VideoPipeline.run`, with `options` and without a video to continue.
        callback: Called after every row of the schedule.

    Returns:
        The run, and a sample per step but the first, chunk and guidance branch.

    Raises:
        ValueError: A setting or an input that cannot be generated from.
        EngineError: An engine failed, or computed NaN.
    """
    transformer = pipeline.transformer
    calls = _head_calls(pipeline.plan(inputs["options"]))
    recorder = _Recorder(transformer.runners["head"], calls)
    observed = copy(pipeline)  # shares every engine that is already open
    observed.transformer = replace(transformer, runners={**transformer.runners, "head": recorder})
    reference = run_uncached(observed, inputs, callback)
    steps = np.array(recorder.steps, np.int64)
    table = measure_distances(pipeline, inputs["options"])
    distances = np.array([table.of_step(step) for step in recorder.steps])
    return reference, Samples(steps, distances, np.array(recorder.changes))


class _Recorder:
    """The head, whose input is the block output of a step: measures how that changes.

    Args:
        runner: The head.
        calls: Guidance branch, chunk and step from 0 of every call, in the order of the loop.
    """

    def __init__(self, runner: Runner, calls: Iterator[tuple[int, int, int]]) -> None:
        self.graph: GraphSpec = runner.graph
        self.steps: list[int] = []
        self.changes: list[float] = []
        self._runner, self._calls = runner, calls
        self._last: dict[tuple[int, int], Array] = {}

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Array]:
        branch, chunk, step = next(self._calls)
        out = inputs["out"]
        if step:
            before = self._last[branch, chunk]
            change = np.abs(out - before).mean(dtype=np.float64)
            self.steps.append(step)
            self.changes.append(float(change / np.abs(before).mean(dtype=np.float64)))
        self._last[branch, chunk] = out
        return self._runner.run(inputs, weights)


def _head_calls(plan: RunPlan) -> Iterator[tuple[int, int, int]]:
    """Branch, chunk and step from 0 in the order in which `denoise_window` calls the head."""
    for matrix in plan.matrices:
        for step, update in zip(matrix.step, matrix.update, strict=True):
            for chunk in np.flatnonzero(update).tolist():
                for branch in range(plan.shape.branches):
                    yield branch, chunk, int(step[chunk]) - 1


@dataclass(frozen=True)
class Fit:
    """A polynomial that predicts the change of the output from that of the modulation.

    Attributes:
        coefficients: Highest power first.
        r_squared: On the samples of the fit.
    """

    coefficients: tuple[float, ...]
    r_squared: float

    @property
    def degree(self) -> int:
        """Of the polynomial."""
        return len(self.coefficients) - 1


def fit_rescaling(samples: Samples) -> Fit:
    """Fit the polynomial of least squares whose degree the data can carry.

    The degree is 1 to 4. Each distance but the smallest and the greatest, beyond which a
    polynomial is not asked, is left out in turn and predicted from the others; the lowest degree
    is taken whose squared errors exceed those of the best degree by no more than the standard
    error of the difference.

    Args:
        samples: Of several runs.

    Returns:
        The polynomial, fitted on all samples.

    Raises:
        ValueError: The samples have less than three different distances.

    Source:
        TeaCache (arXiv 2411.19108), section 3.3, for the idea. The rule of one standard error:
        Breiman et al., Classification and Regression Trees (1984), section 3.4.3; here of paired
        differences.
    """
    distances = np.unique(samples.distance)
    if len(distances) < MIN_STEPS:
        raise ValueError(
            f"fit: expected at least {MIN_STEPS} steps with different distances after the "
            f"warm-up, got {len(distances)}. Raise num_inference_steps, or lower warmup_steps."
        )
    degrees = range(1, min(MAX_DEGREE, len(distances) - 2) + 1)
    errors = np.array(
        [
            [_predict_left_out(samples, left, degree) for left in distances[1:-1]]
            for degree in degrees
        ]
    )
    excess = errors - errors[errors.mean(axis=1).argmin()]
    as_good = excess.mean(axis=1) <= excess.std(axis=1) / np.sqrt(errors.shape[1])
    coefficients = _fit(samples.distance, samples.change, degrees[int(as_good.argmax())])
    return Fit(coefficients, measure_r_squared(coefficients, samples))


def _predict_left_out(samples: Samples, left_out: float, degree: int) -> float:
    """Mean squared error at a distance, predicted from all others."""
    out = samples.distance == left_out
    coefficients = _fit(samples.distance[~out], samples.change[~out], degree)
    return float(np.mean((samples.change[out] - np.polyval(coefficients, left_out)) ** 2))


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], degree: int) -> tuple[float, ...]:
    """Coefficients, highest power first; fitted with x scaled to -1 to 1, where it is accurate."""
    return tuple(Polynomial.fit(x, y, degree).convert().coef[::-1].tolist())


def measure_r_squared(coefficients: Sequence[float], samples: Samples) -> float:
    """Say which share of the variance of the changes a polynomial explains.

    Args:
        coefficients: Highest power first.
        samples: Those of the fit, or others.

    Returns:
        1 - sum (y - p(x))^2 / sum (y - mean y)^2: at most 1, below 0 where the mean predicts
        better, and 0 where no change differs from another.
    """
    residual = samples.change - np.polyval(coefficients, samples.distance)
    spread = ((samples.change - samples.change.mean()) ** 2).sum()
    return float(1 - (residual**2).sum() / spread) if spread else 0.0
