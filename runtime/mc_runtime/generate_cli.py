"""`mc-generate`: from a prompt to an mp4, or to latents.

Neighbours: `VideoPipeline` generates, `VideoWriter` writes, `run_record` says how to repeat it.
The flags of the settings are those of `mc_runtime.flags`.
"""

__all__ = ["main"]

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from numpy.typing import NDArray

from mc_engines.building.library import open_library
from mc_engines.command import INTERRUPTED, command
from mc_engines.device.opening import DeviceOptions
from mc_engines.errors import require
from mc_engines.onnxruntime_providers import try_provider
from mc_runtime.device_passes import DevicePasses
from mc_runtime.display import Display
from mc_runtime.flags import (
    FILE,
    INPUT,
    choose_device,
    choose_options,
    choose_provider,
    device_flags,
    make_say,
    setting_options,
)
from mc_runtime.input_file import read_array
from mc_runtime.options import Chunk
from mc_runtime.output_file import check_distinct, check_output, replace_file
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.run_record import hash_files, read_options, record_run, write_record
from mc_runtime.video import VideoWriter, read_video
from motioncache import DecisionTrace, Policy

_INPUT_FILES = "video", "image", "prefix_latents", "prompt_embeds", "latents", "replay"
_LATENTS = {"prefix_latents": "latents", "latents": "noise"}  # arrays of the files
_PROMPT, _NEGATIVE = "prompt_embeds", "negative_prompt_embeds"


@dataclass
class _Run:
    """What a run needs, and what it has made so far."""

    pipeline: VideoPipeline
    options: Any
    texts: dict[str, Any]
    arrays: dict[str, Any]
    files: dict[str, dict[str, str]]
    policy: Policy
    output: Path | None
    save_latents: Path | None
    trace: Path | None
    ran_on: dict[str, Any] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)


@command("mc-generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to show.")
@click.option("--negative-prompt", help="What not to show; empty by default.")
@click.option("-o", "--output", type=FILE, help="The mp4 to write; a JSON is written beside it.")
@click.option("--video", type=INPUT, help="A video to continue; its last frames come first.")
@click.option("--image", type=INPUT, help="An image to begin with; SkyReels-V2 refuses it.")
@click.option("--prefix-latents", type=INPUT, help="npz with latents to begin with, of MAGI-1.")
@click.option("--prompt-embeds", type=INPUT, help="npz with prompt_embeds instead of a prompt.")
@click.option("--latents", type=INPUT, help="npz with noise; the sizes follow from it.")
@click.option("--save-latents", type=FILE, help="npz to write; without -o no VAE is needed.")
@click.option("--repeat", type=INPUT, help="JSON of a run to repeat; flags given here win.")
@click.option(
    "--policy",
    default="none",
    show_default=True,
    metavar="NAME[:PRESET]",
    help="Which tokens are recomputed: none, teacache, flowcache, motioncache.",
)
@click.option(
    "--policy-option",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A setting of the policy; can be repeated.",
)
@click.option("--trace", type=FILE, help="File to write every decision to, and FILE.jsonl.")
@click.option("--replay", type=INPUT, help="A trace whose decisions are forced.")
@click.option("--threads", type=click.IntRange(min=1), help="Of one operator; default: all cores.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@device_flags
@setting_options()
@click.pass_context
def main(
    ctx: click.Context,
    /,
    bundle: Path,
    repeat: Path | None,
    output: Path | None,
    save_latents: Path | None,
    trace: Path | None,
    overwrite: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Generate a video with BUNDLE; chunks are written as soon as they are clean."""
    outputs = [path for path in (output, save_latents) if path is not None]
    if not outputs:
        raise click.UsageError("Missing option '-o' or '--save-latents'. Name an output.")
    if trace is not None:
        outputs += [trace, Path(f"{trace}.jsonl")]
    for path in outputs:
        check_output(path, overwrite)
    record = outputs[0].with_suffix(".json")
    check_output(record, overwrite)
    if output is not None:
        require("av", "video")
    pipeline = VideoPipeline.from_bundle(bundle, values["threads"])
    given = {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if repeat is not None:
        recorded = read_options(repeat, pipeline.bundle, pipeline.default_options)
        values |= _replace_recorded(recorded, given)
        pipeline = VideoPipeline(pipeline.bundle, values["threads"])
    run = _prepare(pipeline, values, given, output, save_latents, trace)
    check_distinct([*outputs, record], [Path(file["path"]) for file in run.files.values()])
    pipeline.provider = choose_provider(values)
    device = choose_device(values, pipeline.limit_video(run.options))
    if device is not None:
        pipeline.use_device(device)
    run.ran_on = _open_backend(pipeline, device, values["backend"], make_say(quiet))
    _tell_differences(values.get("ran_on", {}), run.ran_on, make_say(quiet))
    interrupted = _generate(run, record, quiet)
    if device is not None and pipeline.device is not None:
        pipeline.device.keep_compiled()
    if interrupted:
        ctx.exit(INTERRUPTED)


def _open_backend(
    pipeline: VideoPipeline,
    options: DeviceOptions | None,
    backend: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Load the engines or try the provider, say which parts run where, and return it."""
    if options is None:
        if pipeline.provider == "cpu":
            return {"backend": backend}
        providers = try_provider(pipeline.provider)
        say(f"In ONNX Runtime on: {', '.join(providers)}.")
        return {"backend": backend, "providers": list(providers)}
    device = pipeline.device
    assert device is not None
    others = sorted(pipeline.bundle.manifest.components.keys() - device.engines.keys())
    say(f"On {device.gpu.name}: {', '.join(device.engines)}. On the CPU: {', '.join(others)}.")
    return {
        "backend": backend,
        "dtype": options.form,
        "engines": None if options.engines is None else str(options.engines.absolute()),
        "library": open_library(options.backend).version,
        "gpu": device.gpu.name,
        "capability": device.gpu.capability,
        "components": list(device.engines),
    }


def _describe_weights(pipeline: VideoPipeline) -> str:
    """Say whether the blocks' weights fit into the memory that they may take."""
    passes = pipeline.passes
    assert isinstance(passes, DevicePasses)
    if passes.streams_weights:
        return "The blocks' weights are streamed, two layers at a time: they do not all fit."
    return "The blocks' weights stay on the GPU."


def _tell_differences(
    recorded: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Say where a repeated run runs on something else than the recorded one."""
    names = dict.fromkeys(("backend", *recorded, *now)) if recorded else {}
    differ = [name for name in names if recorded.get(name) != now.get(name) and name != "engines"]
    if differ:
        pairs = (f"{name} {now.get(name)}, not {recorded.get(name)}" for name in differ)
        say(f"Not as in the record: {'; '.join(pairs)}. The output may differ.")


def _replace_recorded(recorded: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Let flags win over a record, also over what it has of the same kind."""
    for wins, loses in (
        ("prompt", _PROMPT),
        (_PROMPT, "prompt"),
        ("policy", "replay"),
        ("policy", "preset"),
        ("policy_option", "preset"),
        ("backend", "dtype"),
        ("backend", "engines"),
    ):
        if wins in given:
            recorded[loses] = None
    options = () if "policy" in given else recorded["policy_option"]
    return {**recorded, **given, "policy_option": (*options, *given.get("policy_option", ()))}


def _prepare(
    pipeline: VideoPipeline,
    values: dict[str, Any],
    given: Mapping[str, Any],
    output: Path | None,
    save_latents: Path | None,
    trace: Path | None,
) -> _Run:
    """Read the input files and settle the options."""
    files = {name: values[name] for name in _INPUT_FILES if values.get(name)}
    arrays: dict[str, Any] = {"latents": None}
    sizes: dict[str, int] = {}
    for name, array in _LATENTS.items():
        if name in files:
            arrays[name] = read_array(files[name], array)
            sizes |= _sizes(array, arrays[name], pipeline, given)
    options = choose_options(pipeline.default_options, values | sizes)
    for name in (_PROMPT, _NEGATIVE):
        wanted = "prompt_embeds" in files and (name == _PROMPT or pipeline.family.guided(options))
        wanted = wanted and (name == _PROMPT or values["negative_prompt"] is None)
        arrays[name] = read_array(files["prompt_embeds"], name) if wanted else None
    size = options.width, options.height
    if "video" in files:
        continued = pipeline.family.continued(sys.maxsize, options)
        arrays["video"] = read_video(files["video"], *size, continued)
    if "image" in files:
        arrays["image"] = read_video(files["image"], *size, 1)[0]
    texts = {name: values[name] for name in ("prompt", "negative_prompt")}
    hashes = hash_files(files)
    policy = _choose_policy(pipeline, values, given)
    outputs = output, save_latents, trace
    return _Run(pipeline, options, texts, arrays, hashes, policy, *outputs)


def _choose_policy(
    pipeline: VideoPipeline, values: Mapping[str, Any], given: Mapping[str, Any]
) -> Policy:
    """Make the policy of the flags, or of the trace to replay."""
    if values.get("replay") is None:
        policy = pipeline.find_policy(values["policy"], values["policy_option"])
        return replace(policy, preset=values["preset"]) if values.get("preset") else policy
    if "policy" in given or "policy_option" in given:
        raise click.UsageError("--replay forces what is recomputed. Leave --policy out.")
    return pipeline.find_policy(DecisionTrace.load(values["replay"]))


def _sizes(
    name: str, array: NDArray[Any], pipeline: VideoPipeline, given: Mapping[str, Any]
) -> dict[str, int]:
    """Sizes that follow from latents, from noise all; flags that say otherwise are refused."""
    if array.ndim != 4:
        raise ValueError(
            f"{name}: expected float32 (16, frames, h, w), got {array.dtype} {array.shape}. "
            "Leave out axes of size 1."
        )
    grid = pipeline.grid
    _, frames, height, width = array.shape
    sizes = {"height": height * grid.spatial_factor, "width": width * grid.spatial_factor}
    if name == _LATENTS["latents"]:
        sizes["num_frames"] = grid.pixel_frames(frames)
    for side, size in sizes.items():
        if given.get(side, size) != size:
            raise ValueError(
                f"{side}: expected {size}, which the latents have, got {given[side]}. Leave it out."
            )
    return sizes


def _generate(run: _Run, record: Path, quiet: bool) -> bool:
    """Run and write; whatever ends the run, the finished chunks are kept.

    Returns:
        Whether it was interrupted.
    """
    complete = False
    with ExitStack() as stack:
        display = stack.enter_context(Display(quiet))
        say = make_say(quiet)
        chunks = run.pipeline.generate(
            **run.texts,
            **run.arrays,
            policy=run.policy,
            decode=run.output is not None,
            callback=display.advance,
            note=say,
            options=run.options,
        )
        _offer_presets(run, say)
        if "gpu" in run.ran_on:
            say(_describe_weights(run.pipeline))
        writer = None
        if run.output is not None:
            size = (run.options.width, run.options.height)
            writer = stack.enter_context(VideoWriter(run.output, run.options.fps, *size))
        try:
            _write_chunks(run, chunks, writer, display)
            complete = True
        except KeyboardInterrupt:
            pass  # the caller learns it from the result
        finally:
            _save(run, record, chunks.trace, not complete)
    if complete:
        _tell_reuse(chunks.trace, say)
    if not quiet:
        outputs = ", ".join(str(path) for path in (run.output, run.save_latents) if path)
        state = "done" if complete else f"interrupted after {len(run.chunks)} chunks"
        click.echo(f"{state}: {outputs if run.chunks else 'nothing to keep'}")
    return not complete


def _write_chunks(
    run: _Run, chunks: Iterator[Chunk], writer: VideoWriter | None, display: Display
) -> None:
    for chunk in chunks:
        run.chunks.append(chunk)
        if writer is not None and chunk.frames is not None:
            writer.write(chunk.frames)
        display.show_chunk(chunk)


def _offer_presets(run: _Run, say: Callable[[str], None]) -> None:
    """Where nothing is cached, name the calibrated presets that the bundle has."""
    presets = run.pipeline.bundle.manifest.presets  # calibrated ones: others are not stored
    if run.policy.name == "none" and presets:
        say(f"Nothing is cached. Faster: --policy {' or '.join(presets)}")


def _tell_reuse(trace: DecisionTrace, say: Callable[[str], None]) -> None:
    """Say what a policy saved, and warn where it did nothing or next to everything."""
    reused = trace.reused()
    if reused is None:
        return
    advice = ""
    if reused == 0:
        advice = " The policy changed nothing: raise its threshold, or run mc-calibrate."
    elif reused > 0.95:
        advice = " Hardly anything was computed: lower its threshold, or run mc-calibrate."
    say(f"{reused:.0%} of the tokens were reused after the warm-up.{advice}")


def _save(run: _Run, record: Path, trace: DecisionTrace, interrupted: bool) -> None:
    """Write the latents of the finished chunks, the record, and the trace."""
    if run.chunks:
        _save_chunks(run, record, interrupted)
    if run.trace is not None:
        trace.run["video"] = str(run.output.absolute()) if run.output else None
        trace.run["interrupted"] = interrupted
        lines = Path(f"{run.trace}.jsonl")
        for path, write in ((run.trace, trace.write), (lines, trace.write_lines)):
            with replace_file(path) as hidden, hidden.open("wb") as file:
                write(file)


def _save_chunks(run: _Run, record: Path, interrupted: bool) -> None:
    if run.save_latents is not None:
        latents = np.concatenate([chunk.latents for chunk in run.chunks], axis=1)
        with replace_file(run.save_latents) as hidden, hidden.open("wb") as file:
            np.savez(file, latents=latents)
    values = record_run(
        run.pipeline.bundle,
        run.options,
        run.texts,
        run.files,
        run.pipeline.threads,
        run.policy,
        run.chunks,
        interrupted,
        run.ran_on,
    )
    write_record(record, values)
