"""The part of `mc-bench run` that times engines and whole generations, on one or more backends.

Generations come first: what the sweep keeps for its passes would be in their memory.
"""

__all__ = ["check_latency_flags", "latency_flags", "run_latency"]

import json
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mc_engines.building.library import BACKENDS
from mc_engines.bundle import Bundle
from mc_engines.specs import PRECISIONS
from mc_runtime.bench.backends import Backend, open_backend
from mc_runtime.bench.ending import Ending
from mc_runtime.bench.generation import Runner, policy_runner, time_generations
from mc_runtime.bench.latency_page import print_latency, render_latency
from mc_runtime.bench.latency_report import (
    Measured,
    Setup,
    build_latency_report,
    describe_policies,
)
from mc_runtime.bench.machine import Monitor, describe_machine
from mc_runtime.bench.policies import choose_policies
from mc_runtime.bench.sweep import WARMUP_ROUNDS, check_components, list_cases, take_rounds
from mc_runtime.display import open_console
from mc_runtime.flags import ONNXRUNTIME_BACKENDS, make_say
from mc_runtime.inputs import check_policy
from mc_runtime.options import GenerationOptions
from mc_runtime.output_file import write_text
from mc_runtime.pipeline import VideoPipeline
from motioncache import Policy

_PLAIN_WIDTH = 110  # columns where the output is not a terminal
_ITERATIONS, _QUICK_ITERATIONS = 30, 5
_ROUNDS, _QUICK_ROUNDS = 5, 1  # of a generation; `mc-bench compare` takes 5 samples or more

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
    click.option(
        "--quick",
        is_flag=True,
        help="5 samples of an engine, 1 of a generation, where no other number is given.",
    ),
    click.option("--dtype", type=click.Choice(PRECISIONS), help="Of engines on a GPU."),
    click.option(
        "--engine-folder",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of engines; default: those in BUNDLE.",
    ),
    click.option("--max-vram", type=click.IntRange(min=1), help="As for mc-generate."),
    click.option("--device", type=click.IntRange(min=0), help="Number of the GPU; default: 0."),
)


# Flags of `mc-bench run` that one of both modes alone reads, and those that one of them does not.
_OF_ENGINES = "component", "iterations"
_NOT_OF_ENGINES = "policies", "policy_option", "prompt", "prompts", "rounds"
_OF_EITHER = "backends", "quick", "dtype", "engine_folder", "max_vram", "device"


def latency_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that `run_latency` reads."""
    for option in reversed(_FLAGS):
        function = option(function)
    return function


def check_latency_flags(values: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse flags that would be ignored.

    Args:
        values: Of all flags of `mc-bench run`.
        given: Names of those on the command line.

    Raises:
        UsageError: One is for a mode that was not asked for, or a backend is named twice.
    """
    timed = values["engines"] or values["generation"]
    for names, mode, on in (
        (_OF_ENGINES, "--engines", values["engines"]),
        (_OF_EITHER, "--engines or --generation", timed),
    ):
        for name in names:
            if name in given and not on:
                flag = "backend" if name == "backends" else name.replace("_", "-")
                raise click.UsageError(f"--{flag} needs {mode}. Add it, or leave --{flag} out.")
    for name in _NOT_OF_ENGINES if values["engines"] and not values["generation"] else ():
        if name in given:
            flag = name.replace("_", "-")
            raise click.UsageError(
                f"--{flag} is not for --engines alone. Add --generation, or leave --{flag} out."
            )
    backends = values["backends"]
    twice = sorted({name for name in backends if backends.count(name) > 1})
    if twice:
        raise click.UsageError(
            f"--backend: expected each once, got {', '.join(twice)} more than once. Leave it out."
        )


def run_latency(
    bundle: Path,
    options: Callable[[VideoPipeline], GenerationOptions],
    texts: tuple[str, ...],
    values: Mapping[str, Any],
    given: Collection[str],
    quiet: bool,
) -> None:
    """Time what the flags ask for, write the report and print it.

    What was measured before an interrupt or an error is told before that ends the command.

    Args:
        bundle: Folder.
        options: Makes the settings of the flags.
        texts: Prompts; the first is generated.
        values: Of the flags.
        given: Names of those on the command line.
        quiet: Show no progress.

    Raises:
        ValueError: A setting, a policy or a component that the bundle cannot do.
        McError: A part is missing, or failed.
        KeyboardInterrupt: After an interrupt.
    """
    values = {**values, **_count_samples(values, given)}
    opened = Bundle.open(bundle)
    backends = [open_backend(opened, name, values, options) for name in values["backends"]]
    family, config = backends[0].pipeline.family, opened.manifest.config
    check_components(family, config, values["component"])
    settings = options(backends[0].pipeline)
    measured, device = Measured(), values["device"] or 0
    note = _note_once(measured, quiet)
    policies = _choose_policies(backends[0], settings, values, note)
    setup = Setup(
        opened,
        settings,
        _describe_run(backends, policies, texts, values),
        describe_machine(values["threads"], device),
        sys.argv[1:],
    )
    runners = []
    for backend in backends:
        for name, policy in policies.items():
            measured.policies.append((backend.name, name))
            runners.append(
                policy_runner(backend, policy, settings, {"prompt": texts[0]}, device, note)
            )
    ending, monitor = Ending(), Monitor(device)
    with ending, monitor:
        if runners:
            _generate(runners, values["rounds"], measured, quiet)
        if values["engines"]:
            _sweep(backends, settings, values, measured, quiet)
    measured.ended_by = ending.reason
    if measured.anything:
        _tell(build_latency_report(setup, measured, monitor), values)
    ending.raise_again()


def _count_samples(values: Mapping[str, Any], given: Collection[str]) -> dict[str, int]:
    """How many samples are taken: what is given, else what the mode says."""
    counts = {"iterations": (_ITERATIONS, _QUICK_ITERATIONS), "rounds": (_ROUNDS, _QUICK_ROUNDS)}
    return {
        name: values[name] if name in given else count[values["quick"]]
        for name, count in counts.items()
    }


def _note_once(measured: Measured, quiet: bool) -> Callable[[str], None]:
    """Return what prints a note and keeps it for the report, the first time that it is heard."""
    say = make_say(quiet)

    def note(text: str) -> None:
        if text not in measured.notes:
            measured.notes.append(text)
            say(text)

    return note


def _choose_policies(
    backend: Backend,
    options: GenerationOptions,
    values: Mapping[str, Any],
    note: Callable[[str], None],
) -> dict[str, Policy]:
    """The policies of the generations, after the settings and they were found to fit; or none."""
    pipeline = backend.pipeline
    shape = pipeline.plan(options).shape
    if not values["generation"]:
        return {}
    policies = choose_policies(pipeline, values["policies"], values["policy_option"])
    for policy in policies.values():
        check_policy(policy, shape, note)
    return policies


def _describe_run(
    backends: Sequence[Backend],
    policies: Mapping[str, Policy],
    texts: Sequence[str],
    values: Mapping[str, Any],
) -> dict[str, Any]:
    """What was asked for besides the settings of the video; None is what does not apply."""
    folder, on_gpu = values["engine_folder"], any(backend.on_gpu for backend in backends)
    return {
        "prompt": texts[0] if texts else None,
        "policies": describe_policies(policies),
        "dtype": ",".join(backend.dtype for backend in backends),
        "engine_folder": None if folder is None else str(folder),
        "max_vram": values["max_vram"],
        "device": values["device"] or 0 if on_gpu else None,
        "iterations": values["iterations"] if values["engines"] else None,
        "rounds": values["rounds"] if values["generation"] else None,
    }


def _generate(runners: Sequence[Runner], rounds: int, measured: Measured, quiet: bool) -> None:
    with _progress("generations", len(runners) * (rounds + 1), quiet) as advance:
        time_generations(runners, rounds, measured.generated, measured.warmup, advance)


def _sweep(
    backends: Sequence[Backend],
    options: GenerationOptions,
    values: Mapping[str, Any],
    measured: Measured,
    quiet: bool,
) -> None:
    measured.cases = [
        (backend.name, case)
        for backend in backends
        for case in list_cases(backend, options, values["component"])
    ]
    cases, rounds = [case for _, case in measured.cases], values["iterations"]
    with _progress("engines", len(cases) * (rounds + WARMUP_ROUNDS), quiet) as advance:
        take_rounds(cases, rounds, measured.sweep, advance)


def _tell(report: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write the report where the flags say, and print it."""
    if values["output"] is not None:
        write_text(values["output"], json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if values["html"] is not None:
        write_text(values["html"], render_latency(report))
    print_latency(report, open_console(_PLAIN_WIDTH))


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
