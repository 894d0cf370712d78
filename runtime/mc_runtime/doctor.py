"""What this machine has for generating videos, what is in the way, and the way out.

`mc-inspect --doctor` prints it. Nothing is run but the question whether a driver is there, and an
addition on every provider of ONNX Runtime.
"""

__all__ = ["Diagnosis", "Finding", "examine"]

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import BACKENDS, Backend, open_library
from mc_engines.building.partition import Part
from mc_engines.building.store import EngineStore, Sidecar
from mc_engines.device.cuda import Gpu, open_gpu
from mc_engines.device.kernels import compile_kernels
from mc_engines.engine_choice import (
    Place,
    choose_engine,
    find_hindrance,
    list_built,
    usual_form,
)
from mc_engines.errors import BundleError, EngineError, MissingExtraError
from mc_engines.onnxruntime_providers import Provider, try_provider
from mc_engines.specs import PRECISIONS
from mc_runtime.device_passes import list_required
from mc_runtime.flags import ONNXRUNTIME_BACKENDS, choose_options
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.versions import find_version

State = Literal["good", "absent", "bad"]
_CPU_PACKAGES = "onnxruntime", "onnxruntime-gpu"
_PACKAGES: dict[Provider, str] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "nv-tensorrt-rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What.
        state: `good`, `absent` (which may be no fault), or `bad`.
        detail: What was found.
        advice: What to do about it; empty where there is nothing to do.
    """

    subject: str
    state: State
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        findings: In the order in which they were looked at.
        can_generate: By backend, whether a video can be generated.
    """

    findings: tuple[Finding, ...]
    can_generate: dict[str, bool]

    @property
    def is_good(self) -> bool:
        """Whether generation can run at all: what is bad beside that is a finding."""
        return any(self.can_generate.values())

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        findings = [asdict(finding) for finding in self.findings]
        return {"good": self.is_good, "can_generate": self.can_generate, "findings": findings}


def examine(
    bundle: Path | None = None,
    engines: Path | None = None,
    sizes: Mapping[str, Any] = MappingProxyType({}),
) -> Diagnosis:
    """Look at the libraries, the GPU, and the engines of a bundle.

    Args:
        bundle: Whose engines are looked at; None: libraries and GPU alone.
        engines: Folder of engines, if they are not in the bundle.
        sizes: Of the video that engines are to take, by field of `GenerationOptions`; others are
            the model's.

    Returns:
        What was found.

    Raises:
        ValueError: The sizes are none of a video.
    """
    gpu, finding = _examine_gpu()
    compiler = None if gpu is None else _examine_compiler(gpu)
    findings = [_examine_onnxruntime(), finding, *filter(None, [compiler])]
    providers = _examine_providers(gpu) if findings[0].state == "good" else {}
    findings += providers.values()
    versions: dict[Backend, str] = {}
    for backend in BACKENDS:
        finding = _examine_library(backend)
        findings.append(finding)
        if finding.state == "good":
            versions[backend] = finding.detail
    pipeline = None
    if bundle is not None:
        pipeline, finding = _open_bundle(bundle)
        findings.append(finding)
    there = bundle is None or pipeline is not None
    can = {
        backend: there and backend in providers and providers[backend].state == "good"
        for backend in ONNXRUNTIME_BACKENDS
    }
    for backend in BACKENDS:
        can_drive = compiler is not None and compiler.state == "good"
        can[backend] = can["cpu"] and can_drive and backend in versions
    if pipeline is not None:
        options = choose_options(pipeline.default_options, sizes)
        pipeline.plan(options)  # refuses sizes that no backend can generate
        store, limits = EngineStore(pipeline.bundle, engines), pipeline.limit_video(options)
        findings += _examine_engines(store, limits, gpu, versions)
        if gpu is not None:
            for backend, version in versions.items():
                place = Place(backend, version, gpu.capability, "bf16", limits)
                finding = _examine_set(store, place)
                findings.append(finding)
                can[backend] = can[backend] and finding.state == "good"
    return Diagnosis(tuple(findings), can)


def _examine_onnxruntime() -> Finding:
    """ONNX Runtime runs parts of a generation on every backend."""
    found = {name: find_version(name) for name in _CPU_PACKAGES}
    installed = [name for name, version in found.items() if version]
    if len(installed) == 2:
        return Finding(
            "onnxruntime",
            "bad",
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    if not installed:
        advice = "pip install 'motioncache[cpu]'"
        return Finding("onnxruntime", "bad", "not installed", advice)
    try:
        import_module("onnxruntime")
    except Exception as error:  # a library that cannot be loaded fails in its own way
        return Finding("onnxruntime", "bad", f"cannot be imported: {error}", "install it again")
    return Finding("onnxruntime", "good", f"{installed[0]} {found[installed[0]]}")


def _examine_providers(gpu: Gpu | None) -> dict[str, Finding]:
    """Try every provider of ONNX Runtime: what was compiled in need not be active."""
    findings = {}
    for backend, provider in ONNXRUNTIME_BACKENDS.items():
        package = _PACKAGES[provider]
        version = find_version(package)
        name = f"{package} {version}: " if version else ""
        try:
            active = ", ".join(try_provider(provider))
            findings[backend] = Finding(backend, "good", f"{name}active are {active}")
        except MissingExtraError as error:
            findings[backend] = Finding(backend, "absent", "not installed", str(error))
        except EngineError as error:
            expected = provider == "cpu" or (version is not None and gpu is not None)
            findings[backend] = Finding(backend, "bad" if expected else "absent", f"{name}{error}")
    return findings


def _examine_gpu() -> tuple[Gpu | None, Finding]:
    try:
        gpu = open_gpu()
    except MissingExtraError as error:
        return None, Finding("GPU", "absent", "cuda-bindings is not installed", str(error))
    except EngineError as error:
        return None, Finding("GPU", "absent", str(error), "generation runs on the CPU")
    free, total = gpu.free_bytes()
    (driver,) = gpu.call("cuDriverGetVersion")
    detail = (
        f"{gpu.name}, compute capability {gpu.capability / 10}, driver{_find_driver()} for CUDA "
        f"{int(driver) // 1000}.{int(driver) % 1000 // 10}, {free // _MEGABYTE:,} of "
        f"{total // _MEGABYTE:,} MB free"
    )
    return gpu, Finding("GPU", "good", detail)


def _find_driver() -> str:
    """The version of the driver, where its kernel module tells it, with a space before."""
    text = _DRIVER_FILE.read_text() if _DRIVER_FILE.is_file() else ""
    found = re.search(r"Module.*?\s(\d+\.\d[.\d]*)\s", text)
    return f" {found[1]}" if found else ""


def _examine_compiler(gpu: Gpu) -> Finding:
    """Compile the kernel of our own, without which no engine is driven."""
    name = f"cuda-bindings {find_version('cuda-bindings')}"
    try:
        compile_kernels(gpu.capability)
    except (EngineError, MissingExtraError) as error:
        return Finding("NVRTC", "bad", f"{name}: {error}", str(error).rpartition(". ")[2])
    return Finding("NVRTC", "good", f"{name} compiles for this GPU")


def _examine_library(backend: Backend) -> Finding:
    try:
        return Finding(backend, "good", open_library(backend).version)
    except MissingExtraError as error:
        return Finding(backend, "absent", "not installed", str(error))
    except Exception as error:  # a library without its own libraries fails in its own way
        return Finding(backend, "bad", f"cannot be imported: {error}", "install it again")


def _open_bundle(path: Path) -> tuple[VideoPipeline | None, Finding]:
    try:
        return VideoPipeline.from_bundle(path), Finding(str(path), "good", "a whole bundle")
    except (BundleError, ValueError) as error:
        return None, Finding(str(path), "bad", str(error), "export it again")


def _examine_engines(
    store: EngineStore, limits: VideoLimits, gpu: Gpu | None, versions: Mapping[Backend, str]
) -> Iterator[Finding]:
    """Say of each engine whether it can run here."""
    sidecars, damaged = store.read()
    for name in damaged:
        yield Finding(str(name), "bad", "a damaged engine", "mc-build --clean")
    for sidecar in sidecars:
        name = f"{sidecar.part.name}.{sidecar.form}"
        hindrance, advice = _find_hindrance(store, sidecar, limits, gpu, versions)
        targets = ", ".join(f"SM{target}" for target in sidecar.targets)
        detail = f"{sidecar.backend} {sidecar.version} for {targets}"
        if hindrance:
            yield Finding(name, "absent", f"{detail}; {hindrance}", advice)
        else:
            yield Finding(name, "good", detail)


def _find_hindrance(
    store: EngineStore,
    sidecar: Sidecar,
    limits: VideoLimits,
    gpu: Gpu | None,
    versions: Mapping[Backend, str],
) -> tuple[str, str]:
    """Why an engine cannot run here, and what helps; both are empty where it can."""
    if sidecar.layers:
        return "a group of layers, which mc-generate does not run", ""
    backend = next((name for name in versions if name == sidecar.backend), None)
    if gpu is None:
        return "there is no GPU", ""
    if backend is None:
        others = (_examine_library(each).advice for each in BACKENDS if each == sidecar.backend)
        return f"{sidecar.backend} is not installed here", next(others, "")
    form = next(each for each in PRECISIONS if each == sidecar.form)
    place = Place(backend, versions[backend], gpu.capability, form, limits)
    try:
        hindrance = find_hindrance(store, sidecar, place)
    except BundleError as error:
        return str(error), "mc-build --clean"
    if hindrance is None:
        return "", ""
    text = f"needed is one of {place.name}"
    command = place.build_command(store, sidecar.component)
    advice = "it runs in ONNX Runtime" if hindrance.is_final else command
    return f"{text}, got {hindrance.text}", advice


def _examine_set(store: EngineStore, place: Place) -> Finding:
    """Say whether there is every engine without which a GPU cannot generate, in some precision."""
    forms = sorted(PRECISIONS, key=lambda form: form != usual_form(place.capability))
    missing = {form: _list_missing(store, replace(place, form=form)) for form in forms}
    form = min(forms, key=lambda each: len(missing[each]))
    limits, name = place.limits, f"{place.backend} engines"
    video = f"{limits.max_frames} frames of {limits.height} x {limits.width} in {form}"
    if not missing[form]:
        return Finding(name, "good", f"all for {video}")
    command = replace(place, form=form).build_command(store)
    return Finding(name, "absent", f"{', '.join(missing[form])} missing for {video}", command)


def _list_missing(store: EngineStore, place: Place) -> list[str]:
    """The parts that have to run there and cannot, and those that are built, but not for this."""
    missing, required = [], list_required(store.bundle)
    built = list_built(store, place)
    others = [name for name in store.bundle.manifest.components if name in built - {*required}]
    for name in (*required, *others):
        try:
            choose_engine(store, Part(name), place)
        except (BundleError, EngineError):
            missing.append(name)
    return missing
