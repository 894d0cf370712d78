"""Finding the settings of a cache policy that it has no default for, on uncached runs of a bundle.

These are the coefficients, where the rule rescales distances, by a fit on every other run, and each
threshold, by a search on the rest. Where coefficients are given, and by the rules of MAGI-1, which
take distances as they are, nothing is fitted, and all runs are for the search. A rule with two
thresholds gets the same number for both, as published: in its coarse phase it then computes a chunk
where in its fine phase it would compute the tokens that move most.

Neighbours: `calibration` measures and fits, `threshold_search` searches; `mc-calibrate` makes a
preset of what was found.
"""

__all__ = ["FITTED", "Calibration", "Job", "calibrate"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import click
import numpy as np

from mc_runtime.calibration import (
    Reference,
    Samples,
    fit_rescaling,
    join_samples,
    measure_r_squared,
    record_changes,
    run_uncached,
)
from mc_runtime.display import Display
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.prompts import encode_prompts
from mc_runtime.threshold_search import Target, Trial, measure_trial, search_threshold
from motioncache import Policy, make_policy
from motioncache.presets import list_required

FITTED = "coefficients"
_AS_IT_IS = (1.0, 0.0)  # coefficients that change nothing
_LOW_R_SQUARED = 0.5
_Made = TypeVar("_Made")  # by a run: a reference, with samples or without


@dataclass(frozen=True)
class Job:
    """What is to be calibrated.

    Attributes:
        pipeline: Of the bundle.
        prompts: A run for each.
        options: Of the runs, with the seed of the first.
        decode: Whether frames are compared.
        policy: Its name.
        policy_options: Settings that are not to be found; coefficients may be among them.
        target: Of the search.
        key: Of the preset.
        quiet: Whether no progress is shown.
        say: Called with what the user should know.
    """

    pipeline: VideoPipeline
    prompts: Sequence[str]
    options: Any
    decode: bool
    policy: str
    policy_options: Mapping[str, Any]
    target: Target
    key: str
    quiet: bool
    say: Callable[[str], None]

    @property
    def warmup_steps(self) -> int:
        """Of the policy: its last step that is computed in full."""
        warmup_steps: int = self.make_policy(0.0).config.warmup_steps
        return warmup_steps

    @property
    def rescales(self) -> bool:
        """Whether the policy rescales distances by coefficients that are to be found."""
        return FITTED in self._required and FITTED not in self.policy_options

    @property
    def _required(self) -> tuple[str, ...]:
        return list_required(self.policy, self.pipeline.family.name)

    def make_policy(self, threshold: float, coefficients: tuple[float, ...] = _AS_IT_IS) -> Policy:
        """Bind a threshold, and coefficients where the policy has them."""
        found: dict[str, Any] = dict.fromkeys(self._required, threshold)
        if self.rescales:
            found[FITTED] = coefficients
        options = {**found, **self.policy_options}
        return make_policy(self.policy, options, self.pipeline.family.name)


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        policy: With these settings.
        best: The trial of its threshold.
        fit: Of the coefficients, in words.
    """

    policy: Policy
    best: Trial
    fit: str


def calibrate(job: Job) -> Calibration:
    """Measure, fit and search, and print what comes out.

    Args:
        job: What is to be calibrated; its policy has accepted the shape of the runs.

    Returns:
        The settings.

    Raises:
        ValueError: The target is out of reach, or the distances carry no fit.
        EngineError: An engine failed, or computed NaN.
    """
    runs = _plan_runs(job)
    if job.rescales:
        references, coefficients, fit = _fit(job, runs)
    else:
        references = [
            _run(job, run_uncached, runs, number, "search") for number in range(len(runs))
        ]
        coefficients = _AS_IT_IS
        fit = "coefficients given" if job.policy_options.get(FITTED) else "distances not rescaled"
    best = _search(job, coefficients, references)
    return Calibration(job.make_policy(best.threshold, coefficients), best, fit)


def _plan_runs(job: Job) -> list[Mapping[str, Any]]:
    """Make the arguments of one run per prompt, each with a seed of its own."""
    note = cache(job.say)  # says a thing once, however many runs there are
    texts = encode_prompts(job.pipeline, job.prompts, job.options, note)
    return [
        {
            **embeddings,
            "options": replace(job.options, seed=job.options.seed + number),
            "decode": job.decode,
            "note": note,
        }
        for number, embeddings in enumerate(texts)
    ]


def _run(
    job: Job,
    run: Callable[..., _Made],
    runs: Sequence[Mapping[str, Any]],
    number: int,
    purpose: str,
) -> _Made:
    job.say(f"Uncached run {number + 1} of {len(runs)}, for the {purpose}")
    with Display(job.quiet) as display:
        return run(job.pipeline, runs[number], display.advance)


def _fit(
    job: Job, runs: Sequence[Mapping[str, Any]]
) -> tuple[list[Reference], tuple[float, ...], str]:
    """Fit on the runs of one half, and see how the fit does on those of the other.

    Returns:
        The other half, the coefficients, and how good they are.
    """
    fitted: list[Samples] = []
    references: list[Reference] = []
    others: list[Samples] = []
    for number in range(len(runs)):
        purpose = "search" if number % 2 else "fit"
        reference, samples = _run(job, record_changes, runs, number, purpose)
        if number % 2:
            references.append(reference)
            others.append(samples)
        else:  # its frames need not be kept
            fitted.append(samples)
    fit = fit_rescaling(join_samples(fitted).after(job.warmup_steps))
    unseen = measure_r_squared(fit.coefficients, join_samples(others).after(job.warmup_steps))
    click.echo(
        f"Fit: degree {fit.degree}, R-squared {fit.r_squared:.3f} on {len(fitted)} runs, "
        f"{unseen:.3f} on {len(others)} others."
    )
    if min(fit.r_squared, unseen) < _LOW_R_SQUARED:
        job.say(
            "How far the timestep moves says little about how much this model's output changes: "
            "the policy will hardly do better than reuse at fixed intervals, which --policy-option "
            "coefficients=0,1 makes of it."
        )
    text = f"degree {fit.degree}, R-squared {fit.r_squared:.4f}, on other prompts {unseen:.4f}"
    return references, fit.coefficients, text


def _search(job: Job, coefficients: tuple[float, ...], references: Sequence[Reference]) -> Trial:
    """Search the threshold, and print a line per trial."""
    click.echo(f"{'threshold':>11}{'speed-up':>10}{'wall ratio':>12}{'PSNR':>11}")

    def evaluate(threshold: float) -> Trial:
        policy = job.make_policy(threshold, coefficients)
        with Display(job.quiet) as display:
            trial = measure_trial(job.pipeline, policy, references, display.advance)
        click.echo(_row(trial))
        return trial

    best, _ = search_threshold(evaluate, job.target)
    click.echo(f"{_row(best)}  kept")
    return best


def _row(trial: Trial) -> str:
    psnr = {None: "", np.inf: "identical"}.get(trial.psnr, f"{trial.psnr or 0:.2f} dB")
    return f"{trial.threshold:>11g}{trial.speedup:>10.2f}{trial.wall_ratio:>12.2f}{psnr:>11}"
