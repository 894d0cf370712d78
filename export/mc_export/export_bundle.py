"""From an opened checkpoint to a bundle.

Neighbours: the family's `load` comes before, `write_component` writes each part, `BundleWriter`
publishes the whole; `Bundle.open` reads it. What a family has is its adapter's affair: `FAMILIES`.
"""

__all__ = ["count_steps", "expected_tensors", "export_bundle", "stored_precision"]

import json
from dataclasses import asdict
from pathlib import Path

import torch

from mc_engines.bundle_writer import BundleWriter
from mc_engines.manifest import Manifest
from mc_engines.parity_report import PARITY_REPORT
from mc_engines.published import PUBLISHED_BY_FAMILY, published_name
from mc_engines.specs import ComponentSpec, Precision
from mc_export.checkpoint import Checkpoint, Part, check_tensors
from mc_export.families import FAMILIES
from mc_export.parity import Comparison, require_parity
from mc_export.tensor_source import Shape
from mc_export.write_component import STORED_TYPES, Report, write_component, write_weights

_PARTS = ("text_encoder", "tokenizer", "vae")


def expected_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Shape]]:
    """Name every tensor that the checkpoint's parts must hold.

    Args:
        checkpoint: As its family's `load` opened it.

    Returns:
        By part, shapes by tensor name.

    Raises:
        CheckpointError: A configuration is not one of its family.
    """
    return FAMILIES[checkpoint.family].tensors(checkpoint)


def count_steps(checkpoint: Checkpoint) -> int:
    """Count the reports of `export_bundle`: two per component, one per weight file.

    Args:
        checkpoint: As its family's `load` opened it.

    Returns:
        The total of a progress bar.
    """
    family = FAMILIES[checkpoint.family]
    layers, components = family.layers(checkpoint)
    return 2 * components + layers + len(family.tables(checkpoint))


def export_bundle(
    checkpoint: Checkpoint,
    target: Path,
    dtype: Precision | None = None,
    overwrite: bool = False,
    report: Report = lambda _: None,
    model: str | None = None,
) -> list[Comparison]:
    """Convert, prove and publish; an error or an interrupt leaves nothing at the target.

    Args:
        checkpoint: As its family's `load` opened it.
        target: Folder of the bundle.
        dtype: Of the stored weights; None keeps the checkpoint's own.
        overwrite: Replace a bundle that is there.
        report: Called with a few words after every step.
        model: Name of the published configuration; None finds it by the transformer's sizes.

    Returns:
        The comparisons with torch, which the bundle holds as well.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape, or not finite.
        ParityError: A graph does not compute what the model computes.
        ValueError: No published configuration has the name.
        BundleError: The target is in the way or cannot be written.
    """
    family, known = FAMILIES[checkpoint.family], PUBLISHED_BY_FAMILY[checkpoint.family]
    name = model or published_name(checkpoint.transformer.config)
    if name not in (None, *known):
        raise ValueError(f"model: expected one of {', '.join(known)}, got '{name}'. Leave it out.")
    for part_name, expected in expected_tensors(checkpoint).items():
        check_tensors(part_name, getattr(checkpoint, part_name).tensors, expected)
    stored = None if dtype is None else STORED_TYPES[dtype]
    specs: dict[str, ComponentSpec] = {}
    rows: list[Comparison] = []
    with BundleWriter(target, overwrite) as writer:
        for part, source in family.components(checkpoint):
            baked = dtype or stored_precision(part)
            spec, compared = write_component(source, writer.folder, stored, baked, report)
            require_parity(compared)
            specs[spec.name] = spec
            rows += compared
        for table in family.tables(checkpoint):
            write_weights(table.file, table.load(), writer.folder, stored)
            report(f"{table.name}: {table.file} written")
        _write_report(writer.folder, rows)
        if checkpoint.tokenizer is not None:
            family.write_tokenizer(checkpoint.tokenizer, writer.folder / "tokenizer")
        writer.finish(_manifest(checkpoint, specs, dtype, name))
    return rows


def stored_precision(part: Part) -> Precision:
    """Find the narrowest precision that holds every tensor of a part exactly.

    Args:
        part: Of a checkpoint.

    Returns:
        `fp16` or `bf16` if all of its tensors are stored so, else `fp32`.
    """
    stored = {part.tensors.dtype(name) for name in part.tensors.names()}
    for precision, dtype in STORED_TYPES.items():
        if precision != "fp32" and stored == {dtype}:
            return precision
    return "fp32"


def _write_report(folder: Path, rows: list[Comparison]) -> None:
    path = folder / PARITY_REPORT
    path.parent.mkdir()
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _manifest(
    checkpoint: Checkpoint,
    specs: dict[str, ComponentSpec],
    dtype: Precision | None,
    name: str | None,
) -> Manifest:
    return Manifest(
        checkpoint.family,
        name,
        _dtype_name(STORED_TYPES[dtype or stored_precision(checkpoint.transformer)]),
        tuple(part for part in _PARTS if getattr(checkpoint, part) is None),
        FAMILIES[checkpoint.family].describe(checkpoint, name),
        specs,
        checkpoint.presets,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
