"""`mc-build`: from the graphs of a bundle to engines for named generations of GPUs, ahead of time.

Neighbours: `provide_engine` builds one engine or finds it; the sizes come from the bundle's specs
and the largest video. The library is imported when there is work to do.
"""

__all__ = ["main"]

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from mc_engines.building.bounds import VideoLimits, bound_symbols, bucket_symbols
from mc_engines.building.compile import Request
from mc_engines.building.engines import (
    REQUIRED,
    Job,
    Outcome,
    check_attention,
    find_attention,
    find_unfit,
    provide_engine,
)
from mc_engines.building.library import BACKENDS, Backend, Library, open_library
from mc_engines.building.partition import divide
from mc_engines.building.store import EngineStore, Sidecar
from mc_engines.bundle import Bundle
from mc_engines.command import command
from mc_engines.device.cuda import open_gpu
from mc_engines.engine_choice import check_form
from mc_engines.specs import PRECISIONS, Precision

_HOST = ("timestep",)  # runs once per run, in ONNX Runtime on every target
_DEFAULT_TARGETS = (80, 86, 89, 120)  # Ampere (A100, RTX 30), Ada (RTX 40), Blackwell (RTX 50)
_HEIGHT, _WIDTH = 544, 960  # of a bundle that does not say what it was trained for
_MAX_FRAMES, _CHUNK_FRAMES = 97, 5  # the same of a window, and of a chunk in latent frames
_MEGABYTE = 10**6


@command("mc-build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=BACKENDS[0],
    show_default=True,
    help="Library.",
)
@click.option(
    "--sm", metavar="N,N", help="Compute capabilities without the dot; default: 80,86,89,120."
)
@click.option("--component", multiple=True, help="What to build; can be repeated. Default: all.")
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    default="bf16",
    show_default=True,
    help="Of the graphs.",
)
@click.option(
    "--height", type=int, help=f"Pixels of the largest video; default: the model's, else {_HEIGHT}."
)
@click.option(
    "--width", type=int, help=f"Pixels of the largest video; default: the model's, else {_WIDTH}."
)
@click.option(
    "--max-frames",
    type=int,
    help=f"Frames whose keys are kept at once; default: the model's video, else {_MAX_FRAMES}.",
)
@click.option(
    "--causal-block-size",
    type=int,
    help=f"Latent frames of a chunk; default: the model's, else {_CHUNK_FRAMES}.",
)
@click.option(
    "--buckets",
    metavar="X,X",
    help="Shares of a chunk's tokens with a profile each; tensorrt alone. Default: the bundle's, "
    "each of which generation needs.",
)
@click.option(
    "--partition",
    metavar="shared|baked:N",
    default="shared",
    show_default=True,
    help="One engine for all blocks, or one per N blocks with their weights inside, which "
    "mc-generate does not run.",
)
@click.option("--workspace", type=click.IntRange(min=1), help="Megabytes of scratch memory.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of measured times, read and extended; tensorrt alone.",
)
@click.option(
    "--engines",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep them here, not in BUNDLE.",
)
@click.option("--allow-unfused", is_flag=True, help="Build although attention is not one kernel.")
@click.option("--clean", is_flag=True, help="Remove engines that these settings would not build.")
def main(
    bundle: Path,
    backend: Backend,
    sm: str | None,
    component: tuple[str, ...],
    dtype: Precision,
    workspace: int | None,
    timing_cache: Path | None,
    partition: str,
    engines: Path | None,
    allow_unfused: bool,
    clean: bool,
    quiet: bool,
    **sizes: Any,
) -> None:
    """Build engines of BUNDLE; those that are there already are kept. Nothing is executed."""
    opened = Bundle.open(bundle)
    library = open_library(backend)
    targets = _choose_targets(library, sm, dtype)
    profiles = _choose_profiles(opened, library, **sizes)
    _check_timing_cache(library, timing_cache)
    scratch = None if workspace is None else workspace * _MEGABYTE
    request = Request(targets, profiles, scratch, timing_cache)
    store = EngineStore(opened, engines)
    job = Job(opened, library, dtype, request, store, component or REQUIRED)
    unfit = {} if component else find_unfit(opened, dtype)
    names = [name for name in _choose_components(opened, dtype, component) if name not in unfit]
    parts = divide(opened, names, _parse_partition(partition))
    fused = {name: check_attention(job, name, allow_unfused, parts) for name in names}
    with _show_progress(quiet) as advance:
        built = [
            provide_engine(job, part, fused[part.component], partial(advance, part.name))
            for part in parts
        ]
    if clean:
        _clean(job, built, quiet)
    if not quiet:
        _show(job, built, unfit)


def _choose_targets(library: Library, sm: str | None, dtype: Precision) -> tuple[int, ...]:
    if not library.targets:
        if sm is not None:
            raise ValueError(
                f"sm: expected none, for {library.backend} builds for the GPU that is here, got "
                f"{sm}. Leave it out."
            )
        wanted: tuple[int, ...] = (open_gpu().capability,)
    else:
        wanted = _DEFAULT_TARGETS if sm is None else _parse_targets(sm)
    unknown = [target for target in wanted if target not in library.targets]
    if library.targets and unknown:
        raise ValueError(
            f"sm: expected some of {_join(library.targets)}, got {_join(unknown)}. "
            f"{library.backend} {library.version} has no such target: use --backend tensorrt "
            "on that GPU."
        )
    for target in wanted:
        check_form(dtype, target)
    return wanted


def _parse_targets(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ValueError(
            f"sm: expected numbers with commas between, got '{text}'. Write it like 86,89."
        ) from error


def _choose_profiles(
    bundle: Bundle,
    library: Library,
    height: int | None,
    width: int | None,
    max_frames: int | None,
    causal_block_size: int | None,
    buckets: str | None,
) -> list[Any]:
    """One wide profile; for TensorRT, one per bucket."""
    config = bundle.manifest.config
    video = config.get("video", {})
    chunk = config.get("schedule", {}).get("chunk_frames", _CHUNK_FRAMES)
    limits = VideoLimits(
        video.get("height", _HEIGHT) if height is None else height,
        video.get("width", _WIDTH) if width is None else width,
        video.get("num_frames", _MAX_FRAMES) if max_frames is None else max_frames,
        chunk if causal_block_size is None else causal_block_size,
    )
    symbols = bound_symbols(config, limits)
    if library.targets:
        if buckets is not None:
            raise ValueError(
                f"buckets: expected none, for {library.backend} specialises one wide profile on "
                f"the user's GPU, got {buckets}. Leave it out."
            )
        return [symbols]
    shares = config["transformer"]["token_buckets"] if buckets is None else _parse_buckets(buckets)
    return [bucket_symbols(symbols, share) for share in sorted(shares, reverse=True)]


def _check_timing_cache(library: Library, timing_cache: Path | None) -> None:
    if timing_cache is not None and library.targets:
        raise ValueError(
            f"timing_cache: expected none, for {library.backend} times nothing ahead of time: its "
            f"engines are finished on the user's GPU, got {timing_cache}. Leave it out."
        )


def _parse_buckets(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"buckets: expected shares above 0 up to 1, got '{text}'. Write it like 1,.5,.25."
        )
    return shares


def _parse_partition(text: str) -> int | None:
    """Layers of a group; None where all share one engine."""
    kind, _, size = text.partition(":")
    if text == "shared":
        return None
    if kind != "baked" or not size.isdecimal():
        raise ValueError(
            f"partition: expected shared or baked:N, got {text}. Write it like baked:5."
        )
    return int(size)


def _choose_components(bundle: Bundle, dtype: Precision, wanted: Sequence[str]) -> list[str]:
    components = bundle.manifest.components
    for name in wanted:
        if name in _HOST:
            raise ValueError(
                f"component: expected one that runs on a GPU, got {name}, which runs once per run "
                "on the host. Leave it out."
            )
        bundle.graph(name, dtype)
    return list(wanted) or [
        name for name, spec in components.items() if name not in _HOST and dtype in spec.graphs
    ]


@contextmanager
def _show_progress(quiet: bool) -> Generator[Callable[[str, str, int, int], None]]:
    """Show the phases of the builds on a terminal."""
    console = Console(stderr=True)
    off = quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=off) as bar:
        task = bar.add_task("")

        def advance(component: str, phase: str, step: int, steps: int) -> None:
            bar.update(task, description=f"{component}: {phase}", completed=step, total=steps)

        yield advance


def _clean(job: Job, built: Sequence[Outcome], quiet: bool) -> None:
    """Remove the engines that these settings would not build."""
    wanted = {each.sidecar.file for each in built if each.sidecar is not None}
    others, damaged = job.store.clean(wanted)
    for name in damaged:
        click.echo(f"Removed {name}: damaged, or left by a command that was interrupted.", err=True)
    if not quiet:
        click.echo(f"Removed {len(others)} engines.", err=True)


def _show(job: Job, built: Sequence[Outcome], unfit: Mapping[str, float]) -> None:
    """Print what is there now, what is not and why, and that nothing of it has run."""
    engines = [each.sidecar for each in built if each.sidecar is not None]
    for each in engines:
        size, spent = f"{each.size / 1e6:.2f} MB", f"{each.seconds:.2f} s"
        cells = f"{each.part.name:<20}{each.form:<6}{size:>10}{spent:>10}"
        click.echo(f"{cells}  {_describe_attention(job, each)}".rstrip())
    for outcome in built:
        for target, reason in outcome.left_out.items():
            click.echo(f"Left out: {outcome.part.name} for SM{target}: {reason}")
    for name, error in unfit.items():
        click.echo(
            f"Left out: {name}: in {job.precision} it errs by {error:.2g} of its largest value, as "
            "the model itself does in torch; ONNX Runtime runs it in fp32. --component "
            f"{name} builds it nevertheless."
        )
    click.echo(
        f"{len(engines)} engines of {job.library.backend} {job.library.version} for {job.targets} "
        f"in {job.store.root}: compiled, not executed."
    )


def _describe_attention(job: Job, sidecar: Sidecar) -> str:
    """What the library answered, and what can be seen in the engine."""
    if sidecar.fused_attention is None:
        if find_attention(job.bundle, sidecar.component) is None:
            return ""
        name = f"{job.library.backend} {job.library.version}"
        return f"attention not checked: {name} cannot be asked whether it is one kernel"
    answer = "is one kernel" if sidecar.fused_attention else "may be in parts"
    return f"attention {answer}; kernels seen: {sidecar.attention_kernels or 'unknown'}"


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
