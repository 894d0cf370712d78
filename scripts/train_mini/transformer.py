"""Train the transformer and the text encoder of skyreels-mini by diffusion forcing.

`python -m scripts.train_mini.transformer` resumes from its last checkpoint, and at each checkpoint
writes the whole model (moving average, float16) in diffusers' layout.
"""

__all__ = ["Mini", "build_mini"]

import argparse
import copy
import json
import time

import diffusers
import numpy as np
import torch
from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from torch import Tensor, nn

from .autoencoder import MODEL
from .forcing import CHUNK, SHIFT, add_noise, draw_levels, predict_velocity
from .job import begin_job, cosine, load_training, log, save_training
from .latents import Cache
from .muon import build_optimizers, descend
from .text import TEXT_DIM, build_text_encoder, build_tokenizer, embed_captions

_CHECKPOINT = "transformer.pt"
_EMA = 0.998
_RATES = 0.02, 2e-3  # of Muon and of AdamW
_NOT_MATRICES = ("patch_embedding", "proj_out", "fps_embedding", "shared", "embed_tokens", "bias")
_DROPOUT = 0.1  # share of samples without a caption
_WHOLE = 5  # every fifth step trains on whole windows
_SHAPES = {True: (3, 5), False: (8, 2)}  # batch, chunks: of a whole window, and else

_INDEX = {
    "_class_name": "SkyReelsV2DiffusionForcingPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SkyReelsV2Transformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


class Mini(nn.Module):
    """What is trained together: the transformer and the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()

    def forward(self, x: Tensor, timesteps: Tensor, captions: list[str]) -> Tensor:
        """Return the velocity of noised latents under their captions; see `predict_velocity`."""
        text, bias = embed_captions(self.tokenizer, self.text_encoder, captions)
        return predict_velocity(self.transformer, x, timesteps, text, bias)

    def save(self) -> None:
        """Write every part but the VAE in diffusers' layout, in float16."""
        half = copy.deepcopy(self).half()
        half.transformer.save_pretrained(MODEL / "transformer")
        half.text_encoder.save_pretrained(MODEL / "text_encoder")
        self.tokenizer.save_pretrained(MODEL / "tokenizer")
        build_scheduler().save_pretrained(MODEL / "scheduler")
        (MODEL / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n")


def build_transformer(layers: int = 6, heads: int = 3) -> SkyReelsV2Transformer3DModel:
    """Return the untrained transformer, 64 tokens per latent frame."""
    return SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=4 * 64 * heads,
        num_layers=layers,
        inject_sample_info=True,
        num_frame_per_block=CHUNK,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Return the sampler's configuration: flow matching with the shift of the training."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=SHIFT,
    )


def build_mini() -> Mini:
    """Return the untrained model, its gates small and its head at zero as diffusion likes it."""
    torch.manual_seed(0)
    mini = Mini()
    nn.init.zeros_(mini.transformer.proj_out.weight)
    nn.init.zeros_(mini.transformer.proj_out.bias)
    return mini


def compute_loss(mini: Mini, cache: Cache, rng: np.random.Generator, whole: bool) -> Tensor:
    """Return the squared error of the velocity over the chunks that the sampler would update."""
    batch, chunks = _SHAPES[whole]
    latents, captions, clean = cache.draw(rng, batch, chunks)
    captions = ["" if rng.random() < _DROPOUT else caption for caption in captions]
    sigma = torch.from_numpy(draw_levels(rng, batch, chunks, clean)).float()
    x, target = add_noise(latents, sigma, torch.randn_like(latents))
    timesteps = (sigma * 1000).long().clamp(0, 999)
    velocity = mini(x, timesteps, captions)
    error = (velocity - target).square().unflatten(2, (chunks, CHUNK)).mean(dim=(1, 3, 4, 5))
    active = ((sigma > 0) & (sigma < 1)).float()
    return (error * active).sum() / active.sum()


@torch.no_grad()
def update_average(average: Mini, mini: Mini, step: int) -> None:
    """Move the moving average towards the model; faster at the start."""
    decay = min(_EMA, (1 + step) / (10 + step))
    for slow, fast in zip(average.parameters(), mini.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def train(steps: int) -> None:
    """Train from the last checkpoint on; every 3 minutes write one and the model."""
    begin_job()
    mini = build_mini()
    models = {"mini": mini, "average": copy.deepcopy(mini)}
    optimizers = build_optimizers(mini, *_RATES, others=_NOT_MATRICES)
    start = load_training(_CHECKPOINT, models, optimizers)
    rng, cache, losses = np.random.default_rng(start), Cache(), {True: 1.0, False: 1.0}
    torch.manual_seed(start)
    saved = time.monotonic()
    for step in range(start, steps):
        whole = step % _WHOLE == _WHOLE - 1
        loss = compute_loss(mini, cache, rng, whole)
        descend(loss, mini, optimizers, cosine(step, steps))
        update_average(models["average"], mini, step)
        losses[whole] += 0.03 * (loss.item() - losses[whole])
        if step % 20 == 0:
            log(step=step, loss=losses[False], loss_whole=losses[True], clips=len(cache))
        if time.monotonic() - saved > 180 or step == steps - 1:
            saved = time.monotonic()
            save_training(_CHECKPOINT, step + 1, models, optimizers)
            models["average"].save()
            cache.refresh()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    train(parser.parse_args().steps)
