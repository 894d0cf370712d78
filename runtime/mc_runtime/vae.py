"""Between pixels and latents, one causal step at a time, with the state in the caller's hands.

The first step is one pixel frame for one latent frame; every later step is `temporal_factor` pixel
frames for one latent frame. What is kept between two steps does not grow with the video.
`mc_export.wan_vae` says what the graphs compute. Neighbours: the pipeline decodes each chunk when
it is clean; `to_uint8` makes what a video file takes; `mc_runtime.tiled_vae` is the other kind.

Source: the autoencoder's use in diffusers 0.42.1's SkyReels-V2 pipelines and VideoProcessor, from
which the normalisation and the rounding are taken.
"""

__all__ = [
    "DECODED",
    "ENCODED",
    "Coding",
    "Decoder",
    "Encoder",
    "VaeConfig",
    "VaeDecoder",
    "VaeEncoder",
    "VaeParts",
    "VaeState",
    "check_latents",
    "open_decoder",
    "open_encoder",
    "to_pixels",
    "to_uint8",
]

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mc_engines.runner import Array, Arrays, Runner


@dataclass(frozen=True)
class VaeConfig:
    """What driving an autoencoder takes; the fields are those of the bundle's `config.vae`.

    Attributes:
        z_dim: Channels of a latent frame.
        spatial_factor: Pixels per position of a latent frame, along each side.
        temporal_factor: Pixel frames per latent frame, of every step but the first.
        latents_mean: Mean of each latent channel.
        latents_std: Standard deviation of each latent channel.
    """

    z_dim: int
    spatial_factor: int
    temporal_factor: int
    latents_mean: Sequence[float]
    latents_std: Sequence[float]

    def normalise(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale an encoder's latents, shape (z, F, h, w), to those the transformer knows."""
        mean, inverse_std = self._statistics()
        return (latents - mean) * inverse_std

    def denormalise(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale the transformer's latents, shape (z, F, h, w), to those a decoder takes."""
        mean, inverse_std = self._statistics()
        return latents / inverse_std + mean

    def _statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        # The reciprocal comes first, and is divided by, because diffusers does so: same rounding.
        shape = (self.z_dim, 1, 1, 1)
        mean = np.asarray(self.latents_mean, np.float32).reshape(shape)
        return mean, np.float32(1) / np.asarray(self.latents_std, np.float32).reshape(shape)


@dataclass(frozen=True)
class VaeState:
    """What an autoencoder's convolutions remember of the steps so far.

    Attributes:
        tensors: By name of the later step's inputs.
    """

    tensors: Mapping[str, Array]


class Decoder(Protocol):
    """What turns the latents of a chunk into frames."""

    def decode(
        self, latents: NDArray[np.float32], state: VaeState | None = None
    ) -> tuple[NDArray[np.float32], VaeState]:
        """Give frames in [-1, 1], shape (frames, H, W, 3), and the state for what follows."""
        ...


class Encoder(Protocol):
    """What turns frames into latents."""

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Give the latents of a video, shape (z, F, h, w), as the transformer knows them."""
        ...


@dataclass(frozen=True)
class Coding:
    """What an autoencoder codes at a time, for those who time it.

    Attributes:
        component: The engine that takes most of it.
        name: Of what is coded.
        prepare: From a decoder or an encoder, and height and width of a latent frame, to how many
            latents are coded and the call that does it.
    """

    component: str
    name: str
    prepare: Callable[[Any, tuple[int, int]], tuple[int, Callable[[], Any]]]


@dataclass(frozen=True)
class VaeParts:
    """Where an autoencoder is opened from.

    Attributes:
        config: `config.vae` of the manifest.
        open: From a component and a form of it to what runs it.
        layer_weights: From a component and a layer to its weights.
        tensors: From a file of weights to its tensors.
    """

    config: Mapping[str, Any]
    open: Callable[[str, str], Runner]
    layer_weights: Callable[[str, int], Arrays]
    tensors: Callable[[str], Mapping[str, Array]]


@dataclass(frozen=True)
class VaeDecoder:
    """Turns latents into frames.

    Attributes:
        first: Runs `vae_decoder_first`.
        later: Runs `vae_decoder_next`.
        config: The autoencoder's constants.
    """

    first: Runner
    later: Runner
    config: VaeConfig

    def decode(
        self, latents: NDArray[np.float32], state: VaeState | None = None
    ) -> tuple[NDArray[np.float32], VaeState]:
        """Decode the latent frames of a chunk, or of a whole video.

        Args:
            latents: Normalised, shape (z, F, h, w), at least one latent frame.
            state: As returned for the latent frames before these; None at the start of a video.

        Returns:
            Frames in [-1, 1], shape (frames, H, W, 3), and the state for what follows.

        Raises:
            ValueError: The latents have another shape or dtype, or do not fit the state.
            EngineError: A graph failed.
        """
        frames = []
        for pixels, after in self.decode_steps(latents, state):
            frames.append(pixels)
            state = after  # alone: those between would take as much again for every latent frame
        assert state is not None
        return np.concatenate(frames), state

    def decode_steps(
        self, latents: NDArray[np.float32], state: VaeState | None = None
    ) -> Iterator[tuple[NDArray[np.float32], VaeState]]:
        """Decode one latent frame after the other; for latents whose frames would fill the memory.

        Args:
            latents: Normalised, shape (z, F, h, w), at least one latent frame.
            state: As returned for the latent frames before these; None at the start of a video.

        Yields:
            For each latent frame its frames in [-1, 1], shape (frames, H, W, 3), and the state.

        Raises:
            ValueError: The latents have another shape or dtype, or do not fit the state.
            EngineError: A graph failed.
        """
        check_latents(latents, self.config.z_dim)
        latents = self.config.denormalise(latents)
        for index in range(latents.shape[1]):
            runner = self.later if state else self.first
            frames, state = _run_step(runner, latents[:, index : index + 1], state)
            yield np.ascontiguousarray(frames.transpose(1, 2, 3, 0)), state


@dataclass(frozen=True)
class VaeEncoder:
    """Turns frames into latents: the mode of the posterior, so nothing is drawn.

    Attributes:
        first: Runs `vae_encoder_first`.
        later: Runs `vae_encoder_next`.
        config: The autoencoder's constants.
    """

    first: Runner
    later: Runner
    config: VaeConfig

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a video.

        Args:
            frames: Shape (1 + k * temporal_factor, H, W, 3), uint8; H and W multiples of the
                spatial factor.

        Returns:
            Normalised latents, shape (z, 1 + k, h, w).

        Raises:
            ValueError: The frames have another count, size, shape or dtype.
            EngineError: A graph failed.
        """
        self._check_count(len(frames))
        return np.concatenate(list(self.encode_steps(frames)), axis=1)

    def encode_steps(self, frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Encode frames as they come; for a video that would fill the memory.

        Args:
            frames: 1 + k * temporal_factor frames, each of shape (H, W, 3), uint8; H and W
                multiples of the spatial factor.

        Yields:
            1 + k normalised latent frames, each of shape (z, 1, h, w).

        Raises:
            ValueError: The frames have another count, size, shape or dtype.
            EngineError: A graph failed.
        """
        coming = iter(frames)
        state, count, size = None, 0, 1
        while step := list(islice(coming, size)):
            count += len(step)
            if len(step) < size:
                break
            for frame in step:
                self._check_frame(frame)
            pixels = to_pixels(np.stack(step).transpose(3, 0, 1, 2))
            latents, state = _run_step(self.later if state else self.first, pixels, state)
            yield self.config.normalise(latents)
            size = self.config.temporal_factor
        self._check_count(count)

    def _check_count(self, count: int) -> None:
        factor = self.config.temporal_factor
        below = max(count - 1, 0) // factor * factor + 1
        if count != below:
            raise ValueError(
                f"video: expected 1 + a multiple of {factor} frames, got {count}. "
                f"Use {below} or {below + factor} frames."
            )

    def _check_frame(self, frame: NDArray[np.uint8]) -> None:
        factor = self.config.spatial_factor
        shaped = frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8
        if not shaped or frame.shape[0] % factor or frame.shape[1] % factor:
            raise ValueError(
                f"video: expected frames of uint8 (H, W, 3) with H and W multiples of {factor}, "
                f"got {frame.dtype} {frame.shape}. Crop or resize the video."
            )


def open_decoder(parts: VaeParts) -> VaeDecoder:
    """Open the decoder of a bundle; see `Family.open_decoder`."""
    return VaeDecoder(*_open("decoder", parts))


def open_encoder(parts: VaeParts) -> VaeEncoder:
    """Open the encoder of a bundle; see `Family.open_encoder`."""
    return VaeEncoder(*_open("encoder", parts))


def _open(half: str, parts: VaeParts) -> tuple[Runner, Runner, VaeConfig]:
    first, later = (parts.open(f"vae_{half}_{step}", "fp32") for step in ("first", "next"))
    return first, later, VaeConfig(**parts.config)


def _prepare_decoder(decoder: VaeDecoder, size: tuple[int, int]) -> tuple[int, Callable[[], Any]]:
    """A later step, with the state of the one before."""
    shape = decoder.config.z_dim, 1, *size
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    _, state = decoder.decode(latents)
    return math.prod(size), partial(decoder.decode, latents, state)


def _prepare_encoder(encoder: VaeEncoder, size: tuple[int, int]) -> tuple[int, Callable[[], Any]]:
    """The first and a later step, of which only both together can be called."""
    config = encoder.config
    height, width = (config.spatial_factor * side for side in size)
    shape = 1 + config.temporal_factor, height, width, 3
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return 2 * math.prod(size), partial(encoder.encode, frames)


DECODED = Coding("vae_decoder_next", "a latent frame", _prepare_decoder)
ENCODED = Coding("vae_encoder_next", "a video of two latent frames", _prepare_encoder)


def check_latents(latents: NDArray[np.float32], z_dim: int) -> None:
    """Refuse what a decoder does not take.

    Args:
        latents: To decode.
        z_dim: Channels of its latents.

    Raises:
        ValueError: They have another shape or dtype.
    """
    shaped = latents.ndim == 4 and len(latents) == z_dim and latents.size > 0
    if not shaped or latents.dtype != np.float32:
        raise ValueError(
            f"latents: expected float32 ({z_dim}, F, h, w), got {latents.dtype} "
            f"{latents.shape}. Give latents as the transformer knows them."
        )


def to_pixels(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale bytes to [-1, 1], which an encoder takes.

    Args:
        frames: Of any shape.

    Returns:
        The same shape, laid out in order.
    """
    pixels: NDArray[Any] = frames.astype(np.float32, order="C") / 255 * 2 - 1
    return pixels


def to_uint8(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round frames in [-1, 1] to bytes; what lies outside is clipped.

    Args:
        frames: Pixels of any shape.

    Returns:
        Pixels of the same shape.

    Example:
        >>> to_uint8(np.float32([-1.5, -1, 0.5, 1]))
        array([  0,   0, 191, 255], dtype=uint8)
    """
    rounded: NDArray[np.float32] = np.rint(np.clip(frames * 0.5 + 0.5, 0, 1) * 255)
    return rounded.astype(np.uint8)


def _run_step(runner: Runner, data: Array, state: VaeState | None) -> tuple[Array, VaeState]:
    """Run one step on `data`, shape (C, F, height, width), in the dtype that the graph takes."""
    taken, given = runner.graph.inputs[0], runner.graph.outputs[0]
    inputs = {taken.name: data[None].astype(taken.numpy_dtype, copy=False)}
    outputs = runner.run({**inputs, **(state.tensors if state else {})})
    result: NDArray[Any] = outputs.pop(given.name)[0].astype(np.float32, copy=False)
    return result, VaeState({name.removeprefix("next_"): x for name, x in outputs.items()})
