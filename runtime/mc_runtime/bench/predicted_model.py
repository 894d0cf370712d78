"""What of a model a prediction needs, from a bundle or a published configuration.

Neighbours: `predict` and `memory_plan` reckon with it.
"""

__all__ = ["Model", "count_wan_states", "describe_model"]

import math
from dataclasses import dataclass
from pathlib import Path

from mc_engines.building.bounds import Bounds, bound_tensor
from mc_engines.bundle import Bundle
from mc_engines.manifest import Manifest
from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE
from mc_runtime.flops import ModelFlops
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule import LatentGrid

_FAMILY = "skyreels"
# Weights of a layer of the text encoder that published configurations share, but for norms and
# biases by distance.
_UMT5_LAYER = UMT5_XXL["d_model"] * (
    4 * UMT5_XXL["num_heads"] * UMT5_XXL["d_kv"] + 3 * UMT5_XXL["d_ff"]
)
# And of the four engines of their VAE: the sizes of engines in 16 bit, in README.md, by two.
_WAN_WEIGHTS = 184_000_000
_VAE = "vae_encoder_first", "vae_encoder_next", "vae_decoder_first", "vae_decoder_next"
_STORED = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Model:
    """What of a model a prediction needs; None where that is not told.

    Attributes:
        name: Of the bundle's folder or the published configuration.
        flops: Operations of its parts.
        heads: Of its attention.
        grid: Pixels per latent and latents per token.
        defaults: Of a generation.
        text_layer: Number of weights in a layer of its text encoder.
        vae_weights: Number of weights in the engines of its VAE.
        vae_states: Values per pixel that its decoder keeps from step to step.
    """

    name: str
    flops: ModelFlops
    heads: int
    grid: LatentGrid
    defaults: GenerationOptions
    text_layer: int | None = None
    vae_weights: int | None = None
    vae_states: float | None = None


def describe_model(name: str) -> Model:
    """Read what is known of a model.

    Args:
        name: Folder of a bundle, or a published configuration such as skyreels-df-1.3b-540p.

    Returns:
        The model.

    Raises:
        BundleError: The bundle is damaged.
        ValueError: There is neither a folder nor a configuration of that name, or the bundle is of
            another family.
    """
    published = PUBLISHED.get(name)
    if published is None:
        if not Path(name).is_dir():
            raise ValueError(
                f"{name}: expected a bundle or one of {', '.join(PUBLISHED)}, got neither. "
                "Pass the folder that mc-export wrote, or one of these names."
            )
        return _describe_bundle(name)
    config = published.transformer
    return Model(
        name,
        ModelFlops.from_published(config),
        config["num_attention_heads"],
        LatentGrid(spatial_factor=published.spatial_factor, patch_size=config["patch_size"]),
        GenerationOptions(height=published.height, width=published.width),
        *(
            (None, None, None)  # the one in this package has parts of its own
            if published.repository is None
            else (_UMT5_LAYER, _WAN_WEIGHTS, count_wan_states(WAN21_VAE["base_dim"]))
        ),
    )


def count_wan_states(base: int) -> float:
    """Count what the decoder of Wan 2.1's VAE keeps from step to step, per pixel.

    Args:
        base: Its channels at full size.

    Returns:
        Values: two frames of the input of every convolution along time. These are 5 at full size, 4
        at half with twice the channels, at a quarter 1 with twice and 4 with four times, at an
        eighth 9 with four times, and one of the 16 channels of the latents.

    Example:
        >>> count_wan_states(8)
        139.5
    """
    return 2 * (base * (5 + 4 * 2 / 4 + (2 + 4 * 4) / 16 + 9 * 4 / 64) + 16 / 64)


def _describe_bundle(name: str) -> Model:
    """Read a bundle; of SkyReels-V2 alone, as schedule and costs of others are not modelled.

    Returns:
        The model.

    Raises:
        ValueError: It is of another family.
    """
    pipeline = VideoPipeline(Bundle.open(name))
    manifest = pipeline.bundle.manifest
    if manifest.family != _FAMILY:
        raise ValueError(
            f"{name}: expected a bundle of the family {_FAMILY}, got {manifest.family}. Time it "
            "with mc-bench run."
        )
    config, layer = manifest.config["transformer"], manifest.components.get("text_layer")
    specs = None if layer is None else layer.graphs["fp32"].weights
    vae = "vae" in manifest.config
    return Model(
        name,
        ModelFlops.from_manifest(config),
        config["heads"],
        pipeline.grid,
        pipeline.default_options,
        None if specs is None else sum(math.prod(map(int, spec.shape)) for spec in specs),
        _count_vae_weights(manifest) if vae else None,
        _count_vae_states(pipeline.bundle) if vae else None,
    )


def _count_vae_weights(manifest: Manifest) -> int:
    """Number of weights in the files that the precisions of a graph share."""
    files = (manifest.files.get(f"onnx/{component}.onnx.data") for component in _VAE)
    stored = sum(file.size for file in files if file is not None)
    return stored // _STORED[manifest.weights_dtype]


def _count_vae_states(bundle: Bundle) -> float:
    """Values per pixel that the decoder keeps from step to step."""
    one = Bounds(1, 1, 1)
    states = (
        math.prod(bound_tensor(spec, {"h": one, "w": one})[2])
        for spec in bundle.graph("vae_decoder_next", "fp32").inputs
        if spec.name.startswith("state")
    )
    factor: int = bundle.manifest.config["vae"]["spatial_factor"]
    return sum(states) / factor**2
