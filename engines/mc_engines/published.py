"""The published checkpoints: where they lie, and the configurations they have.

Neighbours: `fetch_checkpoint` fetches one; `load_checkpoint` fills in what the original layout
leaves out; a random checkpoint of a real size takes its configuration from here, and `mc-bench
predict` the sizes of a model that is not here.
"""

__all__ = [
    "FAMILY_DEFAULTS",
    "MAGI",
    "PUBLISHED",
    "PUBLISHED_BY_FAMILY",
    "T5_XXL",
    "UMT5_XXL",
    "WAN21_VAE",
    "Published",
    "published_name",
]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published checkpoint and the video it was trained for.

    Attributes:
        repository: On the Hugging Face hub; None for the one in this package.
        transformer: Configuration of the transformer, with the keys of its family: diffusers' for
            SkyReels-V2; for MAGI-1 those of its own `model_config`, and `distill`.
        height: Pixels.
        width: Pixels.
        base_num_frames: Pixel frames of one window.
        spatial_factor: Pixels per latent along each side.
        settings: Of a run; None where the checkpoint has none. For SkyReels-V2 those that it wants
            otherwise than the family; for MAGI-1 those of its `runtime_config` and `engine_config`
            that decide what is computed.
        text_encoder: Configuration of the text encoder, transformers' keys; None where it is not
            known here.
        vae: Configuration of the autoencoder, diffusers' keys; None likewise.
    """

    repository: str | None
    transformer: Mapping[str, Any]
    height: int
    width: int
    base_num_frames: int
    spatial_factor: int = 8
    settings: Mapping[str, Any] | None = None
    text_encoder: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None


# The text encoder that SkyReels-V2's share, with the keys of transformers' UMT5Config.
# Source: SkyReels-V2, skyreels_v2_infer/modules/t5.py, umt5_xxl (commit abed76f).
UMT5_XXL: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
)

# The text encoder of MAGI-1, with the keys of transformers' T5Config: T5 1.1 XXL.
# Source: arXiv 1910.10683 and transformers' documentation of google/t5-v1_1-xxl.
T5_XXL: Mapping[str, Any] = MappingProxyType({**UMT5_XXL, "model_type": "t5", "vocab_size": 32128})

# The autoencoder that SkyReels-V2's share, with the keys of diffusers' AutoencoderKLWan.
# Source: SkyReels-V2, skyreels_v2_infer/modules/vae.py (commit abed76f).
WAN21_VAE: Mapping[str, Any] = MappingProxyType(
    {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "latents_mean": [
            *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
            *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        ],
        "latents_std": [
            *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
            *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
        ],
    }
)


def _skyreels(
    layers: int, heads: int, ffn_dim: int, fps: bool, head_dim: int = 128, text_dim: int = 4096
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "patch_size": [1, 2, 2],
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": text_dim,
            "freq_dim": 256,
            "ffn_dim": ffn_dim,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "inject_sample_info": fps,
            "rope_max_seq_len": 1024,
        }
    )


_published = partial(Published, text_encoder=UMT5_XXL, vae=WAN21_VAE)
_SMALL = _skyreels(layers=30, heads=12, ffn_dim=8960, fps=True)
_LARGE = _skyreels(layers=40, heads=40, ffn_dim=13824, fps=False)
_MINI = _skyreels(layers=6, heads=3, ffn_dim=768, fps=True, head_dim=64, text_dim=128)

# Source: repositories, diffusers' documentation (api/pipelines/skyreels_v2); sizes, its
# scripts/convert_skyreelsv2_to_diffusers.py (commit 58eb52c); videos, SkyReels-V2's README
# (commit abed76f). The 720P model was trained on 121 frames, 31 latent ones, which are no whole
# number of chunks: 117 frames are the longest window below that. skyreels-mini is this project's
# own: mc_export/skyreels_mini/README.md.
PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "skyreels-df-1.3b-540p": _published(
            "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers", _SMALL, 544, 960, 97
        ),
        "skyreels-df-14b-540p": _published(
            "Skywork/SkyReels-V2-DF-14B-540P-Diffusers", _LARGE, 544, 960, 97
        ),
        "skyreels-df-14b-720p": _published(
            "Skywork/SkyReels-V2-DF-14B-720P-Diffusers", _LARGE, 720, 1280, 117
        ),
        "skyreels-mini": Published(
            None, _MINI, 64, 64, 97, spatial_factor=4, settings={"guidance_scale": 3.0}
        ),
    }
)


def _magi(distilled: bool, large: bool, steps: int) -> Published:
    transformer = {
        "model_name": "videodit_ardf",
        "num_layers": 48 if large else 34,
        "hidden_size": 6144 if large else 3072,
        "ffn_hidden_size": 16384 if large else 12288,
        "num_attention_heads": 48 if large else 24,
        "num_query_groups": 8,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-6,
        "apply_layernorm_1p": True,
        "x_rescale_factor": 0.1 if large else 1,
        "half_channel_vae": large,
        "params_dtype": "torch.bfloat16",
        "patch_size": 2,
        "t_patch_size": 1,
        "in_channels": 32 if large else 16,
        "out_channels": 32 if large else 16,
        "cond_hidden_ratio": 0.25,
        "caption_channels": 4096,
        "caption_max_length": 800,
        "xattn_cond_hidden_ratio": 1.0,
        "cond_gating_ratio": 1.0,
        "gated_linear_unit": large,
        "distill": distilled,
    }
    width = 1280 if large else 720
    settings = {
        "cfg_number": 1 if distilled else 3,
        "cfg_t_range": [0.0, 0.0217, 0.1, 0.3, 0.999],
        "prev_chunk_scales": [1.5, 1.5, 1.5, 1.0, 1.0],
        "text_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
        "noise2clean_kvrange": [5, 4, 3, 2],
        "clean_chunk_kvrange": 1,
        "clean_t": 0.9999,
        "num_steps": steps,
        "window_size": 4,
        "fps": 24,
        "chunk_width": 6,
        "temporal_downsample_factor": 4,
        "distill_nearly_clean_chunk_threshold": 0.3,
        "shortcut_mode": "8,16,16",
    }
    return Published(
        "sand-ai/MAGI-1",
        MappingProxyType(transformer),
        720,
        width,
        96,
        settings=MappingProxyType(settings),
        text_encoder=T5_XXL,
    )


# Source: SandAI-org/MAGI-1 6ff822e, example/*/*_config.json and README. All weights lie in one
# repository, below ckpt/magi.
MAGI: Mapping[str, Published] = MappingProxyType(
    {
        "magi-4.5b": _magi(distilled=False, large=False, steps=64),
        "magi-4.5b-distill": _magi(distilled=True, large=False, steps=64),
        "magi-24b": _magi(distilled=False, large=True, steps=32),
        "magi-24b-distill": _magi(distilled=True, large=True, steps=16),
    }
)

PUBLISHED_BY_FAMILY: Mapping[str, Mapping[str, Published]] = MappingProxyType(
    {"skyreels": PUBLISHED, "magi": MAGI}
)

# The published checkpoint that stands for its family: the one that fits a single GPU.
FAMILY_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {"skyreels": "skyreels-df-1.3b-540p", "magi": "magi-4.5b-distill"}
)


def published_name(transformer: Mapping[str, Any]) -> str | None:
    """Which published checkpoint a transformer's configuration belongs to.

    Args:
        transformer: Configuration as a family's loader gives it.

    Returns:
        The name, or None where no published checkpoint has this configuration, or more than one
        has: the 14B models for 540P and 720P differ in their weights alone.

    Example:
        >>> published_name(PUBLISHED["skyreels-df-1.3b-540p"].transformer)
        'skyreels-df-1.3b-540p'
    """
    names = [
        name
        for models in PUBLISHED_BY_FAMILY.values()
        for name, model in models.items()
        if model.transformer == dict(transformer)
    ]
    return names[0] if len(names) == 1 else None
