"""`mc-export`: from a checkpoint to a bundle.

Neighbours: `load_checkpoint` opens the checkpoint, `export_bundle` converts it, `plan_sizes` says
beforehand what that takes. torch is imported when there is work to do.
"""

__all__ = ["main"]

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc_engines.command import command
from mc_engines.errors import CheckpointError, MissingExtraError, require
from mc_engines.published import FAMILY_DEFAULTS, PUBLISHED, WAN21_VAE
from mc_engines.specs import PRECISIONS, Precision

if TYPE_CHECKING:
    from mc_export.checkpoint import Checkpoint

LACKS = {
    "text_encoder": "prompts cannot be encoded; generate from --prompt-embeds",
    "tokenizer": "prompts cannot be encoded; generate from --prompt-embeds",
    "vae": "latents cannot be decoded; generate with --save-latents",
}


@command("mc-export")
@click.option(
    "--model",
    type=click.Choice([*FAMILY_DEFAULTS, *PUBLISHED]),
    required=True,
    help="Family, or one of its published models; skyreels-mini comes with this package.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint; without it the published one is fetched.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option(
    "--dtype", type=click.Choice(PRECISIONS), help="Of the stored weights; default: as they are."
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle that is there.")
@click.option("--dry-run", is_flag=True, help="Print sizes and memory, and build nothing.")
@click.option("--height", type=int, help="Pixels, for --dry-run; default: as published.")
@click.option("--width", type=int, help="Pixels, for --dry-run; default: as published.")
@click.option("--base-num-frames", type=int, help="Frames of a window, for --dry-run.")
def main(
    model: str,
    checkpoint: Path | None,
    output: Path | None,
    dtype: Precision | None,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    **video: int | None,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs and weights, and prove it beside torch."""
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'. Name the bundle's folder.")
    for module, extra in (("onnxruntime", "cpu"), ("torch", "export"), ("onnxscript", "export")):
        require(module, extra)
    opened = _open(model, checkpoint)
    for part in _missing(opened):
        click.echo(f"{part}: not in {opened.path}, skipped: {LACKS[part]}.", err=True)
    if dry_run:
        click.echo(_plan(model, opened, dtype, video))
        return
    assert output is not None  # held above
    name = model if model in PUBLISHED else None
    _export(opened, output, dtype, overwrite, quiet, name)


def _open(model: str, path: Path | None) -> "Checkpoint":
    from mc_export.checkpoint import load_checkpoint
    from mc_export.fetch import fetch_checkpoint

    try:
        opened = load_checkpoint(path or fetch_checkpoint(model))
    except MissingExtraError as error:  # huggingface-hub: what to do is to use another option
        raise click.UsageError(str(error)) from error
    if model in PUBLISHED and opened.transformer.config != dict(PUBLISHED[model].transformer):
        raise CheckpointError(
            f"{opened.path}: expected the transformer of {model}, got one of other sizes. "
            "Pass --model skyreels to export whatever it is."
        )
    return opened


def _missing(checkpoint: "Checkpoint") -> list[str]:
    return [part for part in LACKS if getattr(checkpoint, part) is None]


def _plan(
    model: str, checkpoint: "Checkpoint", dtype: Precision | None, video: dict[str, int | None]
) -> str:
    from mc_export.export_bundle import expected_tensors, stored_precision
    from mc_export.size_plan import plan_sizes, render_plan
    from mc_export.wan_vae_components import describe_vae
    from mc_export.write_component import STORED_TYPES

    published = PUBLISHED[FAMILY_DEFAULTS.get(model, model)]
    sizes: dict[str, Any] = {
        name: getattr(published, name) if value is None else value for name, value in video.items()
    }
    vae = WAN21_VAE if checkpoint.vae is None else checkpoint.vae.config
    plan = plan_sizes(
        checkpoint.transformer.config,
        expected_tensors(checkpoint),
        dtype=STORED_TYPES[dtype or stored_precision(checkpoint.transformer)],
        chunk=5,
        spatial_factor=describe_vae(vae)["spatial_factor"],
        **sizes,
    )
    return render_plan(plan)


def _export(
    checkpoint: "Checkpoint",
    output: Path,
    dtype: Precision | None,
    overwrite: bool,
    quiet: bool,
    model: str | None,
) -> None:
    from mc_export.export_bundle import count_steps, export_bundle

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("export", total=count_steps(checkpoint))

        def report(words: str) -> None:
            progress.update(task, advance=1, description=words)
            if not (quiet or console.is_terminal):
                click.echo(words, err=True)

        rows = export_bundle(checkpoint, output, dtype, overwrite, report, model)
    for component, form in dict.fromkeys((r.component, r.form) for r in rows if r.own_error):
        click.echo(
            f"{component}, {form}: the model itself loses much in that type, and so its graph. "
            "Use another form of it.",
            err=True,
        )
    if not quiet:
        worst = max(row.share for row in rows)
        click.echo(
            f"{output}: {len(rows)} outputs compared with torch, the worst at {worst:.0%} of its "
            "tolerance."
        )
