"""The Wan 2.1 video autoencoder as causal steps whose convolutions' states go in and come out.

The first frame of a video is a step of its own; every later step takes as many pixel frames as
one latent frame stands for. `EncoderStep` and `DecoderStep` are the two networks, each in a form
for the first and for any later step. `wan_vae_components` fills them from a checkpoint and names
their inputs; `mc_runtime.vae` drives them.

A causal convolution of kernel k and stride s along time needs the k - s frames before its input.
Before the first frame these are zeros, so in the first step only the kernel's last slice has work:
the first form keeps that slice alone. Two layers differ in more than that: the convolutions that
halve or double the frame rate do not run in the first step at all.

Axes: every tensor is (1, C, F, height, width), F the frames of the step at that layer's rate.

Source: Wan 2.1 (arXiv 2503.20314, section 4.1); tensor names are those of diffusers 0.42.1's
AutoencoderKLWan.
"""

__all__ = ["DecoderStep", "EncoderStep"]

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mc_export.islands import Island
from mc_export.wan_vae_config import WanVaeConfig

NORM_FLOOR = 1e-12


class States:
    """What the convolutions of a step remember of the frames before it, in order of use.

    Attributes:
        first: Whether nothing came before.
        new: What they will remember of the frames up to this step.
    """

    def __init__(self, past: Iterator[Tensor] | None) -> None:
        self._past = past
        self.first = past is None
        self.new: list[Tensor] = []

    def precede(self, x: Tensor, frames: int) -> Tensor:
        """Put the remembered frames before `x`, and remember the last `frames` of both."""
        assert self._past is not None
        whole = torch.cat([next(self._past), x], dim=2)
        self.new.append(whole[:, :, -frames:])
        return whole


class Conv(nn.Conv3d):
    """A convolution of each frame by itself, or of as many frames as are kept of the kernel.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernel: Sizes of the kernel in the checkpoint; two where it never spans frames.
        stride: Step in time and along each side.
        padding: Zeros around each frame.
        frames: Slices of the kernel in time to keep, from the last.

    Attributes:
        stored: Shape of each parameter in the checkpoint.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        stride: tuple[int, int] = (1, 1),
        padding: int = 0,
        frames: int = 1,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            kernel_size=(frames, kernel[-2], kernel[-1]),
            stride=(*stride, stride[1]),
            padding=(0, padding, padding),
        )
        self.stored = {"weight": (outputs, inputs, *kernel), "bias": (outputs,)}

    def fit(self, name: str, tensor: Tensor) -> Tensor:
        """Cut the checkpoint's tensor to the parameter of that name."""
        if name == "bias":
            return tensor
        outputs, inputs, frames, *sizes = self.weight.shape
        return tensor.reshape(outputs, inputs, -1, *sizes)[:, :, -frames:]


class CausalConv(Conv):
    """A convolution of each frame with those before it."""

    def __init__(
        self, inputs: int, outputs: int, first: bool, kernel: int = 3, stride: int = 1
    ) -> None:
        """Take a cube of size 3, or `kernel` = 1 for one that spans time alone."""
        frames = 1 if first else 3
        sizes = (3, kernel, kernel)
        super().__init__(inputs, outputs, sizes, (stride, 1), kernel // 2, frames)
        self.memory = 3 - stride

    def step(self, x: Tensor, states: States) -> Tensor:
        """Convolve the frames of a step, `x`, and those remembered before them."""
        if states.first:
            states.new.append(F.pad(x, (0, 0, 0, 0, self.memory - 1, 0)))
        else:
            x = states.precede(x, self.memory)
        y: Tensor = self(x)
        return y


class RmsNorm(Island):
    """Scales the channels of every pixel to a root mean square of one, then by a learned gain.

    The factor sqrt(C) stands on the norm, not in the gain: the gain must be stored as it is.
    """

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.scale = math.sqrt(channels)
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.stored = {"gamma": (channels,) + (1,) * dims}

    def fit(self, name: str, tensor: Tensor) -> Tensor:
        """Bring the checkpoint's gain to the shape of `gamma`."""
        return tensor.reshape(self.gamma.shape)

    def forward(self, x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / (norm.clamp_min(NORM_FLOOR) / self.scale) * self.gamma


class Residual(nn.Module):
    """Two normed convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        self.norm1 = RmsNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs, first)
        self.norm2 = RmsNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs, first)
        self.conv_shortcut = (
            nn.Identity() if inputs == outputs else Conv(inputs, outputs, (1, 1, 1))
        )

    def forward(self, x: Tensor, states: States) -> Tensor:
        y: Tensor = self.conv1.step(F.silu(self.norm1(x)), states)
        y = self.conv2.step(F.silu(self.norm2(y)), states)
        shortcut: Tensor = self.conv_shortcut(x)
        return shortcut + y


class Attention(nn.Module):
    """One head of attention among the positions of one latent frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.norm = RmsNorm(channels, dims=2)
        self.to_qkv = Conv(channels, 3 * channels, (1, 1))
        self.proj = Conv(channels, channels, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        _, channels, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 4, 1)
        query, key, value = qkv.reshape(1, 1, -1, 3 * channels).chunk(3, dim=-1)
        weights = torch.softmax((query * self.scale) @ key.transpose(-1, -2), dim=-1)
        mixed = (weights @ value).reshape(1, 1, height, width, channels)
        y: Tensor = self.proj(mixed.permute(0, 4, 1, 2, 3))
        return x + y


class RepeatPixels(Island):
    """Doubles height and width by repeating every pixel; the model does so in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; with `temporal` doubles the frame rate.

    The first frame stays one frame, and the convolution in time starts after it: to the next step
    it looks as if zeros had come before, not the first frame.
    """

    def __init__(self, channels: int, temporal: bool, first: bool) -> None:
        super().__init__()
        self.temporal = temporal
        if temporal and not first:
            self.time_conv = CausalConv(channels, 2 * channels, first, kernel=1)
        self.resample = nn.Sequential(
            RepeatPixels(), Conv(channels, channels // 2, (3, 3), padding=1)
        )

    def forward(self, x: Tensor, states: States) -> Tensor:
        if self.temporal and states.first:
            states.new.append(F.pad(x, (0, 0, 0, 0, 2, 0))[:, :, :2])
        elif self.temporal:
            x = self._interleave(self.time_conv.step(x, states))
        y: Tensor = self.resample(x)
        return y

    @staticmethod
    def _interleave(x: Tensor) -> Tensor:
        """Turn two frames' channels in one frame into two frames."""
        even, odd = (half.chunk(half.shape[2], dim=2) for half in x.chunk(2, dim=1))
        return torch.cat([frame for pair in zip(even, odd, strict=True) for frame in pair], dim=2)


class Downsample(nn.Module):
    """Halves height and width; with `temporal` halves the frame rate of all but the first frame."""

    def __init__(self, channels: int, temporal: bool, first: bool) -> None:
        super().__init__()
        self.temporal = temporal
        halve = Conv(channels, channels, (3, 3), stride=(1, 2))
        self.resample = nn.Sequential(nn.ZeroPad3d((0, 1, 0, 1, 0, 0)), halve)
        if temporal and not first:
            self.time_conv = CausalConv(channels, channels, first, kernel=1, stride=2)

    def forward(self, x: Tensor, states: States) -> Tensor:
        y: Tensor = self.resample(x)
        if self.temporal and states.first:
            states.new.append(y)
        elif self.temporal:
            y = self.time_conv.step(y, states)
        return y


class Middle(nn.Module):
    """Attention between two residual layers, at the latent's resolution."""

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(channels, channels, first) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x: Tensor, states: States) -> Tensor:
        x = self.resnets[0](x, states)
        x = self.attentions[0](x)
        y: Tensor = self.resnets[1](x, states)
        return y


class UpLayers(nn.Module):
    """The decoder at one resolution, and the way up to the next."""

    def __init__(
        self, inputs: int, outputs: int, layers: int, first: bool, up: Upsample | None
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList(Residual(a, b, first) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def forward(self, x: Tensor, states: States) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, states)
        return x


class Encoder(nn.Module):
    """Pictures to the parameters of their latents' distribution, from wide and flat to deep."""

    def __init__(self, config: WanVaeConfig, first: bool) -> None:
        super().__init__()
        self.conv_in = CausalConv(config.in_channels, config.base_dim, first)
        self.down_blocks = nn.ModuleList()
        width = config.base_dim
        for level, multiple in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(Residual(width, config.base_dim * multiple, first))
                width = config.base_dim * multiple
            if level < len(config.temperal_downsample):
                temporal = config.temperal_downsample[level]
                self.down_blocks.append(Downsample(width, temporal, first))
        self.mid_block = Middle(width, first)
        self.norm_out = RmsNorm(width)
        self.conv_out = CausalConv(width, 2 * config.z_dim, first)

    def forward(self, x: Tensor, states: States) -> Tensor:
        x = self.conv_in.step(x, states)
        for layer in (*self.down_blocks, self.mid_block):
            x = layer(x, states)
        y: Tensor = self.conv_out.step(F.silu(self.norm_out(x)), states)
        return y


class Decoder(nn.Module):
    """Latents to pictures, from deep to wide and flat."""

    def __init__(self, config: WanVaeConfig, first: bool) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        width = base * config.dim_mult[-1]
        self.conv_in = CausalConv(config.z_dim, width, first)
        self.mid_block = Middle(width, first)
        self.up_blocks = nn.ModuleList()
        ups = [*reversed(config.temperal_downsample), None]
        for multiple, temporal in zip(reversed(config.dim_mult), ups, strict=True):
            outputs = base * multiple
            up = None if temporal is None else Upsample(outputs, temporal, first)
            layers = config.num_res_blocks + 1
            self.up_blocks.append(UpLayers(width, outputs, layers, first, up))
            width = outputs // 2
        self.norm_out = RmsNorm(outputs)
        self.conv_out = CausalConv(outputs, config.out_channels, first)

    def forward(self, x: Tensor, states: States) -> Tensor:
        x = self.mid_block(self.conv_in.step(x, states), states)
        for layer in self.up_blocks:
            x = layer(x, states)
        y: Tensor = self.conv_out.step(F.silu(self.norm_out(x)), states)
        return y


class EncoderStep(nn.Module):
    """Encodes the first frame of a video, or the frames of one later step.

    Args:
        config: Sizes of the autoencoder.
        first: Which of the two.
    """

    def __init__(self, config: WanVaeConfig, first: bool) -> None:
        super().__init__()
        self.first = first
        self.encoder = Encoder(config, first)
        self.quant_conv = Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))

    def forward(self, frames: Tensor, **states: Tensor) -> tuple[Tensor, ...]:
        """Encode one step.

        Args:
            frames: Pixels in [-1, 1], shape (1, 3, 1, H, W), or as many frames as a later step has.
            states: The states that the step before gave, in order; none for the first step.

        Returns:
            The mean of the latent frame's distribution, which is also its mode, shape
            (1, z, 1, h, w), not normalised; then the states for the next step.
        """
        memory = States(None if self.first else iter(states.values()))
        moments: Tensor = self.quant_conv(self.encoder(frames, memory))
        return moments.chunk(2, dim=1)[0], *memory.new


class DecoderStep(nn.Module):
    """Decodes the first latent frame of a video, or a later one.

    Args:
        config: Sizes of the autoencoder.
        first: Which of the two.
    """

    def __init__(self, config: WanVaeConfig, first: bool) -> None:
        super().__init__()
        self.first = first
        self.post_quant_conv = Conv(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config, first)

    def forward(self, latents: Tensor, **states: Tensor) -> tuple[Tensor, ...]:
        """Decode one step.

        Args:
            latents: One latent frame, not normalised, shape (1, z, 1, h, w).
            states: The states that the step before gave, in order; none for the first step.

        Returns:
            Pixels in [-1, 1], shape (1, 3, 1, H, W), or as many frames as a later step has; then
            the states for the next step.
        """
        memory = States(None if self.first else iter(states.values()))
        frames: Tensor = self.decoder(self.post_quant_conv(latents), memory)
        return frames.clamp(-1.0, 1.0), *memory.new
