"""The transformer's engines with their weights bound: what one pass over a chunk computes.

Neighbours: `open_transformer` takes the graphs and weights from a bundle; `denoise` decides which
chunk, step and tokens; `KeyCache` holds what earlier passes left behind.

Axes: L tokens of a chunk, K recomputed tokens, S cache slots, C channels, H heads, D head size.
"""

__all__ = [
    "Conditions",
    "KeyCache",
    "Transformer",
    "TransformerConfig",
    "encode_timesteps",
    "map_visible",
    "open_transformer",
    "pad_rows",
    "round_up_to_bucket",
]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.bundle import Bundle
from mc_engines.onnxruntime_providers import Provider
from mc_engines.onnxruntime_runner import (
    FUSED_ATTENTION_BYTES,
    HELD_WEIGHTS_BYTES,
    open_runner,
)
from mc_engines.runner import Array, Arrays, Runner
from mc_engines.timed_runner import Clock, TimedRunner
from mc_runtime.rope import Rope, Tables, read_rope

FPS_WITH_ID_0 = 16  # every other frame rate has id 1 (SkyReels-V2, diffusion_forcing_pipeline.py)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; docs/bundle.md describes each field.

    Attributes:
        layers: Blocks.
        dim: Channels C.
        heads: Attention heads.
        key_heads: Heads H of keys and values, each shared by as many attention heads.
        head_dim: D.
        text_dim: Channels of the text embedding.
        in_channels: Channels of the latents.
        out_channels: Channels of the velocity.
        patch_size: Latents per token along time, height and width.
        fps_embedding: Whether the model is told the frame rate.
        rope: How it is told positions.
        token_buckets: Shares of a chunk's tokens that engines are built for, ascending.
    """

    layers: int
    dim: int
    heads: int
    key_heads: int
    head_dim: int
    text_dim: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]
    fps_embedding: bool
    rope: Rope
    token_buckets: tuple[float, ...]

    @classmethod
    def from_manifest(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read the manifest's `config.transformer`; fields that a run does not need are ignored."""
        usual = {"key_heads": config["heads"], "fps_embedding": False, "rope": read_rope(config)}
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        tuples = {name: tuple(config[name]) for name in ("patch_size", "token_buckets")}
        return cls(**(usual | known | tuples))


@dataclass(frozen=True)
class Conditions:
    """What the model is told of each timestep of a run; one row per timestep.

    Attributes:
        modulation: Of the blocks, shape (n, 6, C).
        head_modulation: Of the head, shape (n, C); (n, 0) where it is not told.
    """

    modulation: NDArray[np.float32]
    head_modulation: NDArray[np.float32]


class KeyCache:
    """Keys and values of one branch in one window, written in place.

    Args:
        config: Of the transformer.
        slots: Tokens S of the whole window.

    Attributes:
        slots: S.
        keys: Per layer, rotated, shape (1, H, S, D).
        values: Per layer, shape (1, H, S, D).
    """

    def __init__(self, config: TransformerConfig, slots: int) -> None:
        shape = (1, config.key_heads, slots, config.head_dim)
        self.slots = slots
        self.keys = [np.zeros(shape, np.float32) for _ in range(config.layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(config.layers)]

    def write(self, layer: int, slots: Array | slice, keys: Array, values: Array) -> None:
        """Put new rows (1, H, K, D) of a layer into their slots."""
        self.keys[layer][:, :, slots] = keys
        self.values[layer][:, :, slots] = values


@dataclass(frozen=True)
class Transformer:
    """Engines and weights; shared by every generation, and never changed by one.

    Attributes:
        config: Sizes.
        runners: By component: text_projection, context, timestep, embed, block, head, motion.
        fused_block: The block with fused attention, for passes with very many scores.
        block_weights: Gives the weights of one layer of `block`.
        context_weights: Gives those of `context`.
        buckets: Shares of a chunk's tokens that a partial pass is padded up to; empty where the
            engine takes any number, as ONNX Runtime does.
    """

    config: TransformerConfig
    runners: Mapping[str, Runner]
    fused_block: Runner
    block_weights: Callable[[int], Arrays]
    context_weights: Callable[[int], Arrays]
    buckets: tuple[float, ...] = ()

    def timed(self, clock: Clock) -> "Transformer":
        """Return the same engines, whose time is added to a clock."""
        return replace(
            self,
            runners={name: TimedRunner(runner, clock) for name, runner in self.runners.items()},
            fused_block=TimedRunner(self.fused_block, clock),
        )

    def bucket(self, recomputed: int, tokens: int) -> int:
        """Return how many tokens go through the blocks; see `round_up_to_bucket`."""
        return round_up_to_bucket(self.buckets, recomputed, tokens)

    def encode_context(self, embedding: NDArray[np.float32]) -> list[dict[str, Array]]:
        """Compute the keys and values of a prompt, once per prompt.

        Args:
            embedding: Of the text encoder, shape (1, T, text_dim).

        Returns:
            Per layer, `cross_k` and `cross_v`, each (1, H, T, D).
        """
        text = self.runners["text_projection"].run({"embedding": embedding})
        context = self.runners["context"]
        layers = range(self.config.layers)
        return [context.run(text, self.context_weights(layer)) for layer in layers]

    def encode_timesteps(self, timesteps: NDArray[np.int64], fps: int) -> Conditions:
        """Compute the modulation of every timestep, once per run; see `encode_timesteps`."""
        return encode_timesteps(self.runners["timestep"], self.config, timesteps, fps)

    def embed(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed a chunk's patches (1, L, c*ph*pw) as tokens (1, L, C)."""
        return self.runners["embed"].run({"patches": patches})["x"]

    def recompute(
        self,
        x: NDArray[np.float32],
        rows: NDArray[np.intp],
        modulation: NDArray[np.float32],
        angles: Tables,
        context: Sequence[Arrays],
        cache: KeyCache,
        first: int,
        visible: NDArray[np.intp] | None = None,
    ) -> NDArray[np.float32]:
        """Run all blocks for some tokens of a chunk and put their keys into the cache.

        A pass that is padded up to a bucket computes its last token several times; `kv_map` names
        none of the copies, and neither keys nor output keep them.

        Args:
            x: All embedded tokens of the chunk, shape (1, L, C).
            rows: The tokens to recompute, ascending, shape (K,).
            modulation: Of the chunk's timestep, one row of `Conditions.modulation`.
            angles: cos and sin of every token of the chunk, each (L, pairs).
            context: Per layer, from `encode_context`.
            cache: Keys of this branch; the rows of these tokens are overwritten.
            first: Slot of the chunk's first token.
            visible: Slots of the keys that the tokens see, shape (M,); None for those up to the
                chunk's last.

        Returns:
            The last block's output for these tokens, shape (1, K, C).
        """
        tokens, count = x.shape[1], len(rows)
        whole = count == tokens
        slots = slice(first, first + tokens) if whole else first + rows
        seen = np.arange(first + tokens) if visible is None else visible
        kv_map = map_visible(cache.slots, first + rows, seen)
        rows = pad_rows(rows, self.bucket(count, tokens))
        inputs: dict[str, Array] = {
            "frame_ids": np.zeros(len(rows), np.int32),
            "modulation": modulation,
            "cos": angles[0] if whole else angles[0][rows],
            "sin": angles[1] if whole else angles[1][rows],
            "kv_map": kv_map,
        }
        scores = 4 * self.config.heads * len(rows) * len(kv_map)
        block = self.fused_block if scores > FUSED_ATTENTION_BYTES else self.runners["block"]
        inputs = _pick(block, inputs)
        y = x if whole else x[:, rows]
        for layer in range(self.config.layers):
            cached = {"k_cache": cache.keys[layer], "v_cache": cache.values[layer]}
            outputs = block.run(
                {"x": y, **inputs, **context[layer], **cached}, self.block_weights(layer)
            )
            y = outputs["y"]
            cache.write(
                layer, slots, outputs["k_new"][:, :, :count], outputs["v_new"][:, :, :count]
            )
        return y[:, :count]

    def head(
        self, out: NDArray[np.float32], head_modulation: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Compute patches of velocity (1, L, ph*pw*c) from out (1, L, C), modulation (1, C)."""
        head = self.runners["head"]
        inputs: dict[str, Any] = {
            "out": out,
            "frame_ids": np.zeros(out.shape[1], np.int32),
            "head_modulation": head_modulation,
        }
        return head.run(_pick(head, inputs))["patches"]

    def motion(
        self, out: NDArray[np.float32], frames: int, previous: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Measure how much each frame of a chunk's output differs from the one before.

        Args:
            out: Block output, shape (1, L, C).
            frames: Latent frames F.
            previous: Last frame of the chunk before, shape (1, P, C); without it the first frame
                takes the motion of the second.

        Returns:
            mean |h[f] - h[f-1]| / max(mean |h[f-1]|, 1e-8) over channels, shape (F, P).
        """
        framed = out.reshape(1, frames, -1, out.shape[2])
        before = framed[:, 0] if previous is None else previous
        motion = self.runners["motion"].run({"out": framed, "previous": before})["change"]
        if previous is None:
            motion[0] = motion[min(1, frames - 1)]
        return motion


def _pick(runner: Runner, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of everything that a graph might be told, what this one takes."""
    return {spec.name: inputs[spec.name] for spec in runner.graph.inputs if spec.name in inputs}


def map_visible(
    slots: int, renewed: NDArray[np.intp], visible: NDArray[np.intp]
) -> NDArray[np.int32]:
    """Say where the keys that a chunk sees lie.

    Args:
        slots: S of the cache.
        renewed: Slots of the tokens that are recomputed, shape (K,).
        visible: Slots that are seen, shape (M,).

    Returns:
        s for a key in slot s, S + j for that of recomputed token j; shape (M,).

    Example:
        >>> map_visible(6, np.array([3, 5]), np.arange(2, 6)).tolist()
        [2, 6, 4, 7]
    """
    places = np.arange(slots, dtype=np.int32)
    places[renewed] = slots + np.arange(len(renewed), dtype=np.int32)
    return places[visible]


def round_up_to_bucket(buckets: Sequence[float], recomputed: int, tokens: int) -> int:
    """Return how many tokens go through the blocks for K recomputed ones of L.

    Example:
        >>> [round_up_to_bucket((0.25, 0.5, 1), count, 100) for count in (0, 3, 26)]
        [0, 25, 50]
    """
    sizes = (math.ceil(share * tokens) for share in buckets)
    fitting = [size for size in sizes if size >= recomputed]
    return min(fitting, default=recomputed) if recomputed else 0


def pad_rows(rows: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Repeat the last of the recomputed rows until there are as many as a bucket has."""
    return np.pad(rows, (0, size - len(rows)), mode="edge")


def encode_timesteps(
    runner: Runner, config: TransformerConfig, timesteps: NDArray[np.int64], fps: int
) -> Conditions:
    """Compute the modulation of timesteps.

    Args:
        runner: Of the component `timestep`.
        config: Of the transformer.
        timesteps: 0 to 999, shape (n,), int64.
        fps: Frames per second; ignored by a model that is not told.

    Returns:
        One row per timestep.
    """
    inputs: dict[str, Array] = {"timesteps": timesteps}
    if config.fps_embedding:
        inputs["fps_id"] = np.array([0 if fps == FPS_WITH_ID_0 else 1])
    outputs = runner.run(inputs)
    return Conditions(outputs["modulation"], outputs["head_modulation"])


def open_transformer(
    bundle: Bundle, threads: int | None, provider: Provider = "cpu"
) -> Transformer:
    """Load the transformer's graphs and weights for ONNX Runtime, in float32.

    Args:
        bundle: An opened bundle.
        threads: Threads of one operator; None lets ONNX Runtime take every physical core.
        provider: That runs the graphs.

    Returns:
        The transformer; weights stored as float32 stay mapped, others are cast in memory.

    Raises:
        BundleError: The bundle lacks a graph or a weight.
        EngineError: A graph cannot be loaded.
    """
    names = ("text_projection", "context", "timestep", "embed", "block", "head", "motion")
    config = TransformerConfig.from_manifest(bundle.manifest.config["transformer"])
    return Transformer(
        config,
        {
            name: open_runner(
                bundle, name, "fp32", threads, "cpu" if name == "timestep" else provider
            )
            for name in names
        },
        open_runner(bundle, "block", "fp32-mha", threads, provider),
        _block_weights(bundle, config.layers),
        lambda layer: bundle.layer_weights("context", layer, "fp32"),
    )


def _block_weights(bundle: Bundle, layers: int) -> Callable[[int], Arrays]:
    """Hold the weights of all layers, or, where that is too much, cast one layer per pass."""
    weights = bundle.graph("block", "fp32").weights
    held = layers * sum(4 * math.prod(int(size) for size in spec.shape) for spec in weights)
    if held > HELD_WEIGHTS_BYTES:
        return lambda layer: bundle.layer_weights("block", layer, "fp32")
    return [bundle.layer_weights("block", layer, "fp32") for layer in range(layers)].__getitem__
