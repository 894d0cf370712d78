"""The schedule of a run that has not begun, step by step, as far as motion does not decide it.

On SkyReels-V2 the distances depend on the timesteps and the frame rate alone: `measure_distances`
has them before the run, and `motioncache.forecast` follows the policy. On MAGI-1 they depend on
what is generated: what is known are the steps that ask for none. `mc-inspect --policy` prints what
comes out.
"""

__all__ = ["Line", "Schedule", "forecast_schedule"]

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mc_runtime.distances import measure_distances
from mc_runtime.inputs import check_policy
from mc_runtime.pipeline import VideoPipeline
from motioncache import DistanceTable, Plan, Policy, RunShape
from motioncache.config import switches
from motioncache.distance import rescale
from motioncache.forecast import forecast_chunk, forecast_unmeasured, forecast_window
from motioncache.motion import MotionCacheConfig

Decision = Literal["full", "reuse", "depends on motion", "depends on content"]


@dataclass(frozen=True)
class Line:
    """A step that every chunk takes, or a row in which a policy decides for all its chunks.

    Attributes:
        row: Of the run, from 0; None where every chunk has the same schedule.
        steps: The step, from 1; in a row, that of each chunk that is active in it.
        timesteps: What the model is told in each of `steps`.
        distance: Relative change of the modulation since the step or row before; None where it is
            not known before the run.
        rescaled: Of the distance, below 0 where the polynomial is; None where it does not count.
        accumulated: What is compared with the threshold; None where nothing is, or not known.
        decision: What happens to the tokens. A chunk's first step is full in any case.
    """

    row: int | None
    steps: tuple[int, ...]
    timesteps: tuple[float, ...]
    distance: float | None
    rescaled: float | None
    accumulated: float | None
    decision: Decision

    def decisions(self) -> list[Decision]:
        """Return what happens to each chunk."""
        return ["full" if step == 1 else self.decision for step in self.steps]

    def cells(self) -> list[str]:
        """Write every field but the row; chunks that are level with each other are named once."""
        numbers = self.distance, self.rescaled, self.accumulated
        starts = self.decision != "full" and 1 in self.steps
        return [
            " ".join(map(str, dict.fromkeys(self.steps))),
            " ".join(f"{timestep:.4g}" for timestep in dict.fromkeys(self.timesteps)),
            *("-" if number is None else f"{number:.4f}" for number in numbers),
            self.decision + (", first step full" if starts else ""),
        ]


@dataclass(frozen=True)
class Schedule:
    """What is known of a run before it starts.

    Attributes:
        policy: That was followed.
        options: Of the run.
        lines: Of the steps of any chunk, or of the rows of the run.
    """

    policy: Policy
    options: Any
    lines: tuple[Line, ...]

    @property
    def unit(self) -> str:
        """What a line stands for."""
        return "step" if self.policy.scope == "chunk" else "row"

    def totals(self) -> dict[str, int]:
        """Count the decisions on steps: of one chunk, or of all chunks where rows are decided."""
        decisions = [decision for line in self.lines for decision in line.decisions()]
        return {
            "steps": len(decisions),
            "full": decisions.count("full"),
            "reuse": decisions.count("reuse"),
            "not_known": sum(decision.startswith("depends") for decision in decisions),
        }

    def negative(self) -> list[int]:
        """Return the steps, or rows, whose rescaled distance is negative."""
        return [
            line.steps[0] if line.row is None else line.row
            for line in self.lines
            if line.rescaled is not None and line.rescaled < 0
        ]

    def warning(self) -> str | None:
        """Say which rescaled distances are negative, and what the policy makes of them."""
        negative = self.negative()
        if not negative:
            return None
        fate = "count as 0" if _clamps(self.policy) else "are subtracted from what accumulates"
        return (
            "coefficients: expected rescaled distances of 0 or more, got negative ones in "
            f"{self.unit}s {_ranges(negative)}. They {fate}; run mc-calibrate to fit "
            "coefficients to this bundle."
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        config = self.policy.config
        return {
            "policy": {
                "name": self.policy.name,
                "preset": self.policy.preset,
                "config": None if config is None else asdict(config),
            },
            "options": asdict(self.options),
            "lines": [asdict(line) for line in self.lines],
            "totals": self.totals(),
            "negative": self.negative(),
        }


def forecast_schedule(
    pipeline: VideoPipeline,
    policy: Policy,
    options: Any,
    note: Callable[[str], None] = warnings.warn,
) -> Schedule:
    """Follow a policy through a run without running it.

    Args:
        pipeline: Of the bundle; its transformer is not loaded.
        policy: Decides.
        options: Of the run.
        note: Called where a preset was made for another run.

    Returns:
        Its schedule: step by step for a policy that decides chunk by chunk, else row by row.

    Raises:
        ValueError: A setting cannot be generated, or the policy does not fit the run.
        BundleError: The bundle has no timestep component.
    """
    shape = pipeline.plan(options).shape
    check_policy(policy, shape, note)
    timesteps = pipeline.family.timesteps(options, pipeline.bundle.manifest.config)
    if pipeline.family.measures_inputs:
        return Schedule(policy, options, tuple(_follow_unmeasured(policy, shape, timesteps)))
    table = measure_distances(pipeline, options)
    follow = _follow_chunk if policy.scope == "chunk" else _follow_rows
    return Schedule(policy, options, tuple(follow(policy, shape, timesteps, table)))


def _follow_chunk(
    policy: Policy, shape: RunShape, timesteps: NDArray[np.int64], table: DistanceTable
) -> Iterator[Line]:
    plans = {step.number: step.plan for step in forecast_chunk(policy, shape, table)}
    if _forces_last(policy):
        plans.setdefault(shape.steps, Plan.full(shape.tokens))
    for number, timestep in enumerate(timesteps.tolist(), start=1):
        distance, plan = table.of_step(number - 1), plans.get(number)
        yield Line(
            None,
            (number,),
            (timestep,),
            distance,
            _rescaled(policy, distance, plan),
            _accumulated(plan),
            _decision(plan),
        )


def _follow_unmeasured(
    policy: Policy, shape: RunShape, timesteps: NDArray[np.float32]
) -> Iterator[Line]:
    plans = {step.number: step.plan for step in forecast_unmeasured(policy, shape)}
    if _forces_last(policy):
        plans.setdefault(shape.steps, Plan.full(shape.tokens))
    for number, timestep in enumerate(timesteps.tolist(), start=1):
        decision: Decision = "full" if number in plans else "depends on content"
        yield Line(None, (number,), (timestep,), None, None, None, decision)


def _follow_rows(
    policy: Policy, shape: RunShape, timesteps: NDArray[np.int64], table: DistanceTable
) -> Iterator[Line]:
    for window, start in enumerate(shape.window_start):
        active = shape.active[shape.rows_of(window)]
        taken = np.cumsum(active, axis=0)
        for row, known in enumerate(forecast_window(policy, shape, table, window)):
            steps = taken[row][active[row]]
            yield Line(
                start + row,
                tuple(steps.tolist()),
                tuple(timesteps[steps - 1].tolist()),
                known.distance,
                _rescaled(policy, known.distance, known.plan),
                _accumulated(known.plan),
                _decision(known.plan),
            )


def _decision(plan: Plan | None) -> Decision:
    """Before motion counts a plan is all or nothing."""
    if plan is None:
        return "depends on motion"
    return "full" if plan.recompute.all() else "reuse"


def _rescaled(policy: Policy, distance: float, plan: Plan | None) -> float | None:
    """The polynomial's own value, also where the policy takes a negative one as 0."""
    if plan is not None and math.isnan(plan.distance):
        return None
    return rescale(policy.config.coefficients, distance, clamp=False)


def _accumulated(plan: Plan | None) -> float | None:
    accumulated = math.nan if plan is None else float(np.mean(plan.accumulated))
    return None if math.isnan(accumulated) else accumulated


def _forces_last(policy: Policy) -> bool:
    """Whether the last step is full whatever moves."""
    config = policy.config
    if policy.switches is not None:
        return bool(policy.switches.force_last_step)
    return isinstance(config, MotionCacheConfig) and switches(config.compat).force_last_step


def _clamps(policy: Policy) -> bool:
    """Whether a negative rescaled distance counts as 0; TeaCache has no choice of it."""
    return switches(getattr(policy.config, "compat", "fixed")).clamp_distance


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers shortly: 3 to 7, 9."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    bounds = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in bounds)
