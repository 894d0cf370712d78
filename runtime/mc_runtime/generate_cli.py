"""`mc-generate`: from a prompt to an mp4, or to latents.

Neighbours: `VideoPipeline` generates, `VideoWriter` writes, `run_record` says how to repeat it.
The flags of the settings are those of `GenerationOptions`, whose defaults they show.
"""

__all__ = ["main"]

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from click.core import ParameterSource
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mc_engines.command import INTERRUPTED, command
from mc_runtime.generation import Progress
from mc_runtime.options import Chunk, GenerationOptions
from mc_runtime.pipeline import IMAGE_REFUSED, VideoPipeline
from mc_runtime.run_record import read_options, record_run, write_record
from mc_runtime.video import VideoWriter, check_output, read_video
from motioncache import POLICIES

FILE = click.Path(path_type=Path, dir_okay=False)
_NOISE, _PROMPT, _NEGATIVE = "noise", "prompt_embeds", "negative_prompt_embeds"
_HELP = {
    "num_frames": "Frames of the video.",
    "height": "Pixels.",
    "width": "Pixels.",
    "num_inference_steps": "Denoising steps of every chunk.",
    "guidance_scale": "1 switches guidance off.",
    "flow_shift": "Of the noise levels, towards noise.",
    "fps": "Frames per second.",
    "seed": "Of everything random.",
    "ar_step": "Steps a chunk lags behind the one before; 0: all together.",
    "causal_block_size": "Latent frames of a chunk.",
    "base_num_frames": "Frames of a window.",
    "overlap_history": "Frames that a window takes over.",
    "addnoise_condition": "Noise added to what is taken over, in thousandths.",
    "sigma_table": "Whose noise levels.",
    "first_sample": "How the second step is corrected: as diffusers' pipeline, or as in UniPC.",
}


def setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option per field of `GenerationOptions`."""
    for entry in reversed(fields(GenerationOptions)):
        choices = get_args(entry.type)
        kind = click.Choice(choices) if choices else type(entry.default)
        flag = f"--{entry.name.replace('_', '-')}"
        function = click.option(
            flag, type=kind, default=entry.default, show_default=True, help=_HELP[entry.name]
        )(function)
    return function


@dataclass
class _Run:
    """What a run needs, and what it has made so far."""

    pipeline: VideoPipeline
    options: GenerationOptions
    texts: dict[str, Any]
    arrays: dict[str, Any]
    files: dict[str, Path]
    policy: str
    output: Path | None
    save_latents: Path | None
    chunks: list[Chunk] = field(default_factory=list)


@command("mc-generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to show.")
@click.option("--negative-prompt", help="What not to show; empty by default.")
@click.option("-o", "--output", type=FILE, help="The mp4 to write; a JSON is written beside it.")
@click.option("--video", type=FILE, help="A video to continue; its last frames come first.")
@click.option("--image", type=FILE, help="Refused: one frame does not fill a chunk.")
@click.option("--prompt-embeds", type=FILE, help="npz with prompt_embeds instead of a prompt.")
@click.option("--latents", type=FILE, help="npz with noise; the sizes follow from it.")
@click.option("--save-latents", type=FILE, help="npz to write; without -o no VAE is needed.")
@click.option("--repeat", type=FILE, help="JSON of a run to repeat; flags given here win.")
@click.option("--policy", type=click.Choice(list(POLICIES)), default="none", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of one operator; default: all cores.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@setting_options
@click.pass_context
def main(
    ctx: click.Context,
    /,
    bundle: Path,
    repeat: Path | None,
    output: Path | None,
    save_latents: Path | None,
    overwrite: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Generate a video with BUNDLE; chunks are written as soon as they are clean."""
    outputs = [path for path in (output, save_latents) if path is not None]
    if not outputs:
        raise click.UsageError("Missing option '-o' or '--save-latents'. Name an output.")
    if values.pop("image") is not None:
        raise ValueError(IMAGE_REFUSED)
    record = outputs[0].with_suffix(".json")
    for path in (*outputs, record):
        check_output(path, overwrite)
    pipeline = VideoPipeline.from_bundle(bundle, values["threads"])
    given = {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if repeat is not None:
        values |= read_options(repeat, pipeline.bundle) | given
        pipeline = VideoPipeline(pipeline.bundle, values["threads"])
    run = _prepare(pipeline, values, given, output, save_latents)
    interrupted = _generate(run, record, quiet)
    if interrupted:
        ctx.exit(INTERRUPTED)


def _prepare(
    pipeline: VideoPipeline,
    values: dict[str, Any],
    given: Mapping[str, Any],
    output: Path | None,
    save_latents: Path | None,
) -> _Run:
    """Read the input files and settle the options."""
    files = {
        name: values[name] for name in ("video", "prompt_embeds", "latents") if values.get(name)
    }
    settings = {entry.name: values[entry.name] for entry in fields(GenerationOptions)}
    noise = _load(files["latents"], _NOISE) if "latents" in files else None
    if noise is not None:
        settings |= _sizes(noise, pipeline, given)
    options = GenerationOptions(**settings)
    arrays: dict[str, Any] = {"latents": noise}
    for name in (_PROMPT, _NEGATIVE):
        wanted = "prompt_embeds" in files and (name == _PROMPT or options.guidance_scale > 1)
        wanted = wanted and (name == _PROMPT or values["negative_prompt"] is None)
        arrays[name] = _load(files["prompt_embeds"], name) if wanted else None
    if "video" in files:
        size = (options.width, options.height, options.overlap_history)
        arrays["video"] = read_video(files["video"], *size)
    texts = {name: values[name] for name in ("prompt", "negative_prompt")}
    return _Run(pipeline, options, texts, arrays, files, values["policy"], output, save_latents)


def _load(path: Path, name: str) -> NDArray[Any]:
    """Read one array of an npz; the pipeline checks its shape."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if name in arrays:
                array: NDArray[Any] = arrays[name]
                return array
            found = ", ".join(arrays)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: expected an npz file, got: {error}.") from error
    raise ValueError(f"{path}: expected an array '{name}', got {found}.")


def _sizes(
    noise: NDArray[Any], pipeline: VideoPipeline, given: Mapping[str, Any]
) -> dict[str, int]:
    """Sizes that follow from the noise; flags that say otherwise are refused."""
    if noise.ndim != 4:
        raise ValueError(f"{_NOISE}: expected float32 (16, frames, h, w), got {noise.shape}.")
    grid = pipeline.grid
    _, frames, height, width = noise.shape
    sizes = {
        "num_frames": grid.pixel_frames(frames),
        "height": height * grid.spatial_factor,
        "width": width * grid.spatial_factor,
    }
    for name, size in sizes.items():
        if given.get(name, size) != size:
            raise ValueError(
                f"{name}: expected {size}, which the latents have, got {given[name]}. Leave it out."
            )
    return sizes


def _generate(run: _Run, record: Path, quiet: bool) -> bool:
    """Run and write; whatever ends the run, the finished chunks are kept."""
    interrupted = False
    with ExitStack() as stack:
        display = stack.enter_context(_Display(quiet))
        chunks = run.pipeline.generate(
            **run.texts,
            **run.arrays,
            policy=run.policy,
            decode=run.output is not None,
            callback=display.advance,
            note=lambda text: click.echo(text, err=True),
            options=run.options,
        )
        writer = None
        if run.output is not None:
            size = (run.options.width, run.options.height)
            writer = stack.enter_context(VideoWriter(run.output, run.options.fps, *size))
        try:
            _write_chunks(run, chunks, writer, display)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            _save(run, record, interrupted)
    if not quiet:
        outputs = ", ".join(str(path) for path in (run.output, run.save_latents) if path)
        state = f"interrupted after {len(run.chunks)} chunks" if interrupted else "done"
        click.echo(f"{state}: {outputs if run.chunks else 'nothing to keep'}")
    return interrupted


def _write_chunks(
    run: _Run, chunks: Iterator[Chunk], writer: VideoWriter | None, display: "_Display"
) -> None:
    for chunk in chunks:
        if writer is not None and chunk.frames is not None:
            writer.write(chunk.frames)
        run.chunks.append(chunk)
        display.show_chunk(chunk)


def _save(run: _Run, record: Path, interrupted: bool) -> None:
    """Write the latents of the finished chunks, and the record."""
    if not run.chunks:
        return
    if run.save_latents is not None:
        latents = np.concatenate([chunk.latents for chunk in run.chunks], axis=1)
        hidden = run.save_latents.absolute().with_name(
            f".{run.save_latents.name}.partial-{os.getpid()}"
        )
        with hidden.open("wb") as file:
            np.savez(file, latents=latents)
        hidden.replace(run.save_latents)
    values = record_run(
        run.pipeline.bundle,
        run.options,
        run.texts,
        run.files,
        run.pipeline.threads,
        run.policy,
        run.chunks,
        interrupted,
    )
    write_record(record, values)


class _Display:
    """A progress bar on a terminal, a line per chunk elsewhere, nothing with --quiet."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[chunks]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("denoising", total=None, chunks="")
        self._elapsed = 0.0
        self._words = "first chunk to come"

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, progress: Progress) -> None:
        """Show where the schedule is."""
        self._elapsed = progress.elapsed
        self._bar.update(
            self._task, completed=progress.row, total=progress.rows, chunks=self._words
        )

    def show_chunk(self, chunk: Chunk) -> None:
        """Say that a chunk is finished, and how long it took."""
        if chunk.index == 0:
            self._words = f"first chunk after {chunk.seconds:.1f} s"
        else:
            self._words = f"chunk {chunk.index + 1} of {chunk.of}, {chunk.seconds:.1f} s"
        self._bar.update(self._task, chunks=self._words)
        if self._lines:
            click.echo(f"{self._words}, {chunk.of - chunk.index - 1} left", err=True)
