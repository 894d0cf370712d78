"""The four components of the Wan 2.1 autoencoder, filled from a checkpoint.

Neighbours: `wan_vae` computes, `mc_runtime.vae` drives the exported graphs. The weights stay in
the graphs: they are convolutions, and every layer has another shape.
"""

__all__ = ["describe_vae", "vae_components", "vae_tensors"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mc_export.checkpoint import load_finite
from mc_export.component import ComponentSource
from mc_export.tensor_source import TensorSource
from mc_export.wan_vae import Conv, DecoderStep, EncoderStep, RmsNorm
from mc_export.wan_vae_config import WanVaeConfig

SAMPLE_SIZE = (4, 6)  # height and width of the latent frames that the graphs are traced with


def vae_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name every tensor of the autoencoder and its shape, as diffusers stores them.

    Args:
        config: The checkpoint's configuration of the autoencoder.

    Returns:
        Shapes by tensor name.

    Raises:
        CheckpointError: The configuration is not one of a Wan 2.1 autoencoder.
    """
    sizes = WanVaeConfig.from_dict(config)
    with torch.device("meta"):
        steps = EncoderStep(sizes, first=False), DecoderStep(sizes, first=False)
    return {
        f"{path}.{name}": shape
        for step in steps
        for path, leaf in step.named_modules()
        if isinstance(leaf, Conv | RmsNorm)
        for name, shape in leaf.stored.items()
    }


def describe_vae(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the runtime must know of the autoencoder; stands in the manifest.

    Args:
        config: The checkpoint's configuration of the autoencoder.

    Returns:
        The manifest's `config.vae`.

    Raises:
        CheckpointError: The configuration is not one of a Wan 2.1 autoencoder.
    """
    sizes = WanVaeConfig.from_dict(config)
    return {
        "z_dim": sizes.z_dim,
        "spatial_factor": sizes.spatial_factor,
        "temporal_factor": sizes.temporal_factor,
        "latents_mean": list(sizes.latents_mean),
        "latents_std": list(sizes.latents_std),
    }


def vae_components(config: Mapping[str, Any], tensors: TensorSource) -> list[ComponentSource]:
    """Build the encoder's and the decoder's first and later step, in that order.

    The tensors named by `vae_tensors` must be there; each is converted to float32 as it is read.

    Args:
        config: The checkpoint's configuration of the autoencoder.
        tensors: The checkpoint's tensors.

    Returns:
        `vae_encoder_first`, `vae_encoder_next`, `vae_decoder_first`, `vae_decoder_next`. A later
        step takes `state_00` and so on, and every step gives `next_state_00` and so on.

    Raises:
        CheckpointError: The configuration is not one of a Wan 2.1 autoencoder, or a tensor has
            NaN or infinity in it.
    """
    sizes = WanVaeConfig.from_dict(config)
    draw = torch.Generator().manual_seed(0)
    height, width = (sizes.spatial_factor * size for size in SAMPLE_SIZE)
    count = 1 + sizes.temporal_factor
    frames = torch.rand((1, sizes.in_channels, count, height, width), generator=draw) * 2 - 1
    latents = torch.randn((1, sizes.z_dim, 2, *SAMPLE_SIZE), generator=draw)
    with torch.device("meta"):
        encoders = [EncoderStep(sizes, first) for first in (True, False)]
        decoders = [DecoderStep(sizes, first) for first in (True, False)]
    return [
        *_sources("vae_encoder", encoders, tensors, ("frames", frames), "latents"),
        *_sources("vae_decoder", decoders, tensors, ("latents", latents), "frames"),
    ]


def _load(step: nn.Module, tensors: TensorSource) -> nn.Module:
    step = step.to_empty(device="cpu").eval().requires_grad_(False)
    for path, leaf in step.named_modules():
        if isinstance(leaf, Conv | RmsNorm):
            for name, parameter in leaf.named_parameters():
                tensor = load_finite(tensors, f"{path}.{name}").float()
                parameter.copy_(leaf.fit(name, tensor))
    return step


def _sources(
    part: str,
    steps: Sequence[nn.Module],
    tensors: TensorSource,
    sample: tuple[str, Tensor],
    output: str,
) -> list[ComponentSource]:
    first, later = (_load(step, tensors) for step in steps)
    input_name, data = sample
    head, tail = data[:, :, :1].contiguous(), data[:, :, 1:].contiguous()
    states = first(head)[1:]
    outputs = (output, *(f"next_state_{i:02d}" for i in range(len(states))))
    remembered = {f"state_{i:02d}": state for i, state in enumerate(states)}
    return [
        _source(f"{part}_first", first, {input_name: head}, outputs),
        _source(f"{part}_next", later, {input_name: tail, **remembered}, outputs),
    ]


def _source(
    name: str, module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...]
) -> ComponentSource:
    dynamic = {
        key: {
            axis: _symbol(symbol, value.shape[axis] // size)
            for axis, symbol, size in zip((3, 4), "hw", SAMPLE_SIZE, strict=True)
        }
        for key, value in inputs.items()
    }
    # About twenty convolutions one after the other: roundings add up as in a random walk.
    return ComponentSource(name, module, inputs, dynamic, outputs, depth=4)


def _symbol(symbol: str, multiple: int) -> str:
    return symbol if multiple == 1 else f"{multiple}*{symbol}"
