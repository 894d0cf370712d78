"""`mc-bench run`: what a policy costs and how near its video is to the uncached one.

Neighbours: `policies` runs and measures, `policy_report` and `policy_page` tell.
"""

__all__ = ["main"]

import json
import tempfile
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from mc_engines.command import command
from mc_engines.errors import require
from mc_runtime.bench.baseline import DiffusersProcess
from mc_runtime.bench.compare_cli import compare_command
from mc_runtime.bench.ending import Ending
from mc_runtime.bench.latency_cli import check_latency_flags, latency_flags, run_latency
from mc_runtime.bench.machine import describe_machine
from mc_runtime.bench.policies import (
    Bench,
    Turn,
    check_policies,
    choose_policies,
    judge_frames,
    policy_contender,
    take_turns,
)
from mc_runtime.bench.policy_page import print_report, render_page
from mc_runtime.bench.policy_report import DIFFUSERS, Compared, build_report
from mc_runtime.bench.predict_cli import predict_command
from mc_runtime.display import open_console
from mc_runtime.fidelity import Lpips, compare_videos
from mc_runtime.flags import FILE, INPUT, choose_options, make_say, setting_options
from mc_runtime.output_file import check_distinct, check_output, write_text
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.prompts import encode_prompts, read_prompts

_PLAIN_WIDTH = 100  # columns where the output is not a terminal


@click.group("mc-bench")
@click.version_option(package_name="motioncache")
def main() -> None:
    """Measure a bundle on this machine, or predict one elsewhere."""


@command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--policies",
    default="none",
    show_default=True,
    metavar="NAME[:PRESET],...",
    help="What to compare; none is always first.",
)
@click.option(
    "--policy-option",
    multiple=True,
    metavar="NAME.FIELD=VALUE",
    help="A setting of a policy; can be repeated.",
)
@click.option("--prompt", multiple=True, help="What to show; can be repeated.")
@click.option(
    "--prompts",
    type=INPUT,
    help="Text file, a prompt per line; empty lines and those with # are left out.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default="3; with --generation 5",
    help="Turns of every policy with every prompt; videos of --generation.",
)
@click.option("--lpips", type=INPUT, help="ONNX graph of LPIPS, made by scripts/make_lpips.py.")
@click.option("--baseline", type=click.Choice([DIFFUSERS]), help="What else to run.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder for the baseline.")
@click.option("-o", "--output", type=FILE, help="JSON to write.")
@click.option("--html", type=FILE, help="Page to write, with a plot.")
@latency_flags
@click.option("--threads", type=click.IntRange(min=1), help="Of one operator; default: all cores.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@setting_options()
def run(
    bundle: Path,
    output: Path | None,
    html: Path | None,
    overwrite: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Compare cache policies on BUNDLE: time, FLOPs and fidelity, on the same noise and prompts.

    With --engines or --generation: time, memory and steadiness of engines and whole videos.
    """
    _check_baseline(values)
    source = click.get_current_context().get_parameter_source
    given = {name for name in values if source(name) is ParameterSource.COMMANDLINE}
    check_latency_flags(values, given)
    _check_outputs((output, html), (values["prompts"], values["lpips"]), overwrite)
    if html is not None:
        require("matplotlib", "bench")
    if values["engines"] or values["generation"]:
        _time(bundle, values | {"output": output, "html": html}, given, quiet)
        return
    say = make_say(quiet)
    bench = _prepare(VideoPipeline.from_bundle(bundle, values["threads"]), values, say)
    lpips = Lpips(values["lpips"], values["threads"]) if values["lpips"] else None
    _rehearse_judging(bench, lpips)
    ending = Ending()
    report = _measure(bench, lpips, values["checkpoint"], say, ending)
    if output is not None:
        write_text(output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if html is not None:
        write_text(html, render_page(report))
    print_report(report, open_console(_PLAIN_WIDTH))
    ending.raise_again()


def _time(bundle: Path, values: dict[str, Any], given: Collection[str], quiet: bool) -> None:
    """Time engines and generations instead of comparing policies."""
    for name in ("lpips", "baseline"):
        if values[name] is not None:
            raise click.UsageError(f"--{name} is for comparing policies. Leave it out.")
    prompts = _read_prompts(values["prompt"], values["prompts"]) if values["generation"] else ()
    run_latency(
        bundle,
        lambda pipeline: choose_options(pipeline.default_options, values),
        prompts,
        values,
        given,
        quiet,
    )


main.add_command(run)
main.add_command(compare_command)
main.add_command(predict_command)


def _check_baseline(values: dict[str, Any]) -> None:
    if (values["baseline"] is None) != (values["checkpoint"] is None):
        raise click.UsageError("--baseline and --checkpoint need each other. Give both or neither.")


def _check_outputs(
    outputs: Iterable[Path | None], inputs: Iterable[Path | None], overwrite: bool
) -> None:
    """Refuse what could not be written, or would replace what is read; None is not given."""
    given = [path for path in outputs if path is not None]
    for path in given:
        check_output(path, overwrite)
    check_distinct(given, [path for path in inputs if path is not None])


def _prepare(pipeline: VideoPipeline, values: dict[str, Any], say: Callable[[str], None]) -> Bench:
    """Settle what is run, and refuse what cannot be."""
    if values["baseline"] is not None:
        pipeline.family.require(f"mc-bench run --baseline {DIFFUSERS}")
    bench = Bench(
        pipeline,
        choose_policies(pipeline, values["policies"], values["policy_option"]),
        choose_options(pipeline.default_options, values),
        _read_prompts(values["prompt"], values["prompts"]),
        values["rounds"],
    )
    check_policies(bench, say)
    return bench


def _rehearse_judging(bench: Bench, lpips: Lpips | None) -> None:
    """Judge a black frame: what would fail after the runs, such as too small frames, fails now."""
    if bench.decoder is not None:
        black = np.zeros((1, bench.options.height, bench.options.width, 3), np.uint8)
        compare_videos(black, black, lpips=lpips)


def _read_prompts(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """The prompts of the flags, or those of the file."""
    if bool(given) == (file is not None):
        raise click.UsageError("Missing option '--prompt' or '--prompts'. Give one of them.")
    return given if file is None else read_prompts(file)


def _measure(
    bench: Bench,
    lpips: Lpips | None,
    checkpoint: Path | None,
    say: Callable[[str], None],
    ending: Ending,
) -> dict[str, Any]:
    """Run everything, and report it, or what of it there is when an interrupt or an error ends it.

    Args:
        bench: What is run.
        lpips: The graph for LPIPS.
        checkpoint: Of the baseline diffusers; None without it.
        say: Told how it goes.
        ending: Holds back what ended it.

    Returns:
        The report.

    Raises:
        BaseException: It ended before a policy had been measured.
    """
    compared = Compared(describe_machine(bench.pipeline.threads), lpips is not None)
    with ending:
        _compare(bench, lpips, checkpoint, say, compared)
    if not compared.turns.of:
        ending.raise_again()
    return build_report(bench, replace(compared, ended_by=ending.reason))


def _compare(
    bench: Bench,
    lpips: Lpips | None,
    checkpoint: Path | None,
    say: Callable[[str], None],
    compared: Compared,
) -> None:
    """Run the policies, and the baseline beside them, and judge the frames."""

    def advance(name: str, turn: Turn) -> None:
        say(f"turn {turn.round + 1}, prompt {turn.prompt + 1}, {name}: {turn.seconds:.2f} s")

    with ExitStack() as stack:
        baseline = None
        if checkpoint is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            baseline = stack.enter_context(
                DiffusersProcess(checkpoint, folder, bench.options, bench.pipeline.threads)
            )
            compared.diffusers_versions = baseline.versions
        embeddings = encode_prompts(bench.pipeline, bench.prompts, bench.options, say)
        contenders = {
            name: policy_contender(bench, policy, embeddings)
            for name, policy in bench.policies.items()
        }
        if baseline is not None:
            contenders[DIFFUSERS] = baseline.contender(
                bench.pipeline.draw_noise(bench.options), embeddings
            )
        take_turns(contenders, len(bench.prompts), bench.rounds, compared.turns, advance)
        say("comparing frames")
        frames = (baseline.frames,) if baseline is not None else ()
        judge_frames(bench, compared.turns, compared.judgement, lpips, *frames)
