"""What a MAGI-1 checkpoint has beside its transformer, tiny, of transformers' own classes."""

import io
from pathlib import Path

import sentencepiece
import torch
from tiny_checkpoint import draw_weights
from transformers import T5Config, T5EncoderModel

from mc_export.magi_checkpoint import TEXT_ENCODER_FOLDER

CORPUS = """a cat walks on the grass, realistic style
the sea at dawn; waves roll in & out
A dog jumps over the fence \u2014 \u4e00\u53ea\u732b \uff21\uff22\uff23 caf\u00e9 3.5%"""
EXTRA_IDS = 4  # behind the pieces; the real tokenizer has 100


def write_sentencepiece(folder: Path, pieces: int = 90) -> Path:
    """Train a tokenizer as T5's: unigram pieces with sentencepiece's normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 5), model_writer=model, vocab_size=pieces,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=5,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(f'{{"extra_ids": {EXTRA_IDS}}}')
    return folder


def write_t5(checkpoint: Path, channels: int = 32, seed: int = 0) -> Path:
    """Add a T5 encoder of two layers, and its tokenizer, to the folder of a checkpoint."""
    folder = write_sentencepiece(checkpoint / TEXT_ENCODER_FOLDER)
    config = T5Config(
        vocab_size=100, d_model=channels, d_kv=8, d_ff=48, num_heads=4, num_layers=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    return folder


def write_shards(folder: Path) -> list[Path]:
    """Store the weights of an encoder as the published ones are: torch files, in two shards."""
    (folder / "model.safetensors").unlink()
    config = T5Config.from_pretrained(folder)
    model = T5EncoderModel(config)
    draw_weights(model, 0)
    tensors = list(model.state_dict().items())  # the table under both of its names
    files = [folder / f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for file, part in zip(files, (tensors[:5], tensors[5:]), strict=True):
        torch.save(dict(part), file)
    return files
