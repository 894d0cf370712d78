"""Reads a SkyReels-V2 checkpoint of either layout as one thing: parts with diffusers' names.

This is where a checkpoint enters: `load_checkpoint` finds the parts, the adapters turn each into
components and hold it against the tensors they need with `check_tensors`. Nothing is read here but
configurations and headers. Neighbours: `tensor_source` maps the files, `original_names` translates
the original layout, `fetch_checkpoint` gets a published one; `load_magi_checkpoint` does the same
for the other family.
"""

__all__ = [
    "ACCEPTED_FORMS",
    "Checkpoint",
    "Part",
    "TensorSource",
    "check_tensors",
    "load_checkpoint",
    "load_finite",
    "read_json",
]

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_engines.errors import CheckpointError
from mc_engines.published import PUBLISHED
from mc_export.original_names import (
    text_encoder_config,
    text_encoder_name,
    transformer_config,
    transformer_name,
    vae_config,
    vae_name,
)
from mc_export.tensor_source import (
    PickleSource,
    RenamedSource,
    SafetensorsSource,
    Shape,
    TensorSource,
)
from motioncache import Preset

ACCEPTED_FORMS = (
    "a diffusers folder (transformer/config.json and transformer/*.safetensors; beside them "
    "text_encoder/, tokenizer/, vae/, scheduler/) or the original layout (config.json and "
    "*.safetensors; beside them Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/)"
)

_PIPELINE = "SkyReelsV2DiffusionForcing"
_TRANSFORMER_CLASS = "SkyReelsV2Transformer3DModel"
_TRANSFORMER_KEYS = PUBLISHED["skyreels-df-1.3b-540p"].transformer.keys()
# What diffusers takes where a configuration leaves a key out; the other keys have to be there.
_TRANSFORMER_DEFAULTS = {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "inject_sample_info": False,
    "rope_max_seq_len": 1024,
}
_USE_PUBLISHED = f"Use one of {', '.join(PUBLISHED)}, or a model trained from one."
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: the transformer, the text encoder or the VAE.

    Attributes:
        config: Keys of diffusers (transformer, VAE) or transformers (text encoder) for SkyReels-V2;
            of its own configuration for MAGI-1.
        tensors: Tensors under the names that belong to these keys, in either layout.
    """

    config: dict[str, Any]
    tensors: TensorSource


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint; what it lacks is None.

    Attributes:
        path: Its folder.
        transformer: The keys of its config are those of a published configuration, all of them.
        text_encoder: Its config has the keys of transformers' UMT5Config, or T5Config.
        vae: Its config has the keys of diffusers' AutoencoderKLWan, or of its family's own.
        tokenizer: Folder with `tokenizer.json`, or with what the family makes one of; without that
            file the tokenizer counts as missing.
        scheduler: How the model is meant to be run: diffusers' scheduler_config.json, which the
            original layout lacks; or what MAGI-1's configuration says besides the model's sizes.
        presets: Cache presets for these weights, from `presets.json`, as a manifest has them.
        family: Name of the adapter in `FAMILIES`.
    """

    path: Path
    transformer: Part
    text_encoder: Part | None
    vae: Part | None
    tokenizer: Path | None
    scheduler: dict[str, Any] | None
    presets: dict[str, Any] = field(default_factory=dict)
    family: str = "skyreels"


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path: A diffusers folder or one in the original layout; see `ACCEPTED_FORMS`.

    Returns:
        Its parts, those that are there.

    Raises:
        CheckpointError: It is neither; or another model; or a file is damaged or missing.
        MissingExtraError: safetensors is not installed.
    """
    if (path / "transformer" / "config.json").is_file():
        return _load_diffusers(path)
    if (path / "config.json").is_file():
        return _load_original(path)
    got = "a folder with neither" if path.is_dir() else "no folder"
    raise CheckpointError(f"{path}: expected {ACCEPTED_FORMS}, got {got}.")


def check_tensors(part_name: str, source: TensorSource, expected: Mapping[str, Shape]) -> None:
    """Refuse a part whose tensors are not exactly those the model has.

    Args:
        part_name: For the message, such as `transformer`.
        source: The tensors of the part.
        expected: Shape of each tensor by name.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of another shape, or not floating point.
    """
    names = source.names()
    common = sorted(names & expected.keys())
    problems = [
        _listing("missing", sorted(expected.keys() - names)),
        _listing("unexpected", sorted(names - expected.keys())),
        _listing(
            "wrongly shaped",
            [
                f"{name} {source.shape(name)} instead of {tuple(expected[name])}"
                for name in common
                if source.shape(name) != tuple(expected[name])
            ],
        ),
        _listing(
            "not float32, float16 or bfloat16",
            [name for name in common if source.dtype(name) not in _DTYPES],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"{part_name}: expected {len(expected)} tensors, got {len(names)}: "
            f"{'; '.join(filter(None, problems))}. "
            "Check that weights and configuration belong together."
        )


def load_finite(source: TensorSource, name: str) -> Tensor:
    """Load a tensor and refuse NaN and infinity in it.

    Args:
        source: Where it lies.
        name: Its name.

    Returns:
        The tensor as `source.load` gives it.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    tensor = source.load(name)
    # The extremes carry every NaN and infinity, and unlike isfinite() they need no copy.
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        raise CheckpointError(
            f"tensor '{name}': expected finite values, got NaN or infinity. "
            "Fetch the checkpoint again, or ask whoever trained it."
        )
    return tensor


def read_json(file: Path) -> dict[str, Any]:
    """Read what a configuration holds by name.

    Args:
        file: Where it lies.

    Returns:
        The object.

    Raises:
        CheckpointError: It cannot be read, or is something else.
    """
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: expected JSON, got {error}. Fetch the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, got {type(value).__name__}. "
            "Fetch the checkpoint again."
        )
    return value


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_NAMES_SHOWN])}{more})"


def _load_diffusers(path: Path) -> Checkpoint:
    pipeline = _optional_json(path / "model_index.json") or {}
    name = pipeline.get("_class_name", _PIPELINE)
    if not str(name).startswith(_PIPELINE):
        raise CheckpointError(
            f"{path / 'model_index.json'}: expected a {_PIPELINE}Pipeline, got {name}. "
            f"{_USE_PUBLISHED}"
        )
    file = path / "transformer" / "config.json"
    config = read_json(file)
    if config.get("_class_name", _TRANSFORMER_CLASS) != _TRANSFORMER_CLASS:
        raise CheckpointError(
            f"{file}: expected a {_TRANSFORMER_CLASS}, got {config['_class_name']}. "
            f"{_USE_PUBLISHED}"
        )
    return Checkpoint(
        path=path,
        transformer=Part(_transformer_config(file, config), SafetensorsSource(file.parent)),
        text_encoder=_diffusers_part(path / "text_encoder"),
        vae=_diffusers_part(path / "vae"),
        tokenizer=_tokenizer(path / "tokenizer"),
        scheduler=_optional_json(path / "scheduler" / "scheduler_config.json"),
        presets=_load_presets(path / "presets.json"),
    )


def _load_presets(file: Path) -> dict[str, Any]:
    presets = _optional_json(file) or {}
    try:
        for key, value in presets.items():
            Preset.from_json(key, value)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: expected presets that mc-calibrate made, got: {error}"
        ) from error
    return presets


def _diffusers_part(folder: Path) -> Part | None:
    config = _optional_json(folder / "config.json")
    return None if config is None else Part(config, SafetensorsSource(folder))


def _load_original(path: Path) -> Checkpoint:
    file = path / "config.json"
    original = read_json(file)
    if "model_config" in original:
        raise CheckpointError(
            f"{file}: expected the configuration of a SkyReels-V2 model, got one of MAGI-1. "
            "Pass --model magi."
        )
    name = original.get("_class_name", "WanModel")
    if name == _TRANSFORMER_CLASS:
        raise CheckpointError(
            f"{path}: expected {ACCEPTED_FORMS}, got the transformer/ folder of the former. "
            "Give the folder that it lies in."
        )
    if name != "WanModel" or original.get("model_type", "t2v") != "t2v":
        raise CheckpointError(
            f"{file}: expected a WanModel of model_type 't2v', got {name} "
            f"{original.get('model_type')!r}. {_USE_PUBLISHED}"
        )
    try:
        config = transformer_config(original)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{file}: expected the sizes dim, ffn_dim, num_heads and num_layers, got "
            f"{sorted(original)}. Take the file from where the weights come from."
        ) from error
    return Checkpoint(
        path=path,
        transformer=Part(
            _transformer_config(file, config),
            RenamedSource(SafetensorsSource(path), transformer_name),
        ),
        text_encoder=_original_part(
            path / "models_t5_umt5-xxl-enc-bf16.pth",
            text_encoder_config,
            lambda _: text_encoder_name,
        ),
        vae=_original_part(
            path / "Wan2.1_VAE.pth",
            vae_config,
            lambda config: partial(vae_name, num_res_blocks=config["num_res_blocks"]),
        ),
        tokenizer=_tokenizer(path / "google" / "umt5-xxl"),
        scheduler=None,
    )


def _original_part(
    file: Path,
    read_config: Callable[[Mapping[str, Shape]], dict[str, Any]],
    renaming: Callable[[dict[str, Any]], Callable[[str], str]],
) -> Part | None:
    if not file.is_file():
        return None
    source = PickleSource(file)
    try:
        config = read_config({name: source.shape(name) for name in source.names()})
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{file}: expected the tensors of the original model, got none that fits {error}. "
            "Fetch the checkpoint again."
        ) from error
    return Part(config, RenamedSource(source, renaming(config)))


def _transformer_config(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the keys that make the model, after refusing one that wants an image as well."""
    image = {key: config[key] for key in ("image_dim", "added_kv_proj_dim") if config.get(key)}
    if config.get("in_channels") == 36:
        image["in_channels"] = 36
    if image:
        raise CheckpointError(
            f"{file}: expected a diffusion-forcing text-to-video transformer, got an "
            f"image-to-video one ({', '.join(f'{key} {value}' for key, value in image.items())}). "
            f"{_USE_PUBLISHED}"
        )
    full = {**_TRANSFORMER_DEFAULTS, **config}
    missing = [key for key in _TRANSFORMER_KEYS if key not in full]
    if missing:
        raise CheckpointError(
            f"{file}: expected the keys {', '.join(missing)}, got none of that name. "
            "Take the file from where the weights come from."
        )
    return {key: full[key] for key in _TRANSFORMER_KEYS}


def _tokenizer(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer.json").is_file() else None


def _optional_json(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None
