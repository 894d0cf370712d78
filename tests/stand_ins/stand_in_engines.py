"""Engines for the stand-in library: a folder of them as mc-build would leave it, and a GPU."""

import hashlib

from stand_in_tensorrt import VERSION, StandInLibrary, StandInTensorRT, make_plan

from mc_engines.building.bounds import VideoLimits, bound_symbols, bucket_symbols
from mc_engines.building.compile import Request
from mc_engines.building.library import Library
from mc_engines.building.partition import Part, graph_hash
from mc_engines.building.store import EngineStore, Sidecar
from mc_engines.device.cuda import Gpu
from mc_engines.device.device import Device, Plan

SMALL = VideoLimits(32, 32, 97, 5)


def list_parts(bundle):
    """Name everything that runs on a GPU."""
    return [name for name in bundle.manifest.components if name != "timestep"]


def store_engines(bundle, folder, components, limits=SMALL):
    """Store float32 engines for SM86, for videos of 32 x 32 pixels if nothing else is said."""
    store = EngineStore(bundle, folder)
    symbols = bound_symbols(bundle.manifest.config, limits)
    for name in components:
        (profile,) = Request((), [symbols]).bound(bundle.graph(name, "fp32"))
        plan = make_plan(bundle.graph_path(name, "fp32"), [profile])
        sidecar = Sidecar(
            component=name,
            layers=(),
            form="fp32",
            backend="tensorrt-rtx",
            version=VERSION,
            targets=(86,),
            left_out={},
            profiles=(profile,),
            graph=graph_hash(bundle, Part(name), "fp32"),
            inputs=hashlib.sha256(name.encode()).hexdigest(),
            fused_attention=None,
            size=len(plan),
            sha256=hashlib.sha256(plan).hexdigest(),
            seconds=0.1,
        )
        store.add(sidecar, plan)


def open_stand_in(
    bundle, driver, limits, components, backend="tensorrt-rtx", max_vram=None, kind=Device
):
    """A GPU with float32 engines of some components, which computes with their graphs."""
    rtx = backend == "tensorrt-rtx"
    library = Library(backend, (StandInLibrary if rtx else StandInTensorRT)(driver))
    symbols = bound_symbols(bundle.manifest.config, limits)
    buckets = bundle.manifest.config["transformer"]["token_buckets"]
    profiles = [symbols] if rtx else [bucket_symbols(symbols, share) for share in buckets]
    plans = {}
    for name in components:
        graph = bundle.graph(name, "fp32")
        bounds = Request((), profiles).bound(graph)
        plans[name] = Plan(graph, make_plan(bundle.graph_path(name, "fp32"), bounds), name)
    return kind(Gpu(driver), library, bundle, "fp32", plans, b"cubin 86", max_vram)
