"""The text side of skyreels-mini: a tokenizer of the grammar's words and a two-layer umT5 encoder.

Pipelines pad every prompt's embedding with zeros to a fixed length, and the transformer attends to
them. `embed_captions` keeps a single zero token and says by a bias how many it stands for: exactly
the same attention, at less cost. Why the length is short here is said in `README.md`.
"""

__all__ = ["MAX_TOKENS", "TEXT_DIM", "build_text_encoder", "build_tokenizer", "embed_captions"]

import math

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .world import BACKGROUNDS, COLOURS, DIRECTIONS, RADII, SHAPES, SPEEDS

MAX_TOKENS = 24  # the longest caption has 21
TEXT_DIM = 128
_SPECIAL = ("<pad>", "</s>", "<unk>")
_JOINTS = ("a", "and", "over", "while", "the", "camera", "pans", "then", "cut", "to")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a word, lower case, `</s>` at the end."""
    words = (*_JOINTS, *RADII, *COLOURS, *SHAPES, *SPEEDS, *DIRECTIONS, *BACKGROUNDS)
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Return the untrained encoder for a vocabulary of that size."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def embed_captions(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Return embeddings and the attention bias of captions ("" is the unconditional one).

    Returns:
        Embeddings, shape (B, T + 1, 128), the last token a zero one; bias of the cross-attention's
        logits, shape (B, 1, 1, T + 1): 0 for words, -inf for a batch's padding, and for the zero
        token the logarithm of how many it stands for.
    """
    batch = tokenizer(captions, padding=True, return_tensors="pt")
    mask = batch.attention_mask.bool()
    embeddings = encoder(batch.input_ids, batch.attention_mask).last_hidden_state
    embeddings = torch.nn.functional.pad(embeddings * mask[..., None], (0, 0, 0, 1))
    zeros = (MAX_TOKENS - mask.sum(1, keepdim=True)).float().log()
    bias = torch.cat([torch.zeros(mask.shape).masked_fill(~mask, -math.inf), zeros], dim=1)
    return embeddings, bias[:, None, None]
