"""What of a model a prediction needs, from a bundle or a published configuration.

Neighbours: `predict` and `memory_plan` reckon with it.
"""

__all__ = ["PREDICT", "Model", "describe_model"]

import math
from dataclasses import dataclass
from pathlib import Path

from mc_engines.bundle import Bundle
from mc_engines.manifest import Manifest
from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE, Published
from mc_engines.run_sizes import TEXT_TOKENS
from mc_engines.run_tapes import DecoderShape
from mc_engines.specs import split_size
from mc_runtime.flops import ModelFlops
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule import LatentGrid

PREDICT = "mc-bench predict"
# Weights of a layer of the text encoder that published configurations share, but for norms and
# biases by distance.
_UMT5_LAYER = UMT5_XXL["d_model"] * (
    4 * UMT5_XXL["num_heads"] * UMT5_XXL["d_kv"] + 3 * UMT5_XXL["d_ff"]
)
# And of the four engines of their VAE: the sizes of engines in 16 bit, in README.md, by two.
_WAN_WEIGHTS = 184_000_000
_WAN_DECODER_WEIGHTS = 98_700_000  # of the decoder's two, in the files of an export
_FREQUENCIES = 256  # of the embedding of timesteps
_DECODER = "vae_decoder_first", "vae_decoder_next"
_VAE = ("vae_encoder_first", "vae_encoder_next", *_DECODER)
_TRANSFORMER = "text_projection", "timestep", "embed", "head"  # with weights inside
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
        decoder: Of its VAE.
        graph_weights: Number of weights inside the graphs that a generation opens.
        stored_bytes: Of a weight in its files.
        text_tokens: Of a prompt, padding included.
    """

    name: str
    flops: ModelFlops
    heads: int
    grid: LatentGrid
    defaults: GenerationOptions
    text_layer: int | None = None
    vae_weights: int | None = None
    decoder: DecoderShape | None = None
    graph_weights: int = 0
    stored_bytes: int = 2
    text_tokens: int = TEXT_TOKENS


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
    return _describe_published(name, published)


def _describe_published(name: str, published: Published) -> Model:
    """Read a published configuration; the one in this package has parts of its own."""
    config = published.transformer
    flops = ModelFlops.from_published(config)
    ends = flops.text_dim + flops.patch_in + flops.patch_out + _FREQUENCIES
    # Text: C x C. Timesteps: C x C and C x 6 C, and the same of frame rates.
    squares = 15 if config.get("inject_sample_info") else 8
    inside = (ends + squares * flops.dim) * flops.dim
    shared = published.repository is not None
    return Model(
        name,
        flops,
        config["num_attention_heads"],
        LatentGrid(spatial_factor=published.spatial_factor, patch_size=config["patch_size"]),
        GenerationOptions(height=published.height, width=published.width),
        _UMT5_LAYER if shared else None,
        _WAN_WEIGHTS if shared else None,
        DecoderShape.from_config(WAN21_VAE) if shared else None,
        inside + (_WAN_DECODER_WEIGHTS if shared else 0),
    )


def _describe_bundle(name: str) -> Model:
    """Read a bundle.

    Returns:
        The model.

    Raises:
        ValueError: It is of a family whose schedule and costs are not modelled.
    """
    pipeline = VideoPipeline(Bundle.open(name))
    pipeline.family.require(PREDICT)
    manifest = pipeline.bundle.manifest
    config, layer = manifest.config["transformer"], manifest.components.get("text_layer")
    specs = None if layer is None else layer.graphs["fp32"].weights
    vae = "vae" in manifest.config
    opened = (*_TRANSFORMER, *(_DECODER if vae else ()))
    return Model(
        name,
        ModelFlops.from_manifest(config),
        config["heads"],
        pipeline.grid,
        pipeline.default_options,
        None if specs is None else sum(math.prod(map(int, spec.shape)) for spec in specs),
        _count_weights(manifest, _VAE) if vae else None,
        _read_decoder(pipeline.bundle) if vae else None,
        _count_weights(manifest, opened),
        _STORED[manifest.weights_dtype],
        manifest.config.get("text_encoder", {}).get("max_tokens", TEXT_TOKENS),
    )


def _count_weights(manifest: Manifest, components: tuple[str, ...]) -> int:
    """Number of weights in the files that the precisions of a graph share."""
    files = (manifest.files.get(f"onnx/{component}.onnx.data") for component in components)
    stored = sum(file.size for file in files if file is not None)
    return stored // _STORED[manifest.weights_dtype]


def _read_decoder(bundle: Bundle) -> DecoderShape:
    """Tell the decoder by what it keeps from step to step."""
    states = [
        spec
        for spec in bundle.graph("vae_decoder_next", "fp32").inputs
        if spec.name.startswith("state")
    ]
    sides = [split_size(str(spec.shape[-1]))[0] for spec in states]
    channels = [int(spec.shape[1]) for spec in states]
    return DecoderShape.from_states([*zip(channels, sides, strict=True)])
