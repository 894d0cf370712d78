"""Hold the roofline against what was measured on this CPU, and against the published latencies.

`python scripts/roofline_check.py REPORT.json` takes a report of `mc-bench run --engines`: two
constants, operations and bytes per second, are fitted on every second pass of the sweep, and the
error on the others is printed. Without a report only the published table is printed, as README.md
has it.

Published: SkyReels-V2 DF-1.3B, 540P, 177 frames, 50 steps, on an A800, from MotionCache's table 1.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bench.devices import DEVICES
from mc_runtime.bench.predict import Efficiency
from mc_runtime.bench.predicted_model import describe_model
from mc_runtime.bench.roofline import EngineCosts, Limits, predict_run
from mc_runtime.flops import Job, vanilla_work
from mc_runtime.options import GenerationOptions
from mc_runtime.published_flops import published_causal_work
from mc_runtime.run_plan import plan_run

GOAL = 0.25  # largest relative error
LEAST_TOKENS = 256  # of a pass that it holds for
TEXT = (512, 512)
# Published PFLOPs and seconds, by method; those of vanilla are not the operations that it takes.
PUBLISHED = {
    "vanilla": (113, 1540),
    "FlowCache, slow": (31, 246),
    "FlowCache, fast": (27, 214),
    "MotionCache, slow": (30, 245),
    "MotionCache, fast": (26, 212),
}


def fit(costs: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find seconds per operation and per byte, neither negative, for the least relative errors.

    Args:
        costs: Operations and bytes of each pass, shape (n, 2).
        seconds: That they took, shape (n,).
    """
    from scipy.optimize import nnls

    solution, _ = nnls(costs / seconds[:, None], np.ones(len(seconds)))
    return solution


def check_measured(path: Path) -> bool:
    """Fit every second pass, print the error on the others; return whether the goal is met."""
    print(write_measured(path))
    asked = [each for each in fit_passes(path) if each.held_out and each.counts]
    return bool(asked) and all(abs(each.error) <= GOAL for each in asked)


@dataclass(frozen=True)
class Pass:
    """A pass of a sweep beside the fit.

    Attributes:
        name: Of the pass.
        tokens: That it computes.
        seconds: Measured, the median.
        error: Of the fitted seconds, relative.
        held_out: Whether the constants were fitted without it.
    """

    name: str
    tokens: int
    seconds: float
    error: float
    held_out: bool

    @property
    def counts(self) -> bool:
        """Whether the goal is asked of it."""
        return self.tokens >= LEAST_TOKENS


def fit_passes(path: Path) -> list[Pass]:
    """Fit every second pass of a report."""
    passes = [
        each for each in json.loads(path.read_text())["engines"] if each["component"] == "block"
    ]
    costs = np.array(
        [
            (each["cost"]["flops"], each["cost"]["bytes"] + each["cost"]["copied_bytes"])
            for each in passes
        ],
        float,
    )
    seconds = np.array([each["latency_ms"]["p50"] for each in passes]) / 1e3
    errors = costs @ fit(costs[::2], seconds[::2]) / seconds - 1
    return [
        Pass(each["name"], each["tokens"], float(taken), float(error), index % 2 == 1)
        for index, (each, taken, error) in enumerate(zip(passes, seconds, errors, strict=True))
    ]


def write_measured(path: Path) -> str:
    """Write the fit beside what was measured, as a table of Markdown."""
    lines = ["| pass | tokens | measured | fitted | |", "|---|---|---|---|---|"]
    lines += [
        f"| {each.name} | {each.tokens:,} | {1e3 * each.seconds:.0f} ms | {each.error:+.0%} | "
        f"{'held out' if each.held_out else ''} |"
        for each in fit_passes(path)
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """A published run beside its prediction.

    Attributes:
        published: Seconds.
        predicted: Seconds.
        reached: Operations of the run over the published seconds, of the device's rate.
    """

    published: float
    predicted: float
    reached: float


def predict_published() -> dict[str, Row]:
    """Predict the published runs, by method.

    Cached runs compute the share of tokens that their PFLOPs say, of those of the same code with
    nothing skipped. Vanilla takes the operations of its windows, which are more than published.
    """
    model = describe_model("skyreels-df-1.3b-540p")
    options = GenerationOptions(num_frames=177, height=544, width=960)
    plan = plan_run(options, 0, model.grid)
    job = Job.from_plan(plan, TEXT)
    device, efficiency = DEVICES["a800"], Efficiency()
    rate = device.flops["bf16"]
    limits = Limits(rate, rate, device.bandwidth, efficiency.flops, efficiency.bandwidth)
    costs = EngineCosts(model.flops, 0, 2, 2)
    nothing_skipped = published_causal_work(model.flops, job).total
    rows = {}
    for method, (petaflops, published) in PUBLISHED.items():
        if method == "vanilla":
            work = vanilla_work(model.flops, job).total
            predicted = work / (rate * efficiency.flops)
        else:
            work = petaflops * 10**15
            schedule = model.lay_out(options, plan, work / nothing_skipped)
            predicted = float(predict_run(costs, schedule, limits).seconds[1])
        rows[method] = Row(published, predicted, work / published / rate)
    return rows


def write_published() -> str:
    """Write the predictions beside what was published, as a table of Markdown."""
    rows = predict_published()
    vanilla = rows["vanilla"]
    lines = [
        "| | published | predicted | ratio, published | ratio, predicted | of the rate reached |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {method} | {row.published} s | {row.predicted:.0f} s, "
        f"{row.predicted / row.published - 1:+.0%} | {vanilla.published / row.published:.2f} | "
        f"{vanilla.predicted / row.predicted:.2f} | {row.reached:.2f} |"
        for method, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Return 0 if the goal is met, or no report was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, nargs="?")
    arguments = parser.parse_args()
    print(write_published())
    return int(arguments.report is not None and not check_measured(arguments.report))


if __name__ == "__main__":
    raise SystemExit(main())
