"""What a generation holds in a device's memory, whether that fits, and what would make it fit.

`plan_memory` plans one run; `find_ways_to_fit` plans it again with other settings, so that what it
names does fit. Neighbours: `predict` reports both; `plan_run_sizes` has the arithmetic; `host_plan`
plans a run on this CPU.
"""

__all__ = [
    "DTYPES",
    "USABLE",
    "MemoryPlan",
    "Plan",
    "Way",
    "find_ways_to_fit",
    "plan_memory",
    "write_flag",
]

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mc_engines.run_sizes import RunSizes, plan_run_sizes
from mc_runtime.bench.devices import Device
from mc_runtime.bench.predicted_model import Model
from mc_runtime.bench.roofline import EngineCosts

USABLE = 0.95  # of a memory; the rest is the driver's and other programs', assumed
# Bytes of a weight, bytes of an activation, the type in which activations are multiplied.
DTYPES = {
    "fp32": (4, 4, "fp32"),
    "bf16": (2, 2, "bf16"),
    "fp16": (2, 2, "fp16"),
    "fp8": (1, 2, "bf16"),
}
_SIXTEENTHS = range(15, 3, -1)  # of either side, down to a quarter
_STREAMED_LAYERS = 2  # that are there at a time


class Plan(Protocol):
    """Of the memory of a run."""

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        ...

    def fits(self, device: Device) -> bool:
        """Whether a device has as much."""
        ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run.

    Attributes:
        transformer: Of its weights, caches and activations.
        text_encoder: A layer of it, as one is there at a time; None where that is not told.
        vae: Its weights, and what the decoder keeps from step to step, in and out; None likewise.
    """

    transformer: RunSizes
    text_encoder: int | None
    vae: int | None

    @property
    def peak(self) -> int:
        """The most that is held at once, of what is told."""
        sizes = self.transformer
        # The prompt is encoded before there are keys, a pass runs beside them.
        encoding = sizes.weights + (self.text_encoder or 0)
        return (self.vae or 0) + max(sizes.peak, encoding)

    def fits(self, device: Device) -> bool:
        """Whether a device has as much."""
        return self.peak <= USABLE * device.memory


@dataclass(frozen=True)
class Way:
    """A change after which a run fits.

    Attributes:
        change: In words, with the flags.
        settings: Fields of the options that differ.
        dtype: Of the engines.
        streamed: Whether the blocks' weights are fetched layer by layer.
        vae_on_cpu: Whether there are no engines of the VAE.
        peak: Bytes that it then holds.
    """

    change: str
    settings: Mapping[str, Any]
    dtype: str
    streamed: bool
    vae_on_cpu: bool
    peak: int


def plan_memory(
    model: Model,
    options: Any,
    dtype: str,
    *,
    prefix: int = 0,
    streamed: bool = False,
    vae_on_cpu: bool = False,
) -> MemoryPlan:
    """Plan the memory of a run in engines on a device.

    Args:
        model: That runs.
        options: Of the run, of the kind that the model's family has.
        dtype: Of the engines, a key of `DTYPES`.
        prefix: Latent frames of a video that is continued.
        streamed: Only two layers of the blocks' weights are there at a time.
        vae_on_cpu: There are no engines of the VAE.

    Returns:
        The plan.

    Raises:
        ValueError: A setting that cannot be generated.
    """
    window = model.describe_window(options, model.plan(options, prefix))
    weight_bytes, value_bytes, _ = DTYPES[dtype]
    costs = EngineCosts(model.flops, 0, weight_bytes, value_bytes)
    sizes = plan_run_sizes(
        window,
        value_bytes=value_bytes,
        weights=costs.held_weights(_STREAMED_LAYERS if streamed else window.layers),
        decode=0,
        fused=True,
    )
    text, vae = None, None
    if model.text_layer is not None:
        text = model.text_layer * value_bytes
    if vae_on_cpu:
        vae = 0
    elif model.vae_weights is not None:
        positions = options.height * options.width // model.grid.spatial_factor**2
        states = 0 if model.decoder is None else 2 * model.decoder.state_values() * positions
        vae = (model.vae_weights + states) * value_bytes
    return MemoryPlan(sizes, text, vae)


@dataclass(frozen=True)
class _Change:
    """Words with flags, fields of the options, the dtype where it is another, and the rest."""

    words: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    streamed: bool = False
    vae_on_cpu: bool = False

    def __add__(self, other: "_Change") -> "_Change":
        return _Change(
            self.words + other.words,
            {**self.settings, **other.settings},
            self.dtype or other.dtype,
            self.streamed or other.streamed,
            self.vae_on_cpu or other.vae_on_cpu,
        )


_STREAMED = _Change(("streamed weights (--max-vram)",), streamed=True)
_NO_VAE = _Change(("the VAE on the CPU (without engines of it)",), vae_on_cpu=True)


def find_ways_to_fit(
    model: Model,
    options: Any,
    dtype: str,
    device: Device,
    prefix: int = 0,
    host: Callable[[Any], Plan] | None = None,
) -> list[Way]:
    """Find changes after which a run fits, of each kind the mildest.

    Args:
        model: That runs.
        options: Of the run, which does not fit.
        dtype: Of its engines.
        device: Whose memory it is.
        prefix: Latent frames of a video that is continued.
        host: Plans a run on this CPU, where weights are not streamed; None for one in engines.

    Returns:
        The ways, each planned as the run itself is. Where streamed weights are not enough by
        themselves they are tried beside the other changes; where nothing is, all of it together.
    """

    def first(changes: Iterable[_Change]) -> list[Way]:
        for change in changes:
            changed, used = replace(options, **change.settings), change.dtype or dtype
            rest = {"streamed": change.streamed, "vae_on_cpu": change.vae_on_cpu}
            try:
                if host is None:
                    plan: Plan = plan_memory(model, changed, used, prefix=prefix, **rest)
                else:
                    plan = host(changed)
            except ValueError:
                continue  # such as windows that would leave a chunk unfilled
            if plan.fits(device):
                said = " and ".join(change.words)
                return [Way(said, change.settings, used, **rest, peak=plan.peak)]
        return []

    # Where the host shares the memory, moving something there frees nothing.
    no_vae = [] if device.shared_memory or model.vae_weights is None else [_NO_VAE]
    savings = [
        [_change_settings(saving.words, saving.settings) for saving in kind]
        for kind in model.family.savings(model.config, options, model.grid)
    ]
    smaller = list(_shrink(model, options))
    kinds = [no_vae, list(_narrow(dtype, device)), *savings, smaller]
    streaming = [] if host is not None else [_STREAMED]
    streamed = first(streaming)
    ways = streamed + [way for kind in kinds for way in first(kind)]
    if streaming and not streamed:
        plain = [replace(way, change="", streamed=True, peak=0) for way in ways]
        beside = (way for kind in kinds for way in first(each + _STREAMED for each in kind))
        # One that streaming does not make milder is not worth it.
        ways += [way for way in beside if replace(way, change="", peak=0) not in plain]
    least = sum((kind[-1] for kind in (streaming, no_vae, *savings) if kind), _Change(()))
    return ways or first(each + least for each in smaller)


def _narrow(dtype: str, device: Device) -> Iterator[_Change]:
    """Types with smaller weights that the device computes in."""
    for other, (weight, _, values) in DTYPES.items():
        if weight < DTYPES[dtype][0] and {other, values} <= device.flops.keys():
            unbuilt = ", which nothing here builds yet" if other == "fp8" else ""
            yield _Change((f"smaller weights (--dtype {other}{unbuilt})",), dtype=other)


def _shrink(model: Model, options: Any) -> Iterator[_Change]:
    """Smaller frames of about the same shape."""
    units = (model.grid.spatial_factor * patch for patch in model.grid.patch_size[1:])
    sides = dict(zip(("height", "width"), units, strict=True))
    for share in _SIXTEENTHS:
        settings = {
            name: max(1, round(getattr(options, name) * share / 16 / unit)) * unit
            for name, unit in sides.items()
        }
        yield _change_settings("a smaller video", settings)


def _change_settings(words: str, settings: Mapping[str, Any]) -> _Change:
    """A change whose words name its flags."""
    flags = " ".join(write_flag(name, value) for name, value in settings.items())
    return _Change((f"{words} ({flags})",), settings)


def write_flag(name: str, value: Any) -> str:
    """Write a setting as a flag of the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
