"""The families that can be run, by the name that a bundle's manifest has."""

__all__ = ["FAMILIES"]

from mc_engines.model_sizes import MAGI_NULL_TOKENS, MAGI_SPECIAL_TOKENS
from mc_runtime import tiled_vae
from mc_runtime.caption import clean_caption
from mc_runtime.families import magi, magi_work, skyreels, skyreels_work
from mc_runtime.families.family import Family

_SKYREELS = Family(
    name="skyreels",
    defaults=skyreels.default_options,
    grid=skyreels.read_grid,
    guided=lambda options: options.guidance_scale > 1,
    continued=skyreels.count_continued,
    plan=skyreels.plan,
    timesteps=skyreels.list_timesteps,
    measures_inputs=False,
    prompts=skyreels.pick_prompts,
    describe=skyreels.describe,
    start=skyreels.start,
    limits=skyreels.limit_video,
    rehearse=skyreels.rehearse,
    passes=skyreels_work.list_passes,
    slots=skyreels_work.list_slots,
    savings=skyreels_work.list_savings,
    published=skyreels_work.describe_published,
    prompt_tokens=skyreels_work.count_prompt_tokens,
    vanilla=skyreels.count_vanilla,
)
_MAGI = Family(
    name="magi",
    defaults=magi.default_options,
    grid=magi.read_grid,
    guided=lambda options: False,
    continued=magi.count_continued,
    plan=magi.plan,
    timesteps=magi.list_timesteps,
    measures_inputs=True,
    prompts=magi.pick_prompts,
    describe=magi.describe,
    start=magi.start,
    limits=magi.limit_video,
    kept=magi.keep_on_device,
    rehearse=magi.rehearse,
    passes=magi_work.list_passes,
    slots=magi_work.list_slots,
    savings=magi_work.list_savings,
    published=magi_work.describe_published,
    prompt_tokens=magi_work.count_prompt_tokens,
    table_tokens=(MAGI_NULL_TOKENS, MAGI_SPECIAL_TOKENS),
    parallel_text=True,
    keeps_velocity=True,
    tables=("null_text", "special_tokens"),
    clean=clean_caption,
    pads_text=False,
    open_decoder=tiled_vae.open_decoder,
    open_encoder=tiled_vae.open_encoder,
    decoded=tiled_vae.DECODED,
    encoded=tiled_vae.ENCODED,
    not_yet=(
        "mc-bench predict --device this-cpu",
        "mc-bench run --baseline diffusers",
    ),
)
FAMILIES = {family.name: family for family in (_SKYREELS, _MAGI)}
