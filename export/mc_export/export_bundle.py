"""From an opened checkpoint to a bundle.

Neighbours: `load_checkpoint` comes before, `write_component` writes each part, `BundleWriter`
publishes the whole; `Bundle.open` reads it.
"""

__all__ = ["FAMILY", "count_steps", "expected_tensors", "export_bundle", "stored_precision"]

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mc_engines.bundle_writer import BundleWriter
from mc_engines.manifest import Manifest
from mc_engines.published import PUBLISHED, published_name
from mc_engines.specs import ComponentSpec, Precision
from mc_export.checkpoint import Checkpoint, Part, check_tensors
from mc_export.component import ComponentSource
from mc_export.parity import Comparison, require_parity
from mc_export.skyreels_components import (
    describe_transformer,
    transformer_components,
    transformer_tensors,
)
from mc_export.umt5 import (
    describe_text_encoder,
    text_embedding_table,
    text_encoder_components,
    text_encoder_tensors,
)
from mc_export.wan_vae_components import describe_vae, vae_components, vae_tensors
from mc_export.write_component import STORED_TYPES, Report, write_component, write_weights

FAMILY = "skyreels"
PARITY_REPORT = "reports/parity.json"
TABLE = "weights/text_embed.safetensors"
MAX_TEXT_TOKENS = 512  # that the transformer was trained with (SkyReels-V2, text_len)
_PARTS = ("text_encoder", "tokenizer", "vae")


def expected_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name every tensor that the checkpoint's parts must hold.

    Args:
        checkpoint: As `load_checkpoint` opened it.

    Returns:
        By part, shapes by tensor name.

    Raises:
        CheckpointError: A configuration is not one of this family.
    """
    expected = {"transformer": transformer_tensors(checkpoint.transformer.config)}
    if checkpoint.text_encoder is not None:
        config = checkpoint.text_encoder.config
        names = checkpoint.text_encoder.tensors.names()
        expected["text_encoder"] = text_encoder_tensors(config, names)
    if checkpoint.vae is not None:
        expected["vae"] = vae_tensors(checkpoint.vae.config)
    return expected


def count_steps(checkpoint: Checkpoint) -> int:
    """Count the reports of `export_bundle`: two per component, one per weight file.

    Args:
        checkpoint: As `load_checkpoint` opened it.

    Returns:
        The total of a progress bar.
    """
    steps = 2 * 8 + 2 * int(checkpoint.transformer.config["num_layers"])
    if checkpoint.text_encoder is not None:
        layers, norm, table = int(checkpoint.text_encoder.config["num_layers"]), 1, 1
        steps += 2 * 2 + layers + norm + table
    return steps + (2 * 4 if checkpoint.vae is not None else 0)


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
        checkpoint: As `load_checkpoint` opened it.
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
    name = model or published_name(checkpoint.transformer.config)
    if name not in (None, *PUBLISHED):
        raise ValueError(
            f"model: expected one of {', '.join(PUBLISHED)}, got '{name}'. Leave it out."
        )
    for part_name, expected in expected_tensors(checkpoint).items():
        check_tensors(part_name, getattr(checkpoint, part_name).tensors, expected)
    specs: dict[str, ComponentSpec] = {}
    rows: list[Comparison] = []
    with BundleWriter(target, overwrite) as writer:
        for part, source in _sources(checkpoint):
            baked = dtype or stored_precision(part)
            stored = None if dtype is None else STORED_TYPES[dtype]
            spec, compared = write_component(source, writer.folder, stored, baked, report)
            require_parity(compared)
            specs[spec.name] = spec
            rows += compared
        if checkpoint.text_encoder is not None:
            _write_table(checkpoint.text_encoder, writer.folder, dtype, report)
        _write_report(writer.folder, rows)
        if checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, writer.folder / "tokenizer")
        writer.finish(_manifest(checkpoint, specs, dtype, name))
    return rows


def _sources(checkpoint: Checkpoint) -> Iterator[tuple[Part, ComponentSource]]:
    """Every component of every part there is, one at a time in memory."""
    makers = {
        "transformer": transformer_components,
        "text_encoder": text_encoder_components,
        "vae": vae_components,
    }
    for name, make in makers.items():
        part: Part | None = getattr(checkpoint, name)
        if part is not None:
            for source in make(part.config, part.tensors):
                yield part, source


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


def _write_table(part: Part, folder: Path, dtype: Precision | None, report: Report) -> None:
    """The token table: rows are looked up by the host, so it is a file and no graph."""
    stored = None if dtype is None else STORED_TYPES[dtype]
    write_weights(TABLE, text_embedding_table(part.tensors)(), folder, stored)
    report(f"text_embed: {TABLE} written")


def _write_report(folder: Path, rows: list[Comparison]) -> None:
    path = folder / PARITY_REPORT
    path.parent.mkdir()
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _max_tokens(tokenizer: Path | None) -> int:
    """Return to how many tokens prompts are padded: as many as the tokenizer takes, 512 at most.

    The transformer attends to the padding, so that it has to be as long as in training.
    """
    path = None if tokenizer is None else tokenizer / "tokenizer_config.json"
    if path is None or not path.is_file():
        return MAX_TEXT_TOKENS
    length = json.loads(path.read_text()).get("model_max_length", MAX_TEXT_TOKENS)
    return int(min(length, MAX_TEXT_TOKENS))


def _manifest(
    checkpoint: Checkpoint,
    specs: dict[str, ComponentSpec],
    dtype: Precision | None,
    name: str | None,
) -> Manifest:
    config: dict[str, Any] = {"transformer": describe_transformer(checkpoint.transformer.config)}
    if checkpoint.text_encoder is not None:
        encoder = describe_text_encoder(checkpoint.text_encoder.config)
        config["text_encoder"] = encoder | {"max_tokens": _max_tokens(checkpoint.tokenizer)}
    if checkpoint.vae is not None:
        config["vae"] = describe_vae(checkpoint.vae.config)
    if name is not None:
        config["video"] = {"height": PUBLISHED[name].height, "width": PUBLISHED[name].width}
    return Manifest(
        FAMILY,
        name,
        _dtype_name(STORED_TYPES[dtype or stored_precision(checkpoint.transformer)]),
        tuple(part for part in _PARTS if getattr(checkpoint, part) is None),
        config,
        specs,
        checkpoint.presets,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
