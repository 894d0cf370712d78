"""The families that can be run, by the name that a bundle's manifest has."""

__all__ = ["FAMILIES"]

from mc_runtime import tiled_vae
from mc_runtime.caption import clean_caption
from mc_runtime.families import magi, skyreels
from mc_runtime.families.family import ENGINES, Family

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
    rehearse=skyreels.rehearse,
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
    rehearse=magi.rehearse,
    keeps_velocity=True,
    tables=("null_text", "special_tokens"),
    clean=clean_caption,
    pads_text=False,
    open_decoder=tiled_vae.open_decoder,
    open_encoder=tiled_vae.open_encoder,
    decoded=tiled_vae.DECODED,
    encoded=tiled_vae.ENCODED,
    not_yet=(
        ENGINES,
        "mc-calibrate",
        "mc-bench predict",
        "mc-bench run --baseline diffusers",
    ),
)
FAMILIES = {family.name: family for family in (_SKYREELS, _MAGI)}
