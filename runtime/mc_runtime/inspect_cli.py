"""`mc-inspect`: show what a bundle holds, the schedule of a coming run, or what a past one did.

Neighbours: `Bundle.open` reads what is shown and `find_faults` checks it; `forecast_schedule` looks
ahead, `trace_report` and `overlay` draw a trace.
"""

__all__ = ["main"]

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich import box
from rich.filesize import decimal
from rich.table import Table

from mc_engines.bundle import Bundle
from mc_engines.command import FAILURE, command
from mc_engines.errors import BundleError
from mc_engines.parity_report import read_parity
from mc_engines.specs import ComponentSpec
from mc_engines.verify import find_faults
from mc_runtime.display import open_console
from mc_runtime.doctor import Diagnosis, examine
from mc_runtime.flags import FILE, INPUT, choose_options, setting_options
from mc_runtime.output_file import check_distinct, check_output, write_text
from mc_runtime.overlay import write_overlay
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule_table import Schedule, forecast_schedule
from mc_runtime.trace_report import describe, list_chunks, report_page, summarise
from motioncache import DecisionTrace

_PLAIN_WIDTH = 120  # columns where the output is not a terminal
_DRAWING = "html", "overlay", "video", "overwrite"
# The settings of a run that its schedule depends on, and what they are of.
_SETTINGS = {
    "num_inference_steps": "Denoising steps of every chunk.",
    "flow_shift": "Of the noise levels, towards noise.",
    "sigma_table": "Whose noise levels.",
    "fps": "Frames per second.",
    "height": "Pixels of the video, for --doctor.",
    "width": "Pixels of the video, for --doctor.",
    "num_frames": "Of the video; for a policy that decides row by row, and for --doctor.",
    "ar_step": "Steps a chunk lags behind the one before; as above.",
    "causal_block_size": "Latent frames of a chunk; as above.",
    "base_num_frames": "Frames of a window; as above.",
    "overlap_history": "Frames that a window takes over; as above.",
}
_SIZES = "height", "width", "num_frames", "causal_block_size", "base_num_frames"  # for engines


@command("mc-inspect")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Compare every file with its hash; list all faults.")
@click.option("--doctor", is_flag=True, help="Say what this machine can run; exit 1 if nothing.")
@click.option(
    "--engines",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of engines for --doctor; default: those in BUNDLE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON, in full.")
@click.option("--policy", metavar="NAME[:PRESET]", help="Show the schedule of a coming run.")
@click.option(
    "--policy-option",
    multiple=True,
    metavar="FIELD=VALUE",
    help="A setting of the policy; can be repeated.",
)
@click.option("--trace", type=INPUT, help="Show what a run did; BUNDLE may be left out.")
@click.option("--html", type=FILE, help="Page to draw the trace on.")
@click.option("--overlay", type=FILE, help="mp4 to write: recomputed tokens over the video.")
@click.option("--video", type=INPUT, help="Of the traced run, if it is not where it was written.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@setting_options(_SETTINGS, {"num_inference_steps": "--steps"})
@click.pass_context
def main(
    ctx: click.Context,
    /,
    bundle: Path | None,
    verify: bool,
    doctor: bool,
    engines: Path | None,
    as_json: bool,
    policy: str | None,
    policy_option: tuple[str, ...],
    trace: Path | None,
    quiet: bool,
    **values: Any,
) -> None:
    """Show what BUNDLE holds, with --policy a schedule, with --trace what a run did.

    With --doctor say what this machine has, and which engines of BUNDLE can run on it.

    With --verify check that BUNDLE is whole, and exit 1 if it is not.
    """
    _check_usage(ctx)
    if bundle is not None and verify:
        _verify(bundle, as_json)
    if doctor:
        diagnosis = examine(bundle, engines, {name: values[name] for name in _SIZES})
        _show_diagnosis(diagnosis, as_json, quiet)
        ctx.exit(0 if diagnosis.is_good else FAILURE)
    if trace is not None:
        _show_trace(trace, bundle, as_json, quiet, **{name: values[name] for name in _DRAWING})
    elif bundle is not None and policy is not None:
        pipeline = VideoPipeline.from_bundle(bundle)
        options = choose_options(
            pipeline.default_options, {name: values[name] for name in _SETTINGS}
        )
        chosen = pipeline.find_policy(policy, policy_option)
        schedule = forecast_schedule(pipeline, chosen, options, partial(click.echo, err=True))
        _show_schedule(schedule, as_json, quiet)
    elif bundle is not None:
        _show_bundle(Bundle.open(bundle), as_json, quiet)
    if bundle is not None and verify and not (as_json or quiet):
        count = len(Bundle.open(bundle).manifest.files)
        click.echo(f"Verified: all {count} files are as the manifest says.")


def _check_usage(ctx: click.Context) -> None:
    """Refuse flags without the one that they belong to.

    Raises:
        click.UsageError: With the flag to add or to leave out.
    """
    given = {
        name
        for name in ctx.params
        if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
    }
    needs_bundle = not {"trace", "doctor"} & given or "verify" in given
    if "bundle" not in given and needs_bundle:
        raise click.UsageError(
            "Missing argument 'BUNDLE'. Name a bundle, or pass --trace or --doctor alone."
        )
    if "doctor" in given and {"trace", "policy"} & given:
        raise click.UsageError("--doctor looks at the machine. Leave --trace and --policy out.")
    if {"trace", "policy"} <= given:
        raise click.UsageError("--policy looks ahead, --trace back. Leave one of them out.")
    flags = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    settings = [name for name in _SETTINGS if "doctor" not in given or name not in _SIZES]
    for needed, names in (
        ("trace", _DRAWING),
        ("policy", ("policy_option", *settings)),
        ("doctor", ("engines",)),
    ):
        alone = [flags[name] for name in names if name in given and needed not in given]
        if alone:
            raise click.UsageError(f"{alone[0]}: expected with --{needed}, got it alone. Add it.")


def _show_diagnosis(diagnosis: Diagnosis, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(diagnosis.to_json())
    elif not quiet:
        table = _table("this machine", "what", "state", "found", "advice")
        for finding in diagnosis.findings:
            table.add_row(finding.subject, finding.state, finding.detail, finding.advice)
        open_console(_PLAIN_WIDTH).print(table)
        able = [name for name, can in diagnosis.can_generate.items() if can]
        click.echo(f"Videos can be generated with: {', '.join(able) or 'nothing'}.")


def _verify(bundle: Path, as_json: bool) -> None:
    """Check every file.

    Raises:
        BundleError: With all faults.
    """
    faults = find_faults(bundle)
    if faults:
        if as_json:
            _print_json({"path": str(bundle), "faults": faults})
        raise BundleError("\n".join([*faults, f"{bundle}: faults found: {len(faults)}."]))


def _show_bundle(bundle: Bundle, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(_summary(bundle))
    elif not quiet:
        _show(bundle)


def _show_schedule(schedule: Schedule, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(schedule.to_json())
    elif not quiet:
        open_console(_PLAIN_WIDTH).print(_schedule_table(schedule))
        totals = schedule.totals()
        click.echo(
            f"Of {totals['steps']} steps: {totals['full']} full, {totals['reuse']} reused, "
            f"{totals['not_known']} not known before the run."
        )
    warning = schedule.warning()
    if warning:
        click.echo(warning, err=True)


def _schedule_table(schedule: Schedule) -> Table:
    by_row = schedule.unit == "row"
    title = f"schedule of {schedule.policy.name}, " + (
        "all chunks of a row together" if by_row else "the same for every chunk"
    )
    columns = ("timestep", "distance", "rescaled", "accumulated", "decision")
    table = _table(title, *(["row"] if by_row else []), "step", *columns)
    for line in schedule.lines:
        table.add_row(*([str(line.row)] if by_row else []), *line.cells())
    return table


def _show_trace(
    path: Path,
    bundle: Path | None,
    as_json: bool,
    quiet: bool,
    html: Path | None,
    overlay: Path | None,
    video: Path | None,
    overwrite: bool,
) -> None:
    """Sum up a trace, and draw it where that is asked for.

    Raises:
        ValueError: It is no trace of a run, or of another bundle; or the video is missing.
    """
    trace = DecisionTrace.load(path)
    _check_trace(path, trace, bundle)
    recorded = trace.run.get("video")
    if video is None and recorded is not None and Path(recorded).is_file():
        video = Path(recorded)
    outputs = [output for output in (html, overlay) if output is not None]
    check_distinct(outputs, filter(None, (path, video)))
    for output in outputs:
        check_output(output, overwrite)
    if overlay is not None and video is None:
        got = f"{recorded}, which is not there" if recorded else "none"
        raise ValueError(f"{path}: expected the video of the run, got {got}. Pass --video FILE.")
    if html is not None:
        page = report_page(trace, video)
        write_text(html, page)
    if overlay is not None and video is not None:
        write_overlay(trace, video, overlay)
    summary = summarise(trace)
    if as_json:
        _print_json(summary)
    elif not quiet:
        console = open_console(_PLAIN_WIDTH)
        console.print(_pair_table(str(path), describe(summary)))
        heads, *chunks = list_chunks(summary)
        table = _table("chunks", *heads)
        for chunk in chunks:
            table.add_row(*chunk)
        console.print(table)


def _check_trace(path: Path, trace: DecisionTrace, bundle: Path | None) -> None:
    """Refuse masks that no run left, and the trace of another bundle.

    Raises:
        ValueError: With what is expected.
    """
    missing = [name for name in ("policy", "grid", "windows", "options") if name not in trace.run]
    if missing:
        raise ValueError(
            f"{path}: expected the trace of a run, got one without {', '.join(missing)}. "
            "Pass a file that mc-generate --trace wrote."
        )
    if bundle is None:
        return
    expected, found = Bundle.open(bundle).model_hash, str(trace.run.get("bundle"))
    if found != expected:
        raise ValueError(
            f"{path}: expected a trace of the bundle {expected[:12]}, got one of {found[:12]}. "
            "Name the bundle it was recorded with, or none."
        )


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _summary(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and what follows from it: sums of bytes, and the parity report."""
    files = bundle.manifest.files
    return {
        "path": str(bundle.path),
        "hash": bundle.hash,
        "manifest": bundle.manifest.to_json(),
        "total_files": len(files),
        "total_bytes": sum(entry.size for entry in files.values()),
        "weight_bytes": {
            name: sum(files[path].size for path in _weight_files(bundle, spec))
            for name, spec in bundle.manifest.components.items()
        },
        "parity": read_parity(bundle),
    }


def _weight_files(bundle: Bundle, spec: ComponentSpec) -> list[str]:
    """The safetensors files of a component, or the `.onnx.data` that its graphs share."""
    baked = f"onnx/{spec.name}.onnx.data"
    return [*spec.weight_files, *([baked] if baked in bundle.manifest.files else [])]


def _show(bundle: Bundle) -> None:
    console, summary = open_console(_PLAIN_WIDTH), _summary(bundle)
    console.print(_facts(bundle, summary))
    for spec in bundle.manifest.components.values():
        console.print(_component_table(bundle, spec, summary["weight_bytes"][spec.name]))
    if summary["parity"]:
        console.print(_parity_table(summary["parity"]))


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _facts(bundle: Bundle, summary: dict[str, Any]) -> Table:
    manifest = bundle.manifest
    facts = (
        ("family", manifest.family),
        ("model", manifest.model or "not a published configuration"),
        ("weights", manifest.weights_dtype),
        ("missing", ", ".join(manifest.missing) or "nothing"),
        ("presets", ", ".join(manifest.presets) or "none"),
        ("files", f"{summary['total_files']}, {decimal(summary['total_bytes'])}"),
        ("hash", bundle.hash),
        ("written by", f"motioncache {manifest.tool_version}"),
        *((part, _pairs(values)) for part, values in manifest.config.items()),
    )
    return _pair_table(str(bundle.path), dict(facts))


def _pair_table(title: str, pairs: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    for pair in pairs.items():
        table.add_row(*pair)
    return table


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _component_table(bundle: Bundle, spec: ComponentSpec, weight_bytes: int) -> Table:
    """One row per tensor; a column per form, with the tensor's dtype in that form."""
    layers = f", {len(spec.weight_files)} layers" if spec.weight_files else ""
    weights = f", {decimal(weight_bytes)} of weights" if weight_bytes else ""
    sizes = {form: bundle.manifest.files[graph.file].size for form, graph in spec.graphs.items()}
    forms = [f"{form} ({decimal(size)})" for form, size in sizes.items()]
    table = _table(f"{spec.name}{layers}{weights}", "", "tensor", "shape", *forms)
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for form, graph in spec.graphs.items():
        for kind, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                shape = ", ".join(map(str, tensor.shape))
                rows.setdefault((kind, tensor.name, shape), {})[form] = tensor.dtype
    for row, dtypes in rows.items():
        table.add_row(*row, *(dtypes.get(form, "") for form in spec.graphs))
    return table


def _parity_table(report: list[dict[str, Any]]) -> Table:
    """The worst output of each component and form; errors are relative to the output's scale."""
    columns = ("component", "form", "outputs", "max error", "tolerance", "cosine")
    table = _table("parity with torch", *columns)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in report:
        groups.setdefault((entry["component"], entry["form"]), []).append(entry)
    for (component, form), entries in groups.items():
        worst = max(entries, key=lambda entry: entry["max_abs"] / entry["scale"])
        error, cosine = worst["max_abs"] / worst["scale"], min(each["cosine"] for each in entries)
        numbers = f"{error:.2g}", f"{worst['tolerance']:.2g}", f"{cosine:.6f}"
        table.add_row(component, form, str(len(entries)), *numbers)
    return table
