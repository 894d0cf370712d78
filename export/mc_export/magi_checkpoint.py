"""Reads a MAGI-1 checkpoint in its official layout: one JSON file, and a folder of weights.

Neighbours: `checkpoint` has the types and the checks; `magi_components` makes graphs of what comes
back. Nothing is read here but the configuration and headers.

Source: SandAI-org/MAGI-1 6ff822e, inference/common/config.py and inference/infra/checkpoint.
"""

__all__ = [
    "ACCEPTED_LAYOUT",
    "SPECIAL_TOKENS_FILE",
    "TEXT_ENCODER_FOLDER",
    "TILES_PER_SECOND",
    "VAE_FOLDER",
    "load_magi_checkpoint",
    "load_special_tokens",
]

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from mc_engines.errors import CheckpointError
from mc_engines.model_sizes import MAGI_SPECIAL_TOKENS
from mc_engines.published import MAGI
from mc_export.checkpoint import Checkpoint, Part, read_json
from mc_export.t5_tokenizer import has_t5_tokenizer
from mc_export.tensor_source import SafetensorsSource, open_weights

ACCEPTED_LAYOUT = (
    "config.json (a file of SandAI-org/MAGI-1's example folder, under this name) and beside it "
    "inference_weight/, or inference_weight.distill/ for a distilled model, with *.safetensors "
    "(from the folder of the same model in sand-ai/MAGI-1 on the Hugging Face hub); for prompts "
    "t5/t5-v1_1-xxl/ (of its ckpt folder) and, for the special tokens that stand before them, "
    "special_tokens.npz (of the example folder's assets); for frames vae/ (of the ckpt folder)"
)
SPECIAL_TOKENS_FILE = "special_tokens.npz"
TEXT_ENCODER_FOLDER = "t5/t5-v1_1-xxl"
VAE_FOLDER = "vae"

CHUNK_FRAMES = 6
SPATIAL_FACTOR = 8
TILES_PER_SECOND = 2  # of video, that the original codes one after the other
_MODEL_KEYS = next(iter(MAGI.values())).transformer.keys() - {"distill"}
_RUNTIME_KEYS = (
    *("cfg_number", "cfg_t_range", "prev_chunk_scales", "text_scales"),
    *("noise2clean_kvrange", "clean_chunk_kvrange", "clean_t", "num_steps", "window_size"),
    *("num_frames", "video_size_h", "video_size_w", "fps", "chunk_width"),
    *("temporal_downsample_factor", "scale_factor"),
)
_ENGINE_KEYS = "fp8_quant", "distill", "distill_nearly_clean_chunk_threshold", "shortcut_mode"
_SECTIONS = {
    "model_config": tuple(sorted(_MODEL_KEYS)),
    "runtime_config": _RUNTIME_KEYS,
    "engine_config": _ENGINE_KEYS,
}
_FROM_ASSETS = "Take the file from the example folder's assets."
_FROM_EXAMPLE = "Take config.json from where the weights come from."


def load_magi_checkpoint(path: Path) -> Checkpoint:
    """Open a MAGI-1 checkpoint without reading its weights.

    Args:
        path: Its folder; see `ACCEPTED_LAYOUT`.

    Returns:
        The parts that are there. The config of the transformer is the official `model_config` and
        `distill`; `scheduler` has the rest of the configuration that decides what is computed.
        Paths in the configuration are not followed.

    Raises:
        CheckpointError: A file is missing or damaged; the model is quantised, or another; what the
            configuration says does not fit together.
        MissingExtraError: safetensors is not installed.
    """
    file = path / "config.json"
    if not file.is_file():
        got = "a folder without config.json" if path.is_dir() else "no folder"
        raise CheckpointError(f"{path}: expected {ACCEPTED_LAYOUT}, got {got}.")
    model, runtime, engine = _read_sections(file)
    _check_run(file, runtime, engine)
    return Checkpoint(
        path=path,
        transformer=Part(
            model | {"distill": engine["distill"]},
            SafetensorsSource(_find_weights(path, engine["distill"])),
        ),
        text_encoder=_open_text_encoder(path / TEXT_ENCODER_FOLDER, model["caption_channels"]),
        vae=_open_vae(path / VAE_FOLDER, model, runtime),
        tokenizer=_find_tokenizer(path / TEXT_ENCODER_FOLDER),
        scheduler=runtime | engine,
        family="magi",
    )


def load_special_tokens(file: Path, text_dim: int) -> dict[str, Tensor]:
    """Load the embeddings that stand before a prompt, and say what is wanted of the video.

    Args:
        file: The original's `special_tokens.npz`.
        text_dim: Channels of the text embedding.

    Returns:
        `embedding`, shape (20, text_dim), float16, to which the original rounds it: row 1 asks for
        quality, rows 7 to 14 say that 1 to 8 chunks are left.

    Raises:
        CheckpointError: The file is damaged, or holds something else.
    """
    try:
        with np.load(file) as arrays, np.errstate(over="ignore"):  # refused below
            tokens = arrays["other_tokens"].astype(np.float16)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise CheckpointError(
            f"{file}: expected an npz with other_tokens, got {error}. {_FROM_ASSETS}"
        ) from error
    if tokens.shape != (MAGI_SPECIAL_TOKENS, text_dim) or not np.isfinite(tokens).all():
        raise CheckpointError(
            f"{file}: expected finite other_tokens of shape ({MAGI_SPECIAL_TOKENS}, {text_dim}), "
            f"got {tokens.shape}. {_FROM_ASSETS}"
        )
    return {"embedding": torch.from_numpy(tokens)}


def _open_text_encoder(folder: Path, text_dim: int) -> Part | None:
    """T5 as transformers stores it."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    for key, expected in (("model_type", "t5"), ("d_model", text_dim)):
        if config.get(key) != expected:
            raise CheckpointError(
                f"{file}: expected {key} {expected}, for which the transformer was trained, got "
                f"{config.get(key)}. Take the folder from where the transformer comes from."
            )
    return Part(config, open_weights(folder))


def _open_vae(folder: Path, model: Mapping[str, Any], runtime: Mapping[str, Any]) -> Part | None:
    """The autoencoder, as diffusers stores models."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    sizes = config.get("ddconfig", {})
    length = runtime["temporal_downsample_factor"]
    expected = {
        "z_chans": model["in_channels"] // (2 if model["half_channel_vae"] else 1),
        "patch_length": length,
        "patch_size": SPATIAL_FACTOR,
    }
    for key, value in expected.items():
        if sizes.get(key) != value:
            raise CheckpointError(
                f"{file}: expected {key} {value}, for which the transformer was trained, got "
                f"{sizes.get(key)}. Take the folder from where the transformer comes from."
            )
    tile = runtime["fps"] // TILES_PER_SECOND // length
    if tile < 1 or CHUNK_FRAMES % tile:
        raise CheckpointError(
            f"{file}: expected fps whose half second is a whole part of {CHUNK_FRAMES * length} "
            f"frames, got {runtime['fps']}. {_FROM_EXAMPLE}"
        )
    return Part(config, open_weights(folder))


def _find_tokenizer(folder: Path) -> Path | None:
    return folder if has_t5_tokenizer(folder) else None


def _read_sections(file: Path) -> list[dict[str, Any]]:
    """The keys that are needed, of each section of the configuration."""
    config = read_json(file)
    for section, keys in _SECTIONS.items():
        values = config.get(section, {})
        if missing := [key for key in keys if key not in values]:
            raise CheckpointError(
                f"{file}: expected {section} with {', '.join(missing)}, got none of that name. "
                f"{_FROM_EXAMPLE} Another family has another --model."
            )
    return [{key: config[section][key] for key in keys} for section, keys in _SECTIONS.items()]


def _check_run(file: Path, runtime: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    """Refuse settings that the model was not trained for, or that contradict each other."""
    if engine["fp8_quant"]:
        raise CheckpointError(
            f"{file}: expected weights of 16 or 32 bits, got fp8_quant true. "
            "Use the checkpoint of the same model that is not quantised."
        )
    passes, kind = (1, "distilled") if engine["distill"] else (3, "base")
    if runtime["cfg_number"] != passes:
        raise CheckpointError(
            f"{file}: expected cfg_number {passes} of a {kind} model, got {runtime['cfg_number']}. "
            f"{_FROM_EXAMPLE}"
        )
    if runtime["chunk_width"] != CHUNK_FRAMES:
        raise CheckpointError(
            f"{file}: expected chunk_width {CHUNK_FRAMES}, which the model was trained with, got "
            f"{runtime['chunk_width']}. {_FROM_EXAMPLE}"
        )
    steps, ranges = runtime["num_steps"], runtime["noise2clean_kvrange"]
    for key, parts in (
        ("window_size", runtime["window_size"]),
        ("noise2clean_kvrange", len(ranges) or 1),
    ):
        if parts < 1 or steps % parts:
            raise CheckpointError(
                f"{file}: expected num_steps that {key} cuts into equal stages, got {steps} steps "
                f"and {parts} stages. {_FROM_EXAMPLE}"
            )
    lengths = {len(runtime[key]) for key in ("cfg_t_range", "prev_chunk_scales", "text_scales")}
    if len(lengths) > 1:
        raise CheckpointError(
            f"{file}: expected cfg_t_range, prev_chunk_scales and text_scales of one length, got "
            f"{' and '.join(map(str, sorted(lengths)))}. {_FROM_EXAMPLE}"
        )


def _find_weights(path: Path, distilled: bool) -> Path:
    """The folder of the weights, after a look at what else it could be."""
    name = "inference_weight.distill" if distilled else "inference_weight"
    folder = path / name
    if not folder.is_dir():
        others = sorted(found.name for found in path.glob("inference_weight*"))
        raise CheckpointError(
            f"{folder}: expected the weights that config.json with distill {distilled} asks for, "
            f"got {', '.join(others) or 'no such folder'}. Check that they belong together; "
            "quantised weights (.fp8) are not read."
        )
    if packed := [
        file for file in sorted(folder.glob("*.zst")) if not file.with_suffix("").exists()
    ]:
        raise CheckpointError(
            f"{packed[0]}: expected unpacked weights, got {len(packed)} packed with zstd. "
            f"Run: zstd -d {folder}/*.zst"
        )
    return folder
