"""What a manifest says of a model's sizes and schedule, from its checkpoint's configuration.

Keys are translated here and nowhere else. Neighbours: the exporter's adapters check a configuration
and add what only the weights say; the runtime's families describe so the published models that are
not here, for `mc-bench predict`.
"""

__all__ = [
    "MAGI_DURATIONS",
    "MAGI_NULL_TOKENS",
    "MAGI_SPECIAL_TOKENS",
    "describe_magi",
    "describe_magi_schedule",
    "describe_skyreels",
    "describe_video",
]

from collections.abc import Mapping
from typing import Any

from mc_engines.published import Published

MAGI_NULL_TOKENS = 50  # of the null caption, that branches without a prompt attend to
MAGI_SPECIAL_TOKENS = 20
MAGI_DURATIONS = 8  # of them, each for another number of chunks left
# By name in the manifest, the key of the official configuration.
_MAGI_SCHEDULE = {
    "num_inference_steps": "num_steps",
    "chunk_frames": "chunk_width",
    "window_chunks": "window_size",
    "kv_ranges": "noise2clean_kvrange",
    "clean_timestep": "clean_t",
    "guidance_passes": "cfg_number",
    "guidance_timesteps": "cfg_t_range",
    "history_guidance_scales": "prev_chunk_scales",
    "text_guidance_scales": "text_scales",
    "nearly_clean_timestep": "distill_nearly_clean_chunk_threshold",
    "shortcut_mode": "shortcut_mode",
    "fps": "fps",
    "temporal_factor": "temporal_downsample_factor",
}


def describe_skyreels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what sizes a transformer of SkyReels-V2 has.

    Args:
        config: With diffusers' keys.

    Returns:
        Fields of the manifest's `config.transformer`.
    """
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    return {
        "layers": config["num_layers"],
        "dim": heads * head_dim,
        "heads": heads,
        "head_dim": head_dim,
        "ffn_dim": config["ffn_dim"],
        "text_dim": config["text_dim"],
        "in_channels": config["in_channels"],
        "out_channels": config.get("out_channels") or config["in_channels"],
        "patch_size": list(config["patch_size"]),
        "fps_embedding": bool(config.get("inject_sample_info", False)),
    }


def describe_video(published: Published) -> dict[str, Any]:
    """Say what video a model of SkyReels-V2 is for.

    Args:
        published: The checkpoint.

    Returns:
        Fields of the manifest's `config.video`, which are options of a run.
    """
    size = {"height": published.height, "width": published.width}
    return {**size, **(published.settings or {})}


def describe_magi(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what sizes a transformer of MAGI-1 has.

    Args:
        config: The official `model_config`, and `distill`.

    Returns:
        Fields of the manifest's `config.transformer`.
    """
    # A half-channel VAE's latents are taken twice; the copies are summed in the weights.
    channels = config["in_channels"] // (2 if config["half_channel_vae"] else 1)
    return {
        "layers": config["num_layers"],
        "dim": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "key_heads": config["num_query_groups"],
        "head_dim": config["kv_channels"],
        "ffn_dim": config["ffn_hidden_size"],
        "gated_ffn": config["gated_linear_unit"],
        "text_dim": config["caption_channels"],
        "text_projection_layers": 1,
        "max_text_tokens": config["caption_max_length"],
        "condition_dim": int(config["hidden_size"] * config["cond_hidden_ratio"]),
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": [1, config["patch_size"], config["patch_size"]],
        "norm_eps": config["layernorm_epsilon"],
        "distilled": config["distill"],
    }


def describe_magi_schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Say when and under what conditions a model of MAGI-1 computes.

    Args:
        settings: The official `runtime_config` and `engine_config`, in one.

    Returns:
        The manifest's `config.schedule`.
    """
    schedule = {name: settings[key] for name, key in _MAGI_SCHEDULE.items()}
    ranges, clean = settings["noise2clean_kvrange"], settings["clean_chunk_kvrange"]
    last = ranges[-1] if ranges else None
    return schedule | {"clean_kv_range": last if clean == -1 else clean}
