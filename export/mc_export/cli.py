"""`mc-export`: from a checkpoint to a bundle.

Neighbours: the family's adapter opens the checkpoint and says beforehand what that takes,
`export_bundle` converts it. torch is imported when there is work to do.
"""

__all__ = ["main"]

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc_engines.command import command
from mc_engines.errors import CheckpointError, MissingExtraError, require
from mc_engines.published import PUBLISHED_BY_FAMILY
from mc_engines.specs import PRECISIONS, Precision

if TYPE_CHECKING:
    import torch

    from mc_export.checkpoint import Checkpoint
    from mc_export.family import Family

PUBLISHED_NAMES = [name for models in PUBLISHED_BY_FAMILY.values() for name in models]


@command("mc-export")
@click.option(
    "--model",
    type=click.Choice([*PUBLISHED_BY_FAMILY, *PUBLISHED_NAMES]),
    required=True,
    help="Family, or one of its published models; skyreels-mini comes with this package.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint; without it the published one is fetched (not of magi).",
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
    family, opened = _open(model, checkpoint)
    for name, consequence in family.missing(opened).items():
        click.echo(f"{name}: not in {opened.path}, skipped: {consequence}.", err=True)
    if dry_run:
        click.echo(family.plan(opened, _stored_type(opened, dtype), model, video))
        return
    assert output is not None  # held above
    _export(opened, output, dtype, overwrite, quiet, model if model in PUBLISHED_NAMES else None)


def _open(model: str, path: Path | None) -> "tuple[Family, Checkpoint]":
    from mc_export.families import find_family

    name, family = find_family(model)
    if path is None and family.fetch is None:
        raise click.UsageError(f"Missing option '--checkpoint': expected {family.accepted}.")
    try:
        if path is None and family.fetch is not None:
            path = family.fetch(model)
        assert path is not None  # held above
        opened = family.load(path)
    except MissingExtraError as error:  # huggingface-hub: what to do is to use another option
        raise click.UsageError(str(error)) from error
    published = PUBLISHED_BY_FAMILY[name].get(model)
    if published is not None and opened.transformer.config != dict(published.transformer):
        raise CheckpointError(
            f"{opened.path}: expected the transformer of {model}, got one of other sizes. "
            f"Pass --model {name} to export whatever it is."
        )
    return family, opened


def _stored_type(checkpoint: "Checkpoint", dtype: Precision | None) -> "torch.dtype":
    from mc_export.export_bundle import stored_precision
    from mc_export.write_component import STORED_TYPES

    return STORED_TYPES[dtype or stored_precision(checkpoint.transformer)]


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
