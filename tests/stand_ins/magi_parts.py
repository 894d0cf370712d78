"""What a MAGI-1 checkpoint has beside its transformer, tiny, of transformers' own classes."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from tiny_checkpoint import draw_weights
from transformers import T5Config, T5EncoderModel

from mc_export.magi_checkpoint import SPECIAL_TOKENS_FILE, TEXT_ENCODER_FOLDER, VAE_FOLDER

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


RELEASED_VAE = dict(  # but for its sizes
    video_size=256, video_length=16, patch_size=8, patch_length=4, in_chans=3, z_chans=16,
    double_z=True, embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4, qkv_bias=True,
    with_cls_token=True, ln_in_attn=True, conv_last_layer=True, norm_code=False, use_rope=False,
    use_final_proj=False,
)  # fmt: skip


def vae_config(**sizes) -> dict:
    """The config.json of an autoencoder like the released one, but for some sizes."""
    return {"_class_name": "ViTVAE", "ddconfig": RELEASED_VAE | sizes, "model_type": "vit"}


def draw_vae(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names that the original gives them."""
    c = config["ddconfig"]
    channels, inner = c["embed_dim"], c["embed_dim"] * c["mlp_ratio"]
    patch = (c["patch_length"], c["patch_size"], c["patch_size"])
    cells = c["video_length"] // patch[0] * (c["video_size"] // patch[1]) ** 2
    unpatched = channels // (patch[0] * patch[1] * patch[2])
    shapes = {
        "encoder.patch_embed.proj": (channels, 3, *patch),
        "encoder.last_layer": (2 * c["z_chans"], channels),
        "decoder.proj_in": (channels, c["z_chans"]),
        "decoder.last_layer": (3, unpatched, 3, 3, 3),
    }
    for half in ("encoder", "decoder"):
        shapes[f"{half}.norm"] = (channels,)
        for layer in range(c["depth"]):
            shapes |= {
                f"{half}.blocks.{layer}.attn.qkv": (3 * channels, channels),
                f"{half}.blocks.{layer}.attn.proj": (channels, channels),
                f"{half}.blocks.{layer}.norm2": (channels,),
                f"{half}.blocks.{layer}.mlp.fc1": (inner, channels),
                f"{half}.blocks.{layer}.mlp.fc2": (channels, inner),
            }
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel()
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    for half in ("encoder", "decoder"):
        for name, count in (("cls_token", 1), ("pos_embed", 1 + cells)):
            tensors[f"{half}.{name}"] = torch.randn(1, count, channels, generator=generator)
    return tensors


def write_vae(checkpoint: Path, **sizes) -> Path:
    """Add a tiny autoencoder of eight latent channels to the folder of a checkpoint."""
    tiny = dict(z_chans=8, embed_dim=256, depth=2, num_heads=4, mlp_ratio=1, video_size=32)
    config, folder = vae_config(**tiny | sizes), checkpoint / VAE_FOLDER
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(draw_vae(config), folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_whole(case: Path, folder: Path, special: bool = False) -> Path:
    """Copy a golden case and add every part that it lacks, or all but the special tokens."""
    shutil.copytree(case, folder)
    write_t5(folder)
    write_vae(folder)
    if special:
        tokens = np.load(case / "inputs.npz")["special_tokens"]
        np.savez(folder / SPECIAL_TOKENS_FILE, other_tokens=tokens)
    return folder
