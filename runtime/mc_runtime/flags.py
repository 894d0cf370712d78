"""Flags that several commands have, and what `--quiet` does to their notes.

The settings of a generation are the fields of the families' options: names and kinds are taken
from there, only the help is written here or by the command. A flag that is not given leaves the
setting to the model, and one that the model's family does not have is refused.
"""

__all__ = [
    "FILE",
    "INPUT",
    "ONNXRUNTIME_BACKENDS",
    "choose_device",
    "choose_options",
    "choose_provider",
    "device_flags",
    "make_say",
    "setting_options",
]

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import BACKENDS
from mc_engines.device.opening import DeviceOptions
from mc_engines.onnxruntime_providers import Provider
from mc_engines.specs import PRECISIONS
from mc_runtime.families.magi_schedule import MagiOptions
from mc_runtime.options import GenerationOptions

FILE = click.Path(path_type=Path, dir_okay=False)
INPUT = click.Path(path_type=Path, dir_okay=False, exists=True)
_CPU = "cpu"
ONNXRUNTIME_BACKENDS: dict[str, Provider] = {  # of ONNX Runtime, by backend
    _CPU: "cpu",
    "onnxruntime-cuda": "cuda",
    "onnxruntime-tensorrt-rtx": "nv-tensorrt-rtx",
}
Options = TypeVar("Options", GenerationOptions, MagiOptions)
_MEGABYTE = 10**6
_OF_THE_MODEL = "height", "width"  # a bundle may know better than the field's default
_OF_MAGI = "num_frames", "num_inference_steps", "fps"  # its bundles always do
_HELP = {
    "num_frames": "Frames of the video.",
    "height": "Pixels.",
    "width": "Pixels.",
    "num_inference_steps": "Denoising steps of every chunk.",
    "guidance_scale": "1 switches guidance off.",
    "flow_shift": "Of the noise levels, towards noise.",
    "fps": "Frames per second.",
    "seed": "Of everything random.",
    "ar_step": "Steps a chunk lags behind the one before; 0: all together.",
    "causal_block_size": "Latent frames of a chunk.",
    "base_num_frames": "Frames of a window.",
    "overlap_history": "Frames that a window takes over, and of a video those continued.",
    "addnoise_condition": "Noise added to what is taken over, in thousandths.",
    "sigma_table": "Whose noise levels.",
    "first_sample": "How the second step is corrected: as diffusers' pipeline, or as in UniPC.",
    "nearly_clean": "Of a distilled MAGI-1: keep the guidance of the oldest chunk by itself.",
}
_FIELDS = {
    entry.name: entry for options in (MagiOptions, GenerationOptions) for entry in fields(options)
}
SETTINGS = tuple(_FIELDS)


def setting_options(
    texts: Mapping[str, str] = _HELP, flags: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add one option per setting of a generation.

    Args:
        texts: The help by field of the families' options; other fields get no option.
        flags: Flags that are not the field's name with hyphens, by field.

    Returns:
        A decorator, to stand below the command's own options.
    """
    renamed = flags or {}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, entry in reversed(_FIELDS.items()):
            if name in texts:
                choices, flag = get_args(entry.type), name.replace("_", "-")
                switch = f"--{flag}/--no-{flag}" if entry.type is bool else f"--{flag}"
                function = click.option(
                    renamed.get(name, switch),
                    name,
                    type=click.Choice(choices) if choices else type(entry.default),
                    default=None,
                    show_default=_describe_default(name),
                    help=texts[name],
                )(function)
        return function

    return decorate


def _describe_default(name: str) -> str:
    """The default of a setting as the help shows it; that of MAGI-1 too where it is another."""
    usual = _FIELDS[name].default
    if name in _OF_THE_MODEL:
        return f"the model's, else {usual}"
    other = getattr(MagiOptions(), name, usual)
    differs = other != usual and name not in _OF_MAGI
    return f"{usual}; MAGI-1: {other}" if differs else str(usual)


def choose_options(defaults: Options, settings: Mapping[str, Any]) -> Options:
    """Make the options of `setting_options`' flags; None takes the default of the model.

    Args:
        defaults: Of the model.
        settings: Values by name, of any parameter; those that are no settings are left out, and
            settings that are missing take the default too.

    Returns:
        The options, not checked.

    Raises:
        ValueError: A setting is given that the model's family does not have.
    """
    known = [entry.name for entry in fields(defaults)]
    given = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{name}: expected a setting of this model ({', '.join(known)}), got {value}. "
                "Leave it out."
            )
    return replace(defaults, **given)


def device_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that say where engines run; to be read with `choose_device`."""
    for option in reversed(_DEVICE_FLAGS):
        function = option(function)
    return function


_DEVICE_FLAGS = (
    click.option(
        "--backend",
        type=click.Choice((*ONNXRUNTIME_BACKENDS, *BACKENDS)),
        default=_CPU,
        show_default=True,
        help="What runs the model: ONNX Runtime, on the CPU or a GPU, or engines of mc-build.",
    ),
    click.option(
        "--dtype", type=click.Choice(PRECISIONS), help="Of the engines on a GPU; default: bf16."
    ),
    click.option(
        "--engines",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of engines; default: those in BUNDLE.",
    ),
    click.option(
        "--max-vram",
        type=click.IntRange(min=1),
        help="Megabytes for weights and caches; below what they take, layers are streamed.",
    ),
    click.option("--device", type=click.IntRange(min=0), help="Number of the GPU; default: 0."),
)


def choose_device(values: Mapping[str, Any], limits: VideoLimits) -> DeviceOptions | None:
    """Read the flags of `device_flags`.

    Args:
        values: Of the flags.
        limits: The largest video of the run, whose sizes the engines have to take.

    Returns:
        Where engines run; None where ONNX Runtime runs the graphs, see `choose_provider`.

    Raises:
        UsageError: A flag for engines without a backend that has any.
    """
    names = "dtype", "engines", "max_vram", "device"
    given = [name for name in names if values[name] is not None]
    if values["backend"] in ONNXRUNTIME_BACKENDS:
        if given:
            flag = given[0].replace("_", "-")
            raise click.UsageError(f"--{flag} is for engines. Add --backend {BACKENDS[0]}.")
        return None
    most = None if values["max_vram"] is None else values["max_vram"] * _MEGABYTE
    return DeviceOptions(
        values["backend"],
        limits,
        values["dtype"] or "bf16",
        values["engines"],
        most,
        values["device"] or 0,
    )


def choose_provider(values: Mapping[str, Any]) -> Provider:
    """Return what ONNX Runtime runs graphs on, from the flags of `device_flags`."""
    return ONNXRUNTIME_BACKENDS.get(values["backend"], "cpu")


def make_say(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a note to stderr, or nothing with `--quiet`."""
    return (lambda text: None) if quiet else partial(click.echo, err=True)
