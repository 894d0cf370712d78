"""`mc-inspect`: show what a bundle holds, and check every byte of it.

Neighbours: `Bundle.open` reads what is shown, `find_faults` checks it.
"""

__all__ = ["main"]

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mc_engines.bundle import Bundle
from mc_engines.command import command
from mc_engines.errors import BundleError
from mc_engines.specs import ComponentSpec
from mc_engines.verify import find_faults

_PARITY_FILE = "reports/parity.json"
_PLAIN_WIDTH = 120  # columns where the output is not a terminal


@command("mc-inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare every file with its hash; list all faults.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and its sums as JSON.")
def main(bundle: Path, verify: bool, as_json: bool, quiet: bool) -> None:
    """Show what BUNDLE holds; with --verify check that it is whole, and exit 1 if it is not."""
    faults = find_faults(bundle) if verify else []
    if faults:
        if as_json:
            _print_json({"path": str(bundle), "faults": faults})
        raise BundleError("\n".join([*faults, f"{bundle}: faults found: {len(faults)}."]))
    opened = Bundle.open(bundle)
    if as_json:
        _print_json(_summary(opened))
    elif not quiet:
        _show(opened)
        if verify:
            click.echo(
                f"Verified: all {len(opened.manifest.files)} files are as the manifest says."
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
        "parity": _read_parity(bundle),
    }


def _weight_files(bundle: Bundle, spec: ComponentSpec) -> list[str]:
    """The safetensors files of a component, or the `.onnx.data` that its graphs share."""
    baked = f"onnx/{spec.name}.onnx.data"
    return [*spec.weight_files, *([baked] if baked in bundle.manifest.files else [])]


def _read_parity(bundle: Bundle) -> list[dict[str, Any]]:
    if _PARITY_FILE not in bundle.manifest.files:
        return []
    report: list[dict[str, Any]] = json.loads((bundle.path / _PARITY_FILE).read_bytes())
    return report


def _show(bundle: Bundle) -> None:
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    summary = _summary(bundle)
    console.print(_facts(bundle, summary))
    for spec in bundle.manifest.components.values():
        console.print(_component_table(bundle, spec, summary["weight_bytes"][spec.name]))
    if summary["parity"]:
        console.print(_parity_table(summary["parity"]))


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _facts(bundle: Bundle, summary: dict[str, Any]) -> Table:
    manifest = bundle.manifest
    table = Table(title=str(bundle.path), title_justify="left", box=None, show_header=False)
    for name, value in (
        ("family", manifest.family),
        ("model", manifest.model or "not a published configuration"),
        ("weights", manifest.weights_dtype),
        ("missing", ", ".join(manifest.missing) or "nothing"),
        ("presets", ", ".join(manifest.presets) or "none"),
        ("files", f"{summary['total_files']}, {decimal(summary['total_bytes'])}"),
        ("hash", bundle.hash),
        ("written by", f"motioncache {manifest.tool_version}"),
        *((part, _pairs(values)) for part, values in manifest.config.items()),
    ):
        table.add_row(name, value)
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
        errors = [entry["max_abs"] / entry["scale"] for entry in entries]
        cosine = min(entry["cosine"] for entry in entries)
        numbers = f"{max(errors):.2g}", f"{entries[0]['tolerance']:.2g}", f"{cosine:.6f}"
        table.add_row(component, form, str(len(entries)), *numbers)
    return table
