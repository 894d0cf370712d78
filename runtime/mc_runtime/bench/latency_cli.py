"""The part of `mc-bench run` that times engines and whole generations, on one or more backends."""

__all__ = ["latency_flags", "run_latency"]

import json
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mc_engines.building.library import BACKENDS
from mc_engines.bundle import Bundle
from mc_engines.command import INTERRUPTED
from mc_engines.specs import PRECISIONS
from mc_runtime.bench.generation import policy_runner, time_generations
from mc_runtime.bench.latency_page import print_latency, render_latency
from mc_runtime.bench.latency_report import Backend, Measured, build_latency_report
from mc_runtime.bench.machine import Monitor
from mc_runtime.bench.policies import choose_policies
from mc_runtime.bench.sweep import WARMUP_ROUNDS, Case, list_cases, take_rounds
from mc_runtime.display import open_console
from mc_runtime.flags import ONNXRUNTIME_BACKENDS, choose_device, choose_provider
from mc_runtime.inputs import check_policy
from mc_runtime.options import GenerationOptions
from mc_runtime.output_file import write_text
from mc_runtime.pipeline import VideoPipeline

_PLAIN_WIDTH = 110  # columns where the output is not a terminal
_ITERATIONS, _QUICK_ITERATIONS = 30, 5

_FLAGS = (
    click.option("--engines", is_flag=True, help="Time every engine and every kind of pass."),
    click.option("--generation", is_flag=True, help="Time videos of the first prompt, and memory."),
    click.option(
        "--component", multiple=True, help="Of --engines: only this one; can be repeated."
    ),
    click.option(
        "--backend",
        "backends",
        type=click.Choice((*ONNXRUNTIME_BACKENDS, *BACKENDS)),
        multiple=True,
        default=("cpu",),
        show_default=True,
        help="Of --engines and --generation; can be repeated: they take turns.",
    ),
    click.option(
        "--iterations",
        type=click.IntRange(min=1),
        default=_ITERATIONS,
        show_default=True,
        help="Samples of every engine, after a warm-up.",
    ),
    click.option("--quick", is_flag=True, help="5 samples of an engine, 1 of a generation."),
    click.option("--dtype", type=click.Choice(PRECISIONS), help="Of engines on a GPU."),
    click.option(
        "--engine-folder",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of engines; default: those in BUNDLE.",
    ),
    click.option("--max-vram", type=click.IntRange(min=1), help="As for mc-generate."),
    click.option("--device", type=click.IntRange(min=0), help="Number of the GPU; default: 0."),
)


def latency_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that `run_latency` reads."""
    for option in reversed(_FLAGS):
        function = option(function)
    return function


def run_latency(
    bundle: Path,
    options: Callable[[VideoPipeline], GenerationOptions],
    texts: tuple[str, ...],
    values: Mapping[str, Any],
    quiet: bool,
) -> None:
    """Time what the flags ask for, write the report and print it.

    Args:
        bundle: Folder.
        options: Makes the settings of the flags.
        texts: Prompts; the first is generated.
        values: Of the flags.
        quiet: Show no progress.

    Raises:
        Exit: 130 after an interrupt; what was measured is written.
    """
    opened = Bundle.open(bundle)
    backends = [_open(opened, name, values, options) for name in values["backends"]]
    settings = options(backends[0].pipeline)
    rounds = 1 if values["quick"] else values["rounds"]
    iterations = _QUICK_ITERATIONS if values["quick"] else values["iterations"]
    measured, monitor = Measured(), Monitor()
    with monitor:
        try:
            if values["engines"]:
                measured.cases = _choose_cases(backends, settings, values["component"])
                _sweep(iterations, measured, quiet)
            if values["generation"]:
                _generate(backends, settings, texts[0], values, rounds, measured, quiet)
        except KeyboardInterrupt:
            measured.partial = True
    report = build_latency_report(backends, settings, measured, monitor, sys.argv[1:])
    if values["output"] is not None:
        write_text(values["output"], json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if values["html"] is not None:
        write_text(values["html"], render_latency(report))
    print_latency(report, open_console(_PLAIN_WIDTH))
    if measured.partial:
        click.echo("Interrupted.", err=True)
        click.get_current_context().exit(INTERRUPTED)


def _open(
    bundle: Bundle,
    name: str,
    values: Mapping[str, Any],
    options: Callable[[VideoPipeline], GenerationOptions],
) -> Backend:
    flags = {**values, "backend": name, "engines": values["engine_folder"]}
    pipeline = VideoPipeline(bundle, values["threads"], choose_provider(flags))
    device = choose_device(flags, options(pipeline))
    if device is not None:
        pipeline.use_device(device)
    return Backend(name, pipeline)


def _choose_cases(
    backends: list[Backend], options: GenerationOptions, components: tuple[str, ...]
) -> list[tuple[str, Case]]:
    """Everything that is timed, or what is timed of some components, with its backend."""
    cases = [
        (backend.name, case)
        for backend in backends
        for case in list_cases(backend.pipeline, options)
    ]
    known = list(dict.fromkeys(case.component for _, case in cases))
    unknown = [name for name in components if name not in known]
    if unknown:
        raise ValueError(
            f"component: expected some of {', '.join(known)}, got {', '.join(unknown)}. "
            "Name what the bundle has and mc-bench times."
        )
    return [(name, case) for name, case in cases if not components or case.component in components]


def _sweep(iterations: int, measured: Measured, quiet: bool) -> None:
    calls = len(measured.cases) * (iterations + WARMUP_ROUNDS)
    with _progress("engines", calls, quiet) as advance:
        cases = [case for _, case in measured.cases]
        take_rounds(cases, iterations, measured.sweep, advance)


def _generate(
    backends: list[Backend],
    options: GenerationOptions,
    prompt: str,
    values: Mapping[str, Any],
    rounds: int,
    measured: Measured,
    quiet: bool,
) -> None:
    runners = []
    for backend in backends:
        pipeline = backend.pipeline
        policies = choose_policies(pipeline, values["policies"], values["policy_option"])
        for name, policy in policies.items():
            check_policy(policy, pipeline.plan(options).shape, lambda _: None)
            measured.policies.append((backend.name, name))
            runners.append(policy_runner(pipeline, policy, options, {"prompt": prompt}))
    with _progress("generations", len(runners) * (rounds + 1), quiet) as advance:
        time_generations(runners, rounds, measured.generated, measured.warmup, advance)


@contextmanager
def _progress(what: str, total: int, quiet: bool) -> Generator[Callable[[], None]]:
    """A progress bar on a terminal, ten lines elsewhere, nothing with --quiet."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    lines, done = not quiet and not console.is_terminal, 0
    with bar:
        task = bar.add_task(what, total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            if lines and done * 10 // total > (done - 1) * 10 // total:
                click.echo(f"{what}: {done} of {total}", err=True)

        yield advance
