"""What the large graphs take and give back in a run in ONNX Runtime, in the order of their nodes.

Written down from the graphs as ONNX Runtime optimises them, in float32; what is smaller than a row
of channels per token is left out. A node that can compute in place does, so that it takes nothing.

Neighbours: `arena` replays a tape, `host_sizes` adds up; `mc_export.skyreels.Block` and
`mc_export.wan_vae.DecoderStep` are the graphs.

Symbols: K recomputed tokens, L tokens of a chunk, M visible keys, S cache slots, C channels.
"""

__all__ = ["DecoderShape", "Level", "record_block", "record_decoder"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mc_engines.arena import Kind, Tape
from mc_engines.run_sizes import WindowShape

_BYTES = 4  # of a float32
_COLOURS = 3


def record_block(shape: WindowShape, keys: int, fused: bool) -> Tape:
    """Record a full pass of one block.

    Args:
        shape: Of the model and the window; K is a whole chunk.
        keys: M.
        fused: The form with fused attention, or that which writes its scores.

    Returns:
        The tape; inputs and weights are the caller's and not on it.
    """
    tape, row = Tape(), shape.dim * _BYTES
    k, ffn = shape.chunk_tokens * row, shape.chunk_tokens * shape.ffn_dim * _BYTES
    joined, text = (shape.window_tokens + shape.chunk_tokens) * row, shape.text_tokens * row
    for name in ("ffn gate", "ffn shift", "ffn scale", "gate"):  # a row for every token
        tape.take(name, k)
    if fused:
        tape.take("text keys", text)
        tape.take("text values", text)
    for name in ("shift", "scale", "normal"):
        tape.take(name, k)
    tape.give("shift", "scale")
    _replace(tape, "normal", "qkv", 3 * k)
    for name in ("q", "k", "v"):
        tape.take(name, k)
    tape.give("qkv")
    attend = _attend_fused if fused else _attend_plainly
    attend(tape, shape, k, joined, keys)
    tape.take("sum", k)
    tape.give("attended", "gate")
    tape.take("normal", k)
    _replace(tape, "normal", "q", k)
    tape.take("square", k)
    tape.give("square")
    _attend_text(tape, shape, k, text, fused)
    tape.take("update", k)
    tape.give("attended", "update")
    tape.take("normal", k)
    tape.give("ffn shift", "ffn scale")
    _replace(tape, "normal", "up", ffn)
    tape.take("gelu", ffn)
    tape.take("gelu's own", ffn, Kind.SCRATCH)
    tape.give("gelu's own", "up")
    _replace(tape, "gelu", "down", k)
    tape.take("y", k, Kind.OUTPUT)
    tape.give("ffn gate", "sum", "down")
    return tape


def _replace(tape: Tape, old: str, new: str, size: int) -> None:
    """Compute a tensor from another, which is not needed after."""
    tape.take(new, size)
    tape.give(old)


def _rotate(tape: Tape, name: str, rotated: str, k: int, kind: Kind) -> None:
    """Normalise queries or keys, and turn them by their angles, half by half."""
    tape.take("square", k)
    tape.give("square")
    _replace(tape, name, "heads", k)
    for half in ("first", "second", "turned", "other"):
        tape.take(half, k // 2)
        if half == "second":
            tape.give("heads")
    tape.give("second", "other")
    tape.take(rotated, k, kind)
    tape.give("first", "turned")


def _look_up(tape: Tape, name: str, joined: int, keys: int) -> None:
    """Join the cache with the new rows, and gather what is visible."""
    tape.take("joined", joined)
    _replace(tape, "joined", name, keys)


def _attend_plainly(tape: Tape, shape: WindowShape, k: int, joined: int, keys: int) -> None:
    visible = keys * shape.dim * _BYTES
    scores = shape.heads * shape.chunk_tokens * keys * _BYTES
    _rotate(tape, "k", "k_new", k, Kind.OUTPUT)
    _look_up(tape, "keys", joined, visible)
    _rotate(tape, "q", "turned q", k, Kind.PLANNED)
    tape.take("scores", scores)
    tape.give("turned q", "keys")  # the softmax is computed in place
    tape.take("v_new", k, Kind.OUTPUT)
    tape.give("v")
    _look_up(tape, "values", joined, visible)
    tape.take("mixed", k)
    tape.give("scores", "values")
    _replace(tape, "mixed", "attended", k)


def _attend_fused(tape: Tape, shape: WindowShape, k: int, joined: int, keys: int) -> None:
    visible = keys * shape.dim * _BYTES
    tape.take("v_new", k, Kind.OUTPUT)
    tape.give("v")
    _look_up(tape, "gathered", joined, visible)
    _replace(tape, "gathered", "values", visible)  # positions before heads, as the kernel has them
    _rotate(tape, "k", "k_new", k, Kind.OUTPUT)
    _look_up(tape, "gathered", joined, visible)
    _replace(tape, "gathered", "keys", visible)
    _rotate(tape, "q", "turned q", k, Kind.PLANNED)
    _run_kernel(tape, "turned q", k, visible)
    tape.give("turned q", "keys", "values")


def _run_kernel(tape: Tape, queries: str, k: int, visible: int) -> None:
    """Fused attention: the kernel lays out queries, keys and values for itself once more."""
    tape.take("attended", k)
    own = {"own q": k, "own keys": visible, "own values": visible}
    for name, size in own.items():
        tape.take(name, size, Kind.SCRATCH)
    tape.give(*own)


def _attend_text(tape: Tape, shape: WindowShape, k: int, text: int, fused: bool) -> None:
    if fused:
        _run_kernel(tape, "q", k, text)
        tape.give("text keys", "text values", "q")
        return
    scores = shape.heads * shape.chunk_tokens * shape.text_tokens * _BYTES
    _replace(tape, "q", "turned q", k)
    _replace(tape, "turned q", "scores", scores)
    _replace(tape, "scores", "mixed", k)
    _replace(tape, "mixed", "attended", k)


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
