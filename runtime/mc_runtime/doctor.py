"""What this machine has for generating videos, what is in the way, and the way out.

`mc-inspect --doctor` prints it. Nothing is run but the question whether a driver is there.
"""

__all__ = ["Diagnosis", "Finding", "examine"]

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from mc_engines.building.library import BACKENDS, Backend, open_library
from mc_engines.building.store import EngineStore, Sidecar
from mc_engines.bundle import Bundle
from mc_engines.device.cuda import Gpu, open_gpu
from mc_engines.errors import BundleError, EngineError, MissingExtraError
from mc_engines.specs import PRECISIONS
from mc_runtime.device_passes import ON_DEVICE
from mc_runtime.versions import find_version

State = Literal["good", "absent", "bad"]
_CPU_PACKAGES = "onnxruntime", "onnxruntime-gpu"
_PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
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
        """Whether generation can run at all, and nothing is wrong."""
        return any(self.can_generate.values()) and all(
            finding.state != "bad" for finding in self.findings
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        findings = [asdict(finding) for finding in self.findings]
        return {"good": self.is_good, "can_generate": self.can_generate, "findings": findings}


def examine(bundle: Path | None = None, engines: Path | None = None) -> Diagnosis:
    """Look at the libraries, the GPU, and the engines of a bundle.

    Args:
        bundle: Whose engines are looked at; None: libraries and GPU alone.
        engines: Folder of engines, if they are not in the bundle.

    Returns:
        What was found.
    """
    findings = [_examine_onnxruntime(), *_examine_plugins()]
    gpu, finding = _examine_gpu()
    findings.append(finding)
    versions: dict[Backend, str] = {}
    for backend in BACKENDS:
        finding = _examine_library(backend)
        findings.append(finding)
        if finding.state == "good":
            versions[backend] = finding.detail
    opened = None
    if bundle is not None:
        opened, finding = _open_bundle(bundle)
        findings.append(finding)
    can = {"cpu": findings[0].state == "good" and (bundle is None or opened is not None)}
    for backend in BACKENDS:
        can[backend] = can["cpu"] and gpu is not None and backend in versions
    if opened is not None:
        engine_findings = list(_examine_engines(opened, engines, gpu, versions))
        findings += [finding for _, finding in engine_findings]
        for backend in BACKENDS:
            here = {
                (sidecar.form, sidecar.component)
                for sidecar, finding in engine_findings
                if sidecar is not None and sidecar.backend == backend and finding.state == "good"
            }
            complete = any({(form, name) for name in ON_DEVICE} <= here for form in PRECISIONS)
            can[backend] = can[backend] and complete
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
        providers = import_module("onnxruntime").get_available_providers()
    except Exception as error:  # a library that cannot be loaded fails in its own way
        return Finding("onnxruntime", "bad", f"cannot be imported: {error}", "install it again")
    detail = f"{installed[0]} {found[installed[0]]}: {', '.join(providers)}"
    return Finding("onnxruntime", "good", detail)


def _examine_plugins() -> Iterator[Finding]:
    version = find_version(_PLUGIN)
    if version is not None:
        yield Finding("plug-in", "good", f"{_PLUGIN} {version}")


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
        f"{gpu.name}, compute capability {gpu.capability / 10}, driver for CUDA "
        f"{int(driver) // 1000}.{int(driver) % 1000 // 10}, {free // _MEGABYTE:,} of "
        f"{total // _MEGABYTE:,} MB free"
    )
    return gpu, Finding("GPU", "good", detail)


def _examine_library(backend: Backend) -> Finding:
    try:
        return Finding(backend, "good", open_library(backend).version)
    except MissingExtraError as error:
        return Finding(backend, "absent", "not installed", str(error))
    except Exception as error:  # a library without its own libraries fails in its own way
        return Finding(backend, "bad", f"cannot be imported: {error}", "install it again")


def _open_bundle(path: Path) -> tuple[Bundle | None, Finding]:
    try:
        return Bundle.open(path), Finding(str(path), "good", "a whole bundle")
    except BundleError as error:
        return None, Finding(str(path), "bad", str(error), "export it again")


def _examine_engines(
    bundle: Bundle, folder: Path | None, gpu: Gpu | None, versions: dict[Backend, str]
) -> Iterator[tuple[Sidecar | None, Finding]]:
    """Say of each engine whether it can run here; its sidecar comes with it if it has one."""
    store = EngineStore(bundle, folder)
    sidecars, damaged = store.read()
    for name in damaged:
        yield None, Finding(str(name), "bad", "a damaged engine", "mc-build --clean")
    for sidecar in sidecars:
        name = f"{sidecar.part.name}.{sidecar.form}"
        reason = _find_hindrance(store, sidecar, gpu, versions)
        targets = ", ".join(f"SM{target}" for target in sidecar.targets)
        detail = f"{sidecar.backend} {sidecar.version} for {targets}"
        if reason:
            yield sidecar, Finding(name, "absent", f"{detail}; {reason}", "mc-build")
        else:
            yield sidecar, Finding(name, "good", detail)


def _find_hindrance(
    store: EngineStore, sidecar: Sidecar, gpu: Gpu | None, versions: dict[Backend, str]
) -> str:
    """Why an engine cannot run here; empty where it can."""
    installed = next((v for name, v in versions.items() if name == sidecar.backend), None)
    if gpu is None:
        return "there is no GPU"
    if installed != sidecar.version:
        return f"{sidecar.backend} {installed or 'is not installed'} is here"
    if gpu.capability not in sidecar.targets:
        return f"the GPU is SM{gpu.capability}"
    if not store.is_whole(sidecar):
        return "the file is not whole"
    return ""
