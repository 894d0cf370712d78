"""What a family of models brings to the exporter: everything in which it differs from others.

Neighbours: an adapter module per family fills it, `families` lists them, `export_bundle` and
`mc-export` use it. A new family is a new adapter and a line in `FAMILIES`; nothing else asks which
family a checkpoint is of.
"""

__all__ = ["Family", "Table", "VideoSizes"]

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mc_export.checkpoint import Checkpoint, Part
from mc_export.component import ComponentSource
from mc_export.tensor_source import Shape

VideoSizes: TypeAlias = Mapping[str, int | None]


@dataclass(frozen=True)
class Table:
    """Weights of a bundle that no graph reads, but the host.

    Attributes:
        name: What it is, in the words of a report.
        file: Its path in the bundle.
        load: Loads its tensors by name.
    """

    name: str
    file: str
    load: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """An adapter: from the checkpoints of one family to components and a manifest.

    Attributes:
        accepted: The forms of a checkpoint that `load` takes, in words.
        load: Opens the folder of a checkpoint; CheckpointError where it is none of this family.
        fetch: Gets the published checkpoint of a name; None where the user has to.
        tensors: By part of a checkpoint, the shape of each tensor that it must hold, by name.
        components: Every component of every part there is, in the order in which a run needs them;
            each is loaded when it is asked for.
        tables: What the bundle holds beside the components.
        layers: How many layer files the components of a checkpoint have, and how many components
            there are: for a progress bar.
        describe: The manifest's `config`, of a checkpoint and the name of its published
            configuration.
        missing: By name of what a checkpoint lacks, what cannot be done without it.
        write_tokenizer: From the folder of a checkpoint's tokenizer, writes the bundle's.
        plan: What `mc-export --dry-run` prints, of a checkpoint, the type that its weights are to
            be stored in, the name that was asked for, and the sizes of a video.
    """

    accepted: str
    load: Callable[[Path], Checkpoint]
    fetch: Callable[[str], Path] | None
    tensors: Callable[[Checkpoint], dict[str, dict[str, Shape]]]
    components: Callable[[Checkpoint], Iterator[tuple[Part, ComponentSource]]]
    tables: Callable[[Checkpoint], list[Table]]
    layers: Callable[[Checkpoint], tuple[int, int]]
    describe: Callable[[Checkpoint, str | None], dict[str, Any]]
    missing: Callable[[Checkpoint], dict[str, str]]
    plan: Callable[[Checkpoint, torch.dtype, str, VideoSizes], str]
    write_tokenizer: Callable[[Path, Path], object] = shutil.copytree
