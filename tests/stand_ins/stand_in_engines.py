"""A folder of engines for the stand-in library, as mc-build would leave it."""

import hashlib

from stand_in_tensorrt import VERSION, make_plan

from mc_engines.building.bounds import VideoLimits, bound_symbols
from mc_engines.building.compile import Request
from mc_engines.building.partition import Part, graph_hash
from mc_engines.building.store import EngineStore, Sidecar


def store_engines(bundle, folder, components):
    """Store float32 engines for SM86 and videos of 32 x 32 pixels."""
    store = EngineStore(bundle, folder)
    symbols = bound_symbols(bundle.manifest.config, VideoLimits(32, 32, 97, 5))
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
