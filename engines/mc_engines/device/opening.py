"""From a bundle with engines to a GPU that has them loaded.

Neighbours: `choose_engine` finds the engines that can run here, `Device` holds what is opened.
"""

__all__ = ["DeviceOptions", "list_components", "open_device"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import Backend, open_library
from mc_engines.building.partition import Part
from mc_engines.building.store import EngineStore
from mc_engines.bundle import Bundle
from mc_engines.device.cuda import open_gpu
from mc_engines.device.device import Device, Plan
from mc_engines.device.kernels import compile_kernels
from mc_engines.engine_choice import Place, check_form, choose_engine, list_built, read_plan
from mc_engines.manifest import CACHE_SUFFIX
from mc_engines.specs import Precision


@dataclass(frozen=True)
class DeviceOptions:
    """Where engines run, and within which limits.

    Attributes:
        backend: Library that runs them.
        limits: The largest video; engines for it have to be there.
        form: Precision of the engines.
        engines: Folder of engines; None: those in the bundle.
        max_vram: Bytes that weights and caches may take together; None: what is free.
        ordinal: Number of the GPU.
    """

    backend: Backend
    limits: VideoLimits
    form: Precision = "bf16"
    engines: Path | None = None
    max_vram: int | None = None
    ordinal: int = 0


def open_device(bundle: Bundle, options: DeviceOptions, components: Sequence[str]) -> Device:
    """Load engines of a bundle onto a GPU.

    Args:
        bundle: An opened bundle.
        options: Which, and where.
        components: What has to run there.

    Returns:
        The GPU with the engines.

    Raises:
        MissingExtraError: A library is not installed.
        EngineError: There is no GPU, an engine is missing or cannot run here, or memory is short;
            the message says which command helps.
        BundleError: The bundle lacks a component.
        ValueError: The GPU has no numbers of that precision.
    """
    library, gpu = open_library(options.backend), open_gpu(options.ordinal)
    check_form(options.form, gpu.capability)
    store = EngineStore(bundle, options.engines)
    place = Place(options.backend, library.version, gpu.capability, options.form, options.limits)
    plans = {name: _read(store, name, place) for name in components}
    kernels = compile_kernels(gpu.capability)
    return Device(gpu, library, bundle, options.form, plans, kernels, options.max_vram)


def list_components(bundle: Bundle, options: DeviceOptions) -> set[str]:
    """Name the components that have an engine of this library for this GPU, as `list_built` does.

    Args:
        bundle: An opened bundle.
        options: Which engines, and where.

    Returns:
        The components.

    Raises:
        MissingExtraError: A library is not installed.
        EngineError: There is no GPU.
    """
    library, gpu = open_library(options.backend), open_gpu(options.ordinal)
    place = Place(options.backend, library.version, gpu.capability, options.form, options.limits)
    return list_built(EngineStore(bundle, options.engines), place)


def _read(store: EngineStore, component: str, place: Place) -> Plan:
    sidecar = choose_engine(store, Part(component), place)
    path = store.path(sidecar)
    cache = path.with_name(f"{path.name}.sm{place.capability}{CACHE_SUFFIX}")
    return Plan(
        store.bundle.graph(component, place.form),
        read_plan(store, sidecar, place),
        str(path),
        cache,
    )
