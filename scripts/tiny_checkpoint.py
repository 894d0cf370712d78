"""A whole SkyReels-V2 checkpoint of a few hundred kilobytes, with random weights.

It has every part of a published one, in diffusers' layout and of diffusers' and transformers' own
classes, so that tests compare with them and `scripts/demo` runs where there is no real model.

    python scripts/tiny_checkpoint.py FOLDER [--seed N]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from mc_export.random_source import RandomSource

PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
SPECIAL = ("<pad>", "</s>", "<unk>")
# What the tokenizer knows: umT5's word boundary and printable ASCII. All else becomes <unk>.
PIECES = (*SPECIAL, "\u2581", *map(chr, range(ord("!"), ord("~") + 1)))


def make_tiny_checkpoint(
    folder: Path,
    seed: int = 0,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 32,
    ffn_dim: int = 128,
    text_dim: int = 48,
    fps_embedding: bool = True,
    parts: Sequence[str] = PARTS,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint; the same arguments give the same files.

    Args:
        folder: Where to; made if it is missing.
        seed: Of all weights.
        layers: Blocks of the transformer.
        heads: Of the transformer.
        head_dim: Of the transformer.
        ffn_dim: Of the transformer.
        text_dim: Channels of the text encoder.
        fps_embedding: Whether the transformer is told the frame rate, as DF-1.3B is.
        parts: Which of `PARTS` to write.
        shards: Files of the transformer's weights, at least.
        dtype: Of all weights.

    Returns:
        The folder.
    """
    transformer_sizes = dict(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        ffn_dim=ffn_dim,
        text_dim=text_dim,
        freq_dim=64,
        inject_sample_info=fps_embedding,
    )
    make = {
        "transformer": lambda: SkyReelsV2Transformer3DModel(**transformer_sizes),
        "text_encoder": lambda: UMT5EncoderModel(text_encoder_config(text_dim)),
        "tokenizer": make_tokenizer,
        # Half the depth and a twelfth of the width of Wan 2.1's, with the same factors 8 and 4.
        "vae": lambda: AutoencoderKLWan(base_dim=8, num_res_blocks=1),
        "scheduler": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    }
    for name in parts:
        part, arguments = make[name](), {}
        if isinstance(part, torch.nn.Module):
            # Not diffusers' own `to`, which warns of modules that a real model keeps in float32.
            draw_weights(torch.nn.Module.to(part, dtype), seed)
        if name == "transformer":
            size = sum(weight.nbytes for weight in part.parameters())
            arguments = {"max_shard_size": -(-size // shards)}
        part.save_pretrained(folder / name, **arguments)
    index = {"_class_name": "SkyReelsV2DiffusionForcingPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index) + "\n")
    return folder


def text_encoder_config(channels: int) -> UMT5Config:
    """Describe a umT5 encoder of two layers that knows `PIECES`."""
    return UMT5Config(
        vocab_size=len(PIECES), d_model=channels, d_kv=8, d_ff=64, num_heads=4, num_layers=2
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of umT5's kind: unigram pieces, each a character, and </s> at the end."""
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    pad, end, unknown = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, PIECES.index(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown
    )


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill a model with weights that keep the size of what flows through it."""
    weights = model.state_dict()
    source = RandomSource(
        {name: tuple(x.shape) for name, x in weights.items()}, torch.float32, seed
    )
    model.load_state_dict({name: source.load(name) for name in weights})


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a tiny checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    disable_progress_bar()
    print(make_tiny_checkpoint(arguments.folder, arguments.seed))


if __name__ == "__main__":
    main()
