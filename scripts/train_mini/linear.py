"""The linear heart of the VAE, trained first: seconds instead of an hour to a good codec.

A linear codec is already good on this world, and without residual branches, norms and activations
a step costs a tenth. `linear_only` leaves them out; `restore_nonlinear` puts them back around what
was learned, without changing what it computes by much.
"""

__all__ = ["linear_only", "restore_nonlinear"]

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock
from torch import Tensor, nn

_GAIN = 4.0  # the activation is nearly linear around it
_OFFSET = 12.0  # of the last norms, in standard deviations of the signal


class _Shortcut(nn.Module):
    """A residual block without its branch."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: Tensor, **cache: Any) -> Tensor:
        return self.shortcut(x)


class _Centre(nn.Module):
    """What a norm over the channels leaves of a small signal beside a large constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


@contextmanager
def linear_only(vae: AutoencoderKLWan) -> Generator[None]:
    """Leave out the residual branches, the attention, the norms and the activations."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(parent: nn.Module, name: str, child: nn.Module) -> None:
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, child)

    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, WanResidualBlock):
                replace(parent, name, _Shortcut(child.conv_shortcut))
            elif isinstance(child, WanAttentionBlock):
                replace(parent, name, nn.Identity())
    for half in (vae.encoder, vae.decoder):
        replace(half, "norm_out", _Centre())
        replace(half, "nonlinearity", nn.Identity())
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@torch.no_grad()
def restore_nonlinear(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Let the whole VAE compute nearly what `linear_only` made it compute.

    Residual branches start at zero. A large constant joins the signal before the last norm of each
    half; the norm then divides by the constant, and the activation works where it is straight.

    Args:
        vae: Trained under `linear_only`.
        video: A sample to measure the signals with, shape (B, 3, T, h, w).
    """
    halves = vae.encoder, vae.decoder
    sizes: dict[nn.Module, float] = {}
    with linear_only(vae):
        for half in halves:
            half.norm_out.register_forward_hook(
                lambda _, __, out, half=half: sizes.update({half: float(out.std())})
            )
        vae.decode(vae.encode(video).latent_dist.mode())
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    lasts = vae.encoder.mid_block.resnets[-1], vae.decoder.up_blocks[-1].resnets[-1]
    for half, last in zip(halves, lasts, strict=True):
        _surround(half, last, _OFFSET * sizes[half])


def _surround(half: nn.Module, last: nn.Module, constant: float) -> None:
    """Add a constant before the norm of an encoder or decoder and cancel it behind.

    What `_Centre` passes on sums to zero over the channels, so the mean of the last kernel over
    its input channels may go; then the constant cancels, at the padded borders too.
    """
    gain = torch.tensor(_GAIN, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(nn.functional.silu(gain), gain)
    nn.init.constant_(last.conv2.bias, constant)
    nn.init.constant_(half.norm_out.gamma, _GAIN)
    half.conv_out.weight -= half.conv_out.weight.mean(dim=1, keepdim=True)
    half.conv_out.weight *= constant / (_GAIN * slope)
