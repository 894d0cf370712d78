"""Finding the threshold of a cache policy that reaches a PSNR or a speed-up on a bundle.

Neighbours: `mc-calibrate` makes a polynomial by `fit_rescaling` for a rule that has one, then
calls `search_threshold`, which tries thresholds by `measure_trial` on the uncached runs of
`record_changes`.
"""

__all__ = ["UNREACHED", "Target", "Trial", "measure_trial", "search_threshold"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mc_runtime.calibration import Reference
from mc_runtime.fidelity import compare_videos
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.generation import Progress
from mc_runtime.pipeline import VideoPipeline
from motioncache import DecisionTrace, Policy

UNREACHED = 1e9  # above everything that a run can accumulate
SEARCH_TRIALS = 10  # resolve a five-hundredth of the range of thresholds
_NARROW = 0.02  # of that range
_DIGITS = 4  # significant ones of a threshold


@dataclass(frozen=True)
class Trial:
    """What a threshold reached.

    Attributes:
        threshold: Of the policy; where nothing came near it, the lowest, to a percent, with which
            the runs would have been the same.
        speedup: Operations of the uncached runs over those of the policy's.
        wall_ratio: The same of the times of denoising.
        psnr: Mean over the runs, in dB; infinite if all are equal to the uncached ones, None
            without frames.
    """

    threshold: float
    speedup: float
    wall_ratio: float
    psnr: float | None = None


@dataclass(frozen=True)
class Target:
    """What is to be reached: a PSNR with the highest speed-up, or a speed-up with least change.

    Attributes:
        metric: `psnr` or `speedup`.
        value: At least; dB, or times.
    """

    metric: Literal["psnr", "speedup"]
    value: float

    def is_met(self, trial: Trial) -> bool:
        """Say whether a trial reached it; a PSNR counts only where work is saved."""
        if self.metric == "speedup":
            return trial.speedup >= self.value
        return self._keeps(trial) and trial.speedup > 1

    def rank(self, trial: Trial) -> tuple[float, float]:
        """Order trials that reached it: the greater, the better."""
        psnr = trial.psnr or 0.0
        if self.metric == "speedup":
            return psnr, -trial.threshold
        return trial.speedup, psnr

    def _keeps(self, trial: Trial) -> bool:
        return trial.psnr is not None and trial.psnr >= self.value

    def allows_less(self, trial: Trial) -> bool:
        """Say whether the threshold looked for is below that of a trial, or is that one."""
        return not self._keeps(trial) if self.metric == "psnr" else self.is_met(trial)


def search_threshold(
    evaluate: Callable[[float], Trial], target: Target
) -> tuple[Trial, list[Trial]]:
    """Find the threshold that reaches a target, by bisection.

    Threshold 0 recomputes everything. The first trial is of one that is never reached; from what
    accumulates in it the trial knows the lowest that does the same, below which is halved. A higher
    threshold saves more work and changes more, as a rule; where it does not, the best trial that
    reached the target still counts. In a narrow interval, a trial that saves what another saved
    ends the search: there the schedule jumps, and where exactly makes no difference.

    Args:
        evaluate: Tries a threshold; called at most ten times.
        target: What is to be reached.

    Returns:
        The best trial, and all of them in their order.

    Raises:
        ValueError: No trial reached the target; the message says what was reached.
    """
    trials = [evaluate(UNREACHED)]
    low, high = 0.0, trials[0].threshold
    narrow = _NARROW * high
    while len(trials) < SEARCH_TRIALS and target.allows_less(trials[0]):
        trials.append(evaluate(_round((low + high) / 2)))
        if target.allows_less(trials[-1]):
            high = trials[-1].threshold
        else:
            low = trials[-1].threshold
        known = {trial.speedup for trial in trials[:-1]}
        if high - low < narrow and trials[-1].speedup in known:
            break
    met = [trial for trial in trials if target.is_met(trial)]
    if not met:
        raise ValueError(_describe_miss(target, trials))
    return max(met, key=target.rank), trials


def _describe_miss(target: Target, trials: Sequence[Trial]) -> str:
    if target.metric == "speedup":
        most = max(trials, key=lambda trial: trial.speedup)
        return (
            f"target speed-up: expected {target.value:g}, got at most {most.speedup:.2f} with "
            f"threshold {most.threshold:g}. Lower the target or warmup_steps, or raise "
            "num_inference_steps."
        )
    saving = [trial for trial in trials if trial.speedup > 1] or trials
    nearest = max(saving, key=lambda trial: trial.psnr or 0.0)
    return (
        f"target PSNR: expected {target.value:g} dB with some work saved, got at most "
        f"{nearest.psnr or 0.0:.2f} dB with threshold {nearest.threshold:g}, speed-up "
        f"{nearest.speedup:.2f}. Lower the target, or raise warmup_steps or num_inference_steps."
    )


def _round(value: float) -> float:
    """Keep as many digits as a preset is to show."""
    return float(f"{value:.{_DIGITS}g}")


def measure_trial(
    pipeline: VideoPipeline,
    policy: Policy,
    references: Sequence[Reference],
    callback: Callable[[Progress], None] = lambda _: None,
) -> Trial:
    """Run a policy on the inputs of uncached runs and compare.

    Args:
        pipeline: Of the bundle.
        policy: With the threshold to try.
        references: Uncached runs, with frames or without.
        callback: Called after every row of a schedule.

    Returns:
        Speed-up and wall ratio over all runs together, and the mean of their PSNR. The operations
        are those of the denoising, computed from the traces.

    Raises:
        ValueError: The policy does not fit the runs.
        EngineError: An engine failed, or computed NaN.
    """
    flops = ModelFlops.from_manifest(pipeline.bundle.manifest.config["transformer"])
    psnr: list[float] = []
    traces: list[DecisionTrace] = []
    for reference in references:
        video = pipeline.run(**reference.inputs, policy=policy, callback=callback)
        traces.append(video.trace)
        if video.frames is not None and reference.video.frames is not None:
            score = compare_videos(reference.video.frames, video.frames).video.whole.psnr
            psnr.append(np.inf if score is None else score)
    before = [reference.video.trace for reference in references]
    work, time = (
        [sum(map(measure, runs)) for runs in (before, traces)]
        for measure in (lambda trace: count_work(flops, trace, padded=True).total, _milliseconds)
    )
    return Trial(
        min(policy.config.threshold, _bound_threshold(traces)),
        work[0] / work[1],
        time[0] / time[1],
        _mean_psnr(psnr) if psnr else None,
    )


def _bound_threshold(traces: Sequence[DecisionTrace]) -> float:
    """A threshold above all that accumulated, and not much: what stayed below it still does."""
    highest = max(float(np.nanmax(trace.accumulated, initial=0.0)) for trace in traces)
    return _round(1.01 * highest) or 1.0


def _milliseconds(trace: DecisionTrace) -> float:
    return float(trace.engine_ms.sum(dtype=np.float64) + trace.host_ms.sum(dtype=np.float64))


def _mean_psnr(values: Sequence[float]) -> float:
    """Over the runs that differ from the uncached ones; infinite if none does."""
    differing = [value for value in values if value < np.inf]
    return sum(differing) / len(differing) if differing else np.inf
