"""Train the transformer and the text encoder of skyreels-mini by diffusion forcing.

`python -m scripts.train_mini.transformer` resumes from its last checkpoint, and at each checkpoint
writes the whole model (float16) in diffusers' layout: the moving average, and in the end, when the
rates have fallen to 0 and the average lags behind, the model itself.
"""

__all__ = ["Mini", "build_mini"]

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from mc_export.fetch import PACKAGED

from .autoencoder import MODEL
from .forcing import CHUNK, SHIFT, add_noise, draw_led_levels, draw_levels, predict_velocity
from .job import begin_job, load_training, log, save_training, trapezoid
from .latents import Cache
from .muon import build_optimizers, descend
from .text import TEXT_DIM, build_text_encoder, build_tokenizer, embed_captions

_CHECKPOINT = "transformer.pt"
_EMA = 0.998
_RATES = 0.02, 2e-3  # of Muon and of AdamW
_NOT_MATRICES = (
    *("patch_embedding", "proj_out", "cover_head", "fps_embedding"),
    *("shared", "embed_tokens", "bias"),
)
_DROPOUT = 0.1  # share of samples without a caption
_OVERWEIGHT = 8.0  # of the error at objects, while they are learnt
_COVER_WEIGHT = 5.0  # of the error of what objects cover, then
_WORDY = 0.2, 0.9  # places in the run where words help, noise levels 0.67 to 0.99
_COVER_DEPTH = 4  # blocks after which it is asked for


@dataclass(frozen=True)
class Stage:
    """A stretch of the training.

    Attributes:
        end: Its last step, exclusive.
        cycle: Samples and latent frames of a step, in turn: first frames alone, first chunks, pairs
            of chunks, whole windows.
        learn_objects: Whether, in steps of at most a chunk, clips have one object and no pan or
            cut, errors at the object weigh more (see `weigh_errors`), the model is asked what the
            object covers, and the noise is such that words can help: more hides the object's place,
            less shows its shape. Half of the chunks have a first frame with less noise: from there
            the words say where to.
    """

    end: float
    cycle: tuple[tuple[int, int], ...]
    learn_objects: bool = False


_STAGES = (
    Stage(2_200, ((16, 5), (16, 5), (8, 10), (16, 5), (16, 5), (3, 25))),
    Stage(5_600, ((80, 1), (16, 5), (16, 5), (16, 5)), learn_objects=True),
    Stage(6_100, ((16, 5), (16, 5), (8, 10), (16, 5), (16, 5), (3, 25))),
    Stage(8_300, ((80, 1), (16, 5), (8, 10), (16, 5), (16, 5), (3, 25)), learn_objects=True),
    # What stands still has to stay so from chunk to chunk: pairs and windows count all alike.
    Stage(9_900, ((16, 5), (8, 10), (3, 25), (8, 10)), learn_objects=True),
    Stage(float("inf"), ((8, 10), (3, 25), (8, 10), (3, 25), (16, 5)), learn_objects=True),
)
_SAVE_EVERY = 180  # seconds
_TOKEN = 8  # pixels of a token, both ways

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
    """What is trained together: the transformer and the text encoder.

    `cover_head` reads off tokens which pixels objects will cover; it serves the training alone.
    Words for shapes and motions say little of the latents and much of that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()
        self.cover_head = nn.Linear(self.transformer.proj_out.in_features, _TOKEN**2)

    def forward(
        self, x: Tensor, timesteps: Tensor, captions: list[str], first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity of noised latents under their captions, and the cover in logits.

        See `predict_velocity`; the cover has shape (B, L, 64), the pixels of each token.
        """
        text, bias = embed_captions(self.tokenizer, self.text_encoder, captions)
        velocity, tokens = predict_velocity(
            self.transformer, x, timesteps, text, bias, first, depth=_COVER_DEPTH
        )
        return velocity, self.cover_head(F.layer_norm(tokens, tokens.shape[-1:]))

    def save(self) -> None:
        """Write every part but the VAE in diffusers' layout, in float16."""
        half = copy.deepcopy(self).half()
        half.transformer.save_pretrained(MODEL / "transformer")
        half.text_encoder.save_pretrained(MODEL / "text_encoder")
        build_tokenizer().save_pretrained(MODEL / "tokenizer")  # calls leave their padding in one
        _name_class(MODEL / "tokenizer" / "tokenizer_config.json")
        build_scheduler().save_pretrained(MODEL / "scheduler")
        (MODEL / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n")


def _name_class(path: Path) -> None:
    """Name the tokenizer's class so that transformers 4 knows it too; 5 writes one of its own."""
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


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


def compute_loss(mini: Mini, cache: Cache, step: int, stage: Stage) -> Tensor:
    """Return the squared error of the velocity over the chunks that the sampler would update.

    What is drawn depends on the number of the step alone, so that a resumed training is the same.
    """
    batch, frames = stage.cycle[step % len(stage.cycle)]
    rng = np.random.default_rng(step)
    torch.manual_seed(step)
    learn_objects = stage.learn_objects and frames <= CHUNK
    drawn = cache.draw(rng, batch, frames, plain=learn_objects)
    captions = ["" if rng.random() < _DROPOUT else caption for caption in drawn.captions]
    chunks, extra = max(1, frames // CHUNK), torch.zeros(())
    places = _WORDY if learn_objects else None
    levels = draw_levels(rng, batch, chunks, drawn.clean, places)
    if learn_objects and frames == CHUNK:
        levels = draw_led_levels(rng, levels)
    sigma = torch.from_numpy(levels).float()
    x, target = add_noise(drawn.latents, sigma, torch.randn_like(drawn.latents))
    timesteps = (sigma * 1000).long().clamp(0, 999)
    velocity, cover = mini(x, timesteps, captions, drawn.first)
    error = (velocity - target).square().mean(1).unflatten(1, (sigma.shape[1], -1))
    if learn_objects:
        error = error * weigh_errors(drawn.near_objects().unflatten(1, (sigma.shape[1], -1)), sigma)
        wanted = cut_into_tokens(drawn.cover / 255)
        extra = _COVER_WEIGHT * F.binary_cross_entropy_with_logits(cover, wanted)
    active = ((sigma > 0) & (sigma < 1)).float()
    return (error.mean(dim=(2, 3, 4)) * active).sum() / active.sum() + extra


def cut_into_tokens(pixels: Tensor) -> Tensor:
    """Cut pixels (B, frames, 64, 64) into those of each token, shape (B, frames * 64, 64)."""
    squares = F.pixel_unshuffle(pixels, _TOKEN)  # (B, frames * 64, 8, 8): tokens last
    return squares.unflatten(1, (-1, _TOKEN**2)).movedim(2, -1).flatten(1, 3)


def weigh_errors(near: Tensor, sigma: Tensor) -> Tensor:
    """Return weights of mean 1 by which objects, a tenth of the picture, count as much as the rest.

    Where the noise hides the place of an object in every frame (above 0.98) all count alike: the
    weighted mean of what may be there would show it everywhere.

    Args:
        near: Latents near an object, shape (B, levels, frames, h, w), bool.
        sigma: Noise levels, shape (B, levels).
    """
    clearest = sigma.amin(dim=1)[:, None, None, None, None]
    excess = (_OVERWEIGHT - 1) * ((0.98 - clearest) / 0.06).clamp(0, 1)
    weights = 1 + excess * near
    return weights / weights.mean()


@torch.no_grad()
def update_average(average: Mini, mini: Mini, step: int) -> None:
    """Move the moving average towards the model; faster at the start."""
    decay = min(_EMA, (1 + step) / (10 + step))
    for slow, fast in zip(average.parameters(), mini.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def load_packaged(mini: Mini) -> None:
    """Fill a model with the weights in the package."""
    weights = load_file(PACKAGED / "transformer" / SAFETENSORS_WEIGHTS_NAME)
    mini.transformer.load_state_dict(weights)
    encoder = UMT5EncoderModel.from_pretrained(PACKAGED / "text_encoder")
    mini.text_encoder.load_state_dict(encoder.state_dict())


def train(steps: int, start: int = 0) -> None:
    """Train from the last checkpoint on; every 3 minutes write one and the model.

    Args:
        steps: Of the whole training.
        start: Where there is no checkpoint, begin from the weights in the package, which took so
            many steps. The optimizers begin anew, so the learning rate is warmed up again.
    """
    begin_job()
    mini = build_mini()
    if start:
        load_packaged(mini)
    models = {"mini": mini, "average": copy.deepcopy(mini)}
    optimizers = build_optimizers(mini, *_RATES, _NOT_MATRICES, decayed=("text_encoder",))
    first, start = start, load_training(_CHECKPOINT, models, optimizers) or start
    cache = Cache()
    losses: dict[str, float] = {}
    saved = time.monotonic()
    for step in range(start, steps):
        stage = next(stage for stage in _STAGES if step < stage.end)
        loss = compute_loss(mini, cache, step, stage)
        descend(loss, mini, optimizers, trapezoid(step, steps, first))
        update_average(models["average"], mini, step)
        name = f"loss_{stage.cycle[step % len(stage.cycle)][1]}"
        losses[name] = losses.get(name, loss.item()) * 0.97 + loss.item() * 0.03
        if step % 20 == 0:
            log(step=step, **losses)
        ended = step == steps - 1
        if ended or time.monotonic() - saved > _SAVE_EVERY:
            saved = time.monotonic()
            save_training(_CHECKPOINT, step + 1, models, optimizers)
            models["mini" if ended else "average"].save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True, help="Of the whole training.")
    parser.add_argument("--start", type=int, default=0, help="Steps of the weights in the package.")
    train(**vars(parser.parse_args()))
