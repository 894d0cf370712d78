"""The linear codec the VAE starts from: no gradient, half a minute of least squares.

`init_linear` sets the kernels of the linear path level by level. `linear_only` runs that path
alone; `restore_nonlinear` puts residual branches, norms and activations back around it without
changing what it computes by much. `autoencoder.py` trains on from there.
"""

__all__ = ["init_linear", "linear_only", "restore_nonlinear"]

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock
from torch import Tensor, nn

_BLOCK = 12  # values of a 2 x 2 block of pixels
_OFFSET = 12.0  # constant before the last norms, in standard deviations of the signal
_GAIN = 0.5  # of the constant behind the norm; what it adds to both of a pair cancels
_LOGVAR = -7.0  # of the posterior to begin with; the latents have unit variance


class _Shortcut(nn.Module):
    """A residual block without its branch."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: Tensor, **cache: Any) -> Tensor:
        return self.shortcut(x)


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
        replace(half, "norm_out", nn.Identity())
        replace(half, "nonlinearity", nn.Identity())
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@torch.no_grad()
def init_linear(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Make the linear path a codec: principal components one way, least squares back.

    A signal enters the last convolution of either half twice, as itself and negated. What norm and
    activation add to both then cancels.

    The first frame, coded alone, passes no temporal convolution. Each level is laid out so that it
    is coded like a frame that stands still: what differs in time has channels of its own.

    Args:
        vae: Untrained.
        video: Clips to measure, shape (B, 3, T, h, w), from -1 to 1.
    """
    _clear(vae)
    _init_encoder(vae, video)
    _init_decoder(vae, video)


def _clear(vae: AutoencoderKLWan) -> None:
    """Set the linear path to zero, shortcuts and the convolutions of the latents to identity."""
    linear = [vae.quant_conv, vae.post_quant_conv]
    linear += [
        conv for half in (vae.encoder, vae.decoder) for conv in (half.conv_in, half.conv_out)
    ]
    for name, module in vae.named_modules():
        convolves = isinstance(module, nn.Conv2d | nn.Conv3d)
        if convolves and name.endswith(("conv_shortcut", "time_conv", "resample.1")):
            linear.append(module)
    for conv in linear:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        if conv.kernel_size == (1, 1, 1):
            nn.init.eye_(conv.weight[:, :, 0, 0, 0])


def _init_encoder(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Pixels less their mean, then two levels, then the negated half folded back."""
    encoder, z = vae.encoder, vae.config.z_dim
    colour = video.mean(dim=(0, 2, 3, 4))
    encoder.conv_in.weight[:3, :, -1, 1, 1] = torch.eye(3)
    encoder.conv_in.bias[:3] = -colour
    pixels = video[:, :, 1:] - colour.view(3, 1, 1, 1)
    first, second = encoder.down_blocks[1], encoder.down_blocks[3]
    _init_first_level(first, _cut_blocks(pixels, 2))
    with linear_only(vae):
        codes = torch.cat(_record(first, lambda: vae.encode(video))[1:], dim=2)
    _init_second_level(second, _cut_blocks(codes, 2), _cut_blocks(pixels, 4), z)
    half = torch.eye(z) / 2
    encoder.conv_out.weight[:z, : 2 * z, -1, 1, 1] = torch.cat([half, -half], dim=1)
    nn.init.constant_(encoder.conv_out.bias[z:], _LOGVAR)


def _init_first_level(level: nn.Module, pixels: Tensor) -> None:
    """Code two frames of 2 x 2 pixels by their mean and the main components of their change.

    Args:
        level: The encoder's first downsampling.
        pixels: Blocks, shape (N, 24).
    """
    corners = torch.eye(_BLOCK).view(_BLOCK, 3, 2, 2)
    level.resample[1].weight[:_BLOCK, :3, :2, :2] = corners
    before, after = pixels.unflatten(1, (2, _BLOCK)).unbind(1)
    change = _find_components(before - after, level.dim - _BLOCK).T / 2
    mean = torch.eye(_BLOCK) / 2
    level.time_conv.weight[:, :_BLOCK, 1, 0, 0] = torch.cat([mean, change])
    level.time_conv.weight[:, :_BLOCK, 2, 0, 0] = torch.cat([mean, -change])


def _init_second_level(level: nn.Module, codes: Tensor, pixels: Tensor, z: int) -> None:
    """Reduce codes of the first level to the `z` numbers that predict the pixels best.

    The spatial convolution makes the share of the earlier and, negated, of the later codes; the
    temporal one takes each from its half. Where it does not run, at the first frame, the folding
    behind it adds the two.

    Args:
        level: The encoder's second downsampling.
        codes: Blocks of the first level, shape (N, 8 * width).
        pixels: Blocks of the same places, shape (N, 192).
        z: Channels of the latents.
    """
    predict = torch.linalg.solve(codes.T @ codes, codes.T @ pixels)
    latents = predict @ _find_components(codes @ predict, z)
    latents /= (codes @ latents).std()
    early, late = latents.T.reshape(z, 2, -1, 2, 2).unbind(1)
    width = early.shape[1]
    level.resample[1].weight[: 2 * z, :width, :2, :2] = 2 * torch.cat([early, -late])
    half = torch.eye(z) / 2
    level.time_conv.weight[: 2 * z, :z, 1, 0, 0] = torch.cat([half, -half])
    level.time_conv.weight[: 2 * z, z : 2 * z, 2, 0, 0] = torch.cat([-half, half])


def _init_decoder(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Undo the encoder level by level; what changes in time enters once plus, once minus."""
    decoder, z = vae.decoder, vae.config.z_dim
    colour = video.mean(dim=(0, 2, 3, 4))
    decoder.conv_in.weight[:z, :, -1, 1, 1] = torch.eye(z)
    decoder.conv_out.weight[:, :6, -1, 1, 1] = torch.cat([torch.eye(3), -torch.eye(3)], dim=1) / 2
    decoder.conv_out.bias.copy_(colour)
    first, last = (block.upsamplers[0] for block in decoder.up_blocks[:-1])
    for level, width in ((first, z), (last, vae.config.base_dim)):
        eye = torch.eye(width)
        for frame, sign in zip(level.time_conv.weight.chunk(2), (1, -1), strict=True):
            frame[: 2 * width, :width, -1, 0, 0] = torch.cat([eye, sign * eye])
    with linear_only(vae):
        codes = _record(vae.encoder.down_blocks[1], lambda: vae.encode(video))
        latents = vae.encode(video).latent_dist.mode()
        _fit(first, lambda: vae.decode(latents), codes)
        pixels = (video - colour.view(3, 1, 1, 1)).split([1] + [4] * (len(codes) - 1), dim=2)
        _fit(last, lambda: vae.decode(latents), pixels)
    conv = last.resample[1]
    conv.weight[3:6], conv.bias[3:6] = -conv.weight[:3], -conv.bias[:3]


def _fit(level: nn.Module, run: Callable[[], object], targets: Sequence[Tensor]) -> None:
    """Set the convolution behind the upsampling to the least squares solution.

    Args:
        level: An upsampling of the decoder.
        run: Runs the decoder.
        targets: What the first channels should be in each of its calls, (B, C, T, h, w).
    """
    conv, square, product = level.resample[1], torch.zeros(()), torch.zeros(())
    for x, y in zip(_record(level.resample[0], run), targets, strict=True):
        patches = nn.functional.unfold(x, 3, padding=1)
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
        patches = patches.transpose(0, 1).flatten(1)
        square = square + patches @ patches.T
        product = product + patches @ y.movedim(1, -1).flatten(0, -2)
    square += 1e-5 * square.diag().mean() * torch.eye(len(square))  # some channels are zero
    solution = torch.linalg.solve(square, product).T
    conv.weight[: len(solution)] = solution[:, :-1].unflatten(1, conv.weight.shape[1:])
    conv.bias[: len(solution)] = solution[:, -1]


def _record(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """Return the outputs of a module in each of its calls during `run`."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    run()
    handle.remove()
    return outputs


def _cut_blocks(video: Tensor, size: int) -> Tensor:
    """Cut (B, C, T, h, w) into cubes, shape (N, size * C * size * size)."""
    for axis in (2, 4, 6):
        video = video.unflatten(axis, (-1, size))
    return video.permute(0, 2, 4, 6, 3, 1, 5, 7).flatten(4).flatten(0, 3)


def _find_components(values: Tensor, count: int) -> Tensor:
    """Return the strongest principal directions of (N, n) values, shape (n, count)."""
    return torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)[:, :count]


@torch.no_grad()
def restore_nonlinear(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Let the whole VAE compute nearly what `linear_only` made it compute.

    Residual branches start at zero. A large constant joins the signal before the last norm of each
    half; the norm then divides by the constant. What is left of the activation's curve cancels in
    the difference of a pair.

    Args:
        vae: Initialised by `init_linear`.
        video: A sample to measure the signals with, shape (B, 3, T, h, w).
    """
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    gain = torch.tensor(_GAIN, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(nn.functional.silu(gain), gain)
    lasts = vae.encoder.mid_block.resnets[-1], vae.decoder.up_blocks[-1].resnets[-1]
    for half, last in zip((vae.encoder, vae.decoder), lasts, strict=True):
        with linear_only(vae):
            signal = _record(half.norm_out, lambda: vae(video))
        constant = _OFFSET * torch.cat(signal, dim=2).std()
        nn.init.constant_(last.conv2.bias, constant)
        nn.init.constant_(half.norm_out.gamma, _GAIN)
        half.conv_out.weight *= constant / (_GAIN * slope)
