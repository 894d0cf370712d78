"""Gets a published SkyReels-V2, for an export without `--checkpoint`: from the hub or this package.

Neighbours: `PUBLISHED` says where each lies, `load_checkpoint` opens what comes back.
"""

__all__ = ["PACKAGED", "fetch_checkpoint"]

from pathlib import Path

from mc_engines.errors import CheckpointError, MissingExtraError, require
from mc_engines.published import FAMILY_DEFAULTS, PUBLISHED
from mc_export.checkpoint import ACCEPTED_FORMS

# The small model that comes with this package.
PACKAGED = Path(__file__).parent / "skyreels_mini"

# What `load_checkpoint` opens, and the licence; not the pictures and the pickled twins.
_WANTED = (
    "LICENSE*",
    "model_index.json",
    "scheduler/*.json",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "tokenizer/*",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
)


def fetch_checkpoint(model: str) -> Path:
    """Fetch a published checkpoint into the hub's cache, or find it there or in this package.

    Args:
        model: Name of a published configuration, or of a family: then its `FAMILY_DEFAULTS`.

    Returns:
        The folder of the checkpoint, in diffusers' layout.

    Raises:
        ValueError: No published checkpoint has this name.
        MissingExtraError: huggingface-hub is not installed; the message names the other ways.
        CheckpointError: The hub cannot be reached, or does not give it.
    """
    name = FAMILY_DEFAULTS.get(model, model)
    if name not in PUBLISHED:
        families = [family for family, default in FAMILY_DEFAULTS.items() if default in PUBLISHED]
        raise ValueError(
            f"model: expected one of {', '.join([*families, *PUBLISHED])}, got {model!r}."
        )
    repository = PUBLISHED[name].repository
    if repository is None:
        return PACKAGED
    try:
        hub = require("huggingface_hub", "export")
    except MissingExtraError as error:
        raise MissingExtraError(
            f"{error}, to fetch {repository}; or give --checkpoint: {ACCEPTED_FORMS}."
        ) from error
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's and its connection's errors have no common base
        raise CheckpointError(
            f"{repository}: expected to fetch it from the Hugging Face hub, got {error}. "
            f"Try again, or give --checkpoint: {ACCEPTED_FORMS}."
        ) from error
