"""The text encoders T5 and umT5 as two graphs: a layer that takes its weights, and the last norm.

In umT5 every layer has relative position biases of its own, in T5 all take those of the first. The
word embedding is no graph but a table, of which `mc_runtime.text` reads one row per token; the
relative position buckets come from there too. Neighbours: `check_tensors` holds a checkpoint
against `text_encoder_tensors`; `export_component` traces what `text_encoder_components` returns.

The stream of hidden values stays float32 in every precision: each sum along it is an `Island`,
and so is whatever reads it. In T5 it can outgrow float16, whose largest value is 65504.

Axes: T tokens, C channels, H heads, D head size.

Source: umT5 (arXiv 2304.09151) on T5 1.1 (arXiv 1910.10683); tensor names are those of
transformers' UMT5EncoderModel and T5EncoderModel.
"""

__all__ = [
    "describe_text_encoder",
    "text_embedding_table",
    "text_encoder_components",
    "text_encoder_tensors",
]

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mc_engines.errors import CheckpointError
from mc_export.checkpoint import TensorSource, load_finite
from mc_export.component import ComponentSource
from mc_export.islands import Island
from mc_export.layers import RmsNorm

# One table under two names: a checkpoint holds either or both.
TABLE_NAMES = ("shared.weight", "encoder.embed_tokens.weight")
SAMPLE_TOKENS = 8
# By model_type: whether every layer has relative position biases of its own.
_OWN_BIASES = {"umt5": True, "t5": False}


@dataclass(frozen=True)
class _Config:
    """The sizes that decide the graphs, named as in transformers' config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    own_biases: bool

    def biased_layer(self, layer: int) -> int:
        """Whose relative position biases a layer adds."""
        return layer if self.own_biases else 0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "_Config":
        """Take the sizes from config.json, after refusing what these graphs do not compute."""
        for key, choices in (("model_type", _OWN_BIASES), ("feed_forward_proj", ["gated-gelu"])):
            if config.get(key) not in choices:
                expected = " or ".join(f"'{choice}'" for choice in choices)
                raise CheckpointError(
                    f"text encoder config: expected {key} {expected}, got {config.get(key)!r}. "
                    "Use a checkpoint whose text encoder is umT5, or T5 of version 1.1."
                )
        names = [field.name for field in fields(cls) if field.name != "own_biases"]
        sizes: dict[str, Any] = {name: config.get(name) for name in names}
        for name, size in sizes.items():
            kinds = (int, float) if name == "layer_norm_epsilon" else (int,)
            if not isinstance(size, kinds) or size <= 0:
                raise CheckpointError(
                    f"text encoder config: expected a positive number as {name}, got {size!r}. "
                    "Take config.json from where the weights come from."
                )
        return cls(**sizes, own_biases=_OWN_BIASES[config["model_type"]])


class AttentionSum(Island):
    """Residual sum after the attention; float32 as the stream it adds to."""

    def forward(self, hidden: Tensor, update: Tensor) -> Tensor:
        """Add update to hidden, both (1, T, C)."""
        return hidden + update


class FeedForwardSum(Island):
    """Gate, output matrix and residual sum of the feed-forward.

    Its product is what overflows float16 in T5, so transformers keeps this one matrix (`wo`) in
    float32 beside float16. The gate belongs in here because it feeds that matrix alone.
    """

    def __init__(self, inner: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, channels))

    def forward(self, hidden: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        """Add the gated value to hidden (1, T, C); gate and value are (1, T, inner)."""
        return hidden + (nn.functional.gelu(gate, approximate="tanh") * value) @ self.weight


class TextLayer(nn.Module):
    """One encoder layer."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_heads, config.d_kv
        channels, inner = config.d_model, config.num_heads * config.d_kv
        self.attention_norm = RmsNorm(channels, config.layer_norm_epsilon)
        self.qkv = nn.Parameter(torch.empty(channels, 3 * inner))
        self.position_bias = nn.Parameter(
            torch.empty(config.relative_attention_num_buckets, config.num_heads)
        )
        self.out = nn.Parameter(torch.empty(inner, channels))
        self.attention_sum = AttentionSum()
        self.feed_forward_norm = RmsNorm(channels, config.layer_norm_epsilon)
        self.gate_value = nn.Parameter(torch.empty(channels, 2 * config.d_ff))
        self.feed_forward_sum = FeedForwardSum(config.d_ff, channels)

    def forward(self, hidden: Tensor, buckets: Tensor) -> Tensor:
        """Map hidden (1, T, C) to its like; buckets (T, T) int32 numbers the distance i to j."""
        hidden = self.attention_sum(hidden, self._attend(self.attention_norm(hidden), buckets))
        gate, value = (self.feed_forward_norm(hidden) @ self.gate_value).chunk(2, dim=-1)
        summed: Tensor = self.feed_forward_sum(hidden, gate, value)
        return summed

    def _attend(self, x: Tensor, buckets: Tensor) -> Tensor:
        q, k, v = (
            part.reshape(1, -1, self.heads, self.head_size).transpose(1, 2)
            for part in (x @ self.qkv).chunk(3, dim=-1)
        )
        bias = nn.functional.embedding(buckets, self.position_bias).permute(2, 0, 1)
        # T5 scales nothing here. Softmax is no island: TensorRT fuses MatMul, Softmax, MatMul
        # into one kernel only where all three are of one type.
        scores = torch.softmax(q @ k.transpose(-1, -2) + bias, dim=-1)
        attended: Tensor = (scores @ v).transpose(1, 2).flatten(2) @ self.out
        return attended


def text_encoder_tensors(
    config: Mapping[str, Any], names: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name every tensor of the encoder with its shape.

    Args:
        config: The text encoder's config.json.
        names: Tensor names of the checkpoint. It may call the embedding table `shared.weight`,
            `encoder.embed_tokens.weight`, or store it under both; what it uses is expected.

    Returns:
        Shape by name; matrices are [out, in].

    Raises:
        CheckpointError: The config is not that of a T5 or umT5 encoder.
    """
    sizes = _Config.read(config)
    channels, inner = sizes.d_model, sizes.num_heads * sizes.d_kv
    tables = [name for name in TABLE_NAMES if name in names] or TABLE_NAMES[:1]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (sizes.vocab_size, channels))
    for layer in range(sizes.num_layers):
        attention, feed_forward = (f"encoder.block.{layer}.layer.{part}." for part in (0, 1))
        shapes |= {
            f"{attention}layer_norm.weight": (channels,),
            f"{attention}SelfAttention.q.weight": (inner, channels),
            f"{attention}SelfAttention.k.weight": (inner, channels),
            f"{attention}SelfAttention.v.weight": (inner, channels),
            f"{attention}SelfAttention.o.weight": (channels, inner),
            f"{feed_forward}layer_norm.weight": (channels,),
            f"{feed_forward}DenseReluDense.wi_0.weight": (sizes.d_ff, channels),
            f"{feed_forward}DenseReluDense.wi_1.weight": (sizes.d_ff, channels),
            f"{feed_forward}DenseReluDense.wo.weight": (channels, sizes.d_ff),
        }
        if sizes.biased_layer(layer) == layer:
            shapes[f"{attention}SelfAttention.relative_attention_bias.weight"] = (
                sizes.relative_attention_num_buckets,
                sizes.num_heads,
            )
    return shapes | {"encoder.final_layer_norm.weight": (channels,)}


def describe_text_encoder(config: Mapping[str, Any]) -> dict[str, int]:
    """State in the manifest's words what a program must know to drive the graphs.

    Args:
        config: The text encoder's config.json.

    Returns:
        `layers`, `dim` (C), and `relative_buckets` and `relative_max_distance`, from which the
        input `buckets` of `text_layer` follows.

    Raises:
        CheckpointError: The config is not that of a T5 or umT5 encoder.
    """
    sizes = _Config.read(config)
    return {
        "layers": sizes.num_layers,
        "dim": sizes.d_model,
        "relative_buckets": sizes.relative_attention_num_buckets,
        "relative_max_distance": sizes.relative_attention_max_distance,
    }


def text_embedding_table(tensors: TensorSource) -> Callable[[], dict[str, Tensor]]:
    """Load the embedding table as it is stored; never cast: umT5-xxl's is 2 GB in bfloat16.

    Args:
        tensors: The text encoder's tensors.

    Returns:
        A loader like those of `ComponentSource.layers`, of one tensor `table`, shape (vocabulary,
        C).

    Raises:
        CheckpointError: The checkpoint has no such table.
    """
    for name in TABLE_NAMES:
        if name in tensors.names():
            return lambda: {"table": load_finite(tensors, name)}
    raise CheckpointError(
        f"text encoder: expected a tensor {' or '.join(TABLE_NAMES)}, got neither. "
        "Use a complete checkpoint."
    )


def text_encoder_components(
    config: Mapping[str, Any], tensors: TensorSource
) -> list[ComponentSource]:
    """Prepare the encoder's two graphs for export.

    `text_layer` takes hidden (1, T, C) and buckets (T, T) and runs once per layer, in order;
    `text_norm` makes the embedding (1, T, C) of the last one's output. There is no mask: the
    caller passes the tokens of the prompt alone, without padding.

    Args:
        config: The text encoder's config.json.
        tensors: The text encoder's tensors; read when a layer's loader is called, not before.

    Returns:
        `text_layer` and `text_norm`, both with their weights as inputs.

    Raises:
        CheckpointError: The config is not that of a T5 or umT5 encoder.
    """
    sizes = _Config.read(config)
    seeded, last = torch.Generator().manual_seed(0), sizes.relative_attention_num_buckets
    hidden = torch.randn(1, SAMPLE_TOKENS, sizes.d_model, generator=seeded)
    buckets = torch.randint(
        last, (SAMPLE_TOKENS, SAMPLE_TOKENS), generator=seeded, dtype=torch.int32
    )
    return [
        ComponentSource(
            name="text_layer",
            module=TextLayer(sizes).eval(),
            inputs={"hidden": hidden, "buckets": buckets},
            dynamic={"hidden": {1: "T"}, "buckets": {0: "T", 1: "T"}},
            outputs=("output",),
            float32=frozenset({"hidden", "output"}),
            layers=tuple(_layer_loader(sizes, tensors, layer) for layer in range(sizes.num_layers)),
        ),
        ComponentSource(
            name="text_norm",
            module=RmsNorm(sizes.d_model, sizes.layer_norm_epsilon).eval(),
            inputs={"hidden": hidden},
            dynamic={"hidden": {1: "T"}},
            outputs=("embedding",),
            float32=frozenset({"hidden", "embedding"}),
            layers=(lambda: {"weight": load_finite(tensors, "encoder.final_layer_norm.weight")},),
        ),
    ]


def _layer_loader(
    sizes: _Config, tensors: TensorSource, layer: int
) -> Callable[[], dict[str, Tensor]]:
    """Make the callable that loads one layer, named and laid out as `TextLayer` has it."""

    def load(name: str, layer: int = layer) -> Tensor:
        return load_finite(tensors, f"encoder.block.{layer}.layer.{name}.weight")

    def stack(*names: str) -> Tensor:
        return torch.cat([load(name) for name in names]).T.contiguous()

    def load_layer() -> dict[str, Tensor]:
        return {
            "attention_norm.weight": load("0.layer_norm"),
            "qkv": stack("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
            "position_bias": load(
                "0.SelfAttention.relative_attention_bias", sizes.biased_layer(layer)
            ),
            "out": stack("0.SelfAttention.o"),
            "feed_forward_norm.weight": load("1.layer_norm"),
            "gate_value": stack("1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1"),
            "feed_forward_sum.weight": stack("1.DenseReluDense.wo"),
        }

    return load_layer
