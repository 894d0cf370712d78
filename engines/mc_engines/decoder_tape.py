"""What a step of the VAE's decoder takes and gives back in ONNX Runtime, node by node.

Written down from the graph as ONNX Runtime optimises it, in float32. A node that can compute in
place does, so that it takes nothing; buffers are not shared beyond that (see `buffer_plan`).

Neighbours: `arena` replays a tape, `host_sizes` adds up; `mc_export.wan_vae.DecoderStep` is the
graph.
"""

__all__ = ["DecoderShape", "Level", "record_decoder"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mc_engines.arena import Kind, Tape

_BYTES = 4  # of a float32
_COLOURS = 3


@dataclass(frozen=True)
class Level:
    """The decoder of a VAE at one resolution.

    Attributes:
        inputs: Channels that come in.
        outputs: Channels of its residual layers.
        residuals: How many there are.
        doubles_rate: Whether frames are doubled on the way to the next level.
    """

    inputs: int
    outputs: int
    residuals: int
    doubles_rate: bool


@dataclass(frozen=True)
class DecoderShape:
    """The decoder of a VAE.

    Attributes:
        latent: Channels of a latent frame.
        levels: From the latents' resolution to the pixels'; each doubles both sides of the last.
    """

    latent: int
    levels: tuple[Level, ...]

    @classmethod
    def from_config(cls, config: Any) -> "DecoderShape":
        """Read diffusers' configuration of an autoencoder, such as `WAN21_VAE`."""
        base = config.get("decoder_base_dim") or config["base_dim"]
        multiples = list(reversed(config["dim_mult"]))
        rates = [*reversed(config["temperal_downsample"]), False]
        levels, width = [], base * multiples[0]
        for multiple, rate in zip(multiples, rates, strict=True):
            outputs = base * multiple
            levels.append(Level(width, outputs, config["num_res_blocks"] + 1, rate))
            width = outputs // 2
        return cls(config["z_dim"], tuple(levels))

    @classmethod
    def from_states(cls, states: Sequence[tuple[int, int]]) -> "DecoderShape":
        """Read what the convolutions remember: channels, and pixels per latent along a side.

        They come in the order of use: of the first convolution, of two residual layers in the
        middle, of each level's, each with two, and of what doubles its rate; of the last.

        Returns:
            The shape.
        """
        levels = []
        for side in sorted({side for _, side in states}):
            channels = [count for count, own in states if own == side]
            if side == 1:
                channels = channels[5:]
            if side == states[-1][1]:
                channels = channels[:-1]
            residuals, rate = divmod(len(channels), 2)
            levels.append(Level(channels[0], channels[2 * residuals - 1], residuals, bool(rate)))
        return cls(states[0][0], tuple(levels))

    @property
    def states(self) -> list[tuple[int, int, int]]:
        """Channels of every state, pixels per latent along a side, and frames of its level."""
        first = self.levels[0].inputs
        found = [(self.latent, 1, 1), *[(first, 1, 1)] * 4]
        frames = 1
        for depth, level in enumerate(self.levels):
            side = 2**depth
            widths = [level.inputs, *[level.outputs] * (2 * level.residuals - 1)]
            widths += [level.outputs] if level.doubles_rate else []
            found += [(width, side, frames) for width in widths]
            frames *= 1 + level.doubles_rate
        return [*found, (self.levels[-1].outputs, side, frames)]

    def state_values(self) -> int:
        """Count what is kept from step to step, in values per position of a latent frame."""
        return sum(2 * channels * side**2 for channels, side, _ in self.states)


def record_decoder(shape: DecoderShape, positions: int, first: bool) -> Tape:
    """Record a step of the decoder.

    Args:
        shape: Of the decoder.
        positions: Of a latent frame.
        first: The first step of a video, which is one frame, or a later one.

    Returns:
        The tape; the states that come in are the caller's and not on it.
    """
    return _Decoding(shape, positions, first).record()


class _Decoding:
    """Writes the tape of a step; what a convolution will remember is cut out at the very end."""

    def __init__(self, shape: DecoderShape, positions: int, first: bool) -> None:
        self.tape, self.shape, self.first, self.positions = Tape(), shape, first, positions
        self.pixels, self.frames = positions, 1
        self.kept: list[str] = []  # inputs of the convolutions along time
        self.taken = 0

    def record(self) -> Tape:
        levels = self.shape.levels
        width = levels[0].inputs
        x = self._convolve(self._take(self.shape.latent), self.shape.latent, width)
        x = self._residual(x, width, width)
        self._attend(width)
        x = self._residual(x, width, width)
        for depth, level in enumerate(levels):
            for index in range(level.residuals):
                x = self._residual(x, level.outputs if index else level.inputs, level.outputs)
            if depth + 1 < len(levels):
                x = self._upsample(x, level)
        last = levels[-1].outputs
        self._convolve(self._activate(x, last), last, _COLOURS, Kind.OUTPUT)
        for name, (channels, side, _) in reversed(
            list(zip(self.kept, self.shape.states, strict=True))
        ):
            state = 2 * channels * side**2 * self.positions * _BYTES
            self.tape.take(f"next {name}", state, Kind.OUTPUT)
            self.tape.give(name)
        return self.tape

    def _take(self, channels: int, frames: int | None = None, kind: Kind = Kind.PLANNED) -> str:
        self.taken += 1
        count = self.frames if frames is None else frames
        self.tape.take(f"{self.taken}", channels * count * self.pixels * _BYTES, kind)
        return f"{self.taken}"

    def _convolve(self, name: str, inputs: int, outputs: int, kind: Kind = Kind.PLANNED) -> str:
        """Convolve along time what nothing else needs: with what was remembered before it."""
        joined = name
        if not self.first:
            joined = self._take(inputs, self.frames + 2)
            self.tape.give(name)
        self.kept.append(joined)
        return self._take(outputs, kind=kind)

    def _activate(self, x: str, channels: int, keep: bool = False) -> str:
        """Normalise, in place if x is not kept, and apply the nonlinearity."""
        norm = self._take(1)
        divided = self._take(channels) if keep else x
        self.tape.give(norm)
        result = self._take(channels)
        self.tape.give(divided)
        return result

    def _residual(self, x: str, inputs: int, outputs: int) -> str:
        same = inputs == outputs
        shortcut = x if same else self._take(outputs)
        y = self._convolve(self._activate(x, inputs, keep=same), inputs, outputs)
        y = self._convolve(self._activate(y, outputs), outputs, outputs)
        self.tape.give(y)
        return shortcut

    def _attend(self, channels: int) -> None:
        """One head among the positions of a latent frame, added to x in place."""
        score = self.positions**2 * _BYTES
        normal, qkv = self._take(channels), self._take(3 * channels)
        self.tape.give(normal)
        turned = self._take(3 * channels)
        self.tape.give(qkv)
        q, k, v = (self._take(channels) for _ in range(3))
        self.tape.give(turned)
        self.tape.take("scores", score)
        self.tape.give(q, k)
        mixed = self._take(channels)
        self.tape.give("scores", v)
        laid, projected = self._take(channels), self._take(channels)
        self.tape.give(mixed, laid, projected)

    def _upsample(self, x: str, level: Level) -> str:
        """Double the rate where that is due, then both sides, and halve the channels."""
        if level.doubles_rate and self.first:
            self.kept.append(x)
        elif level.doubles_rate:
            x = self._interleave(self._convolve(x, level.outputs, 2 * level.outputs), level.outputs)
        self.pixels *= 4
        wide = self._take(level.outputs)
        if not (level.doubles_rate and self.first):
            self.tape.give(x)
        narrow = self._take(level.outputs // 2)
        self.tape.give(wide)
        return narrow

    def _interleave(self, x: str, channels: int) -> str:
        """Turn channels into frames: halves, their frames one by one, and all of them in turn."""
        halves = [self._take(channels) for _ in range(2)]
        self.tape.give(x)
        singles = [self._take(channels, 1) for _ in range(2 * self.frames)]
        self.tape.give(*halves)
        self.frames *= 2
        joined = self._take(channels)
        self.tape.give(*singles)
        return joined
