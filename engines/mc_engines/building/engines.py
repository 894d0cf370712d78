"""The engines of a bundle: which attention they have, which are there, which must be built.

Neighbours: `compile` builds one graph, `EngineStore` keeps what comes out; `mc-build` asks for each
component.
"""

__all__ = ["Job", "check_attention", "find_attention", "provide_engine"]

import hashlib
import time
from dataclasses import dataclass

from mc_engines.building.bounds import bound_tensor
from mc_engines.building.compile import (
    Advance,
    Attention,
    Request,
    build_plan,
    has_fused_attention,
)
from mc_engines.building.library import Library
from mc_engines.building.store import EngineStore, Sidecar, engine_file, hash_inputs
from mc_engines.bundle import Bundle
from mc_engines.errors import EngineError
from mc_engines.specs import Precision


@dataclass(frozen=True)
class Job:
    """What engines are built from, and what for.

    Attributes:
        bundle: Has the graphs.
        library: Builds.
        precision: Of the graphs.
        request: Targets, sizes and limits.
        store: Keeps the engines.
    """

    bundle: Bundle
    library: Library
    precision: Precision
    request: Request
    store: EngineStore

    @property
    def targets(self) -> str:
        """The targets in words."""
        named = ", ".join(f"SM{target}" for target in self.request.targets)
        return named or "the GPU here"


def find_attention(bundle: Bundle, component: str) -> Attention | None:
    """Find what decides whether a component's attention is one kernel.

    Args:
        bundle: Of the component.
        component: Such as `block`.

    Returns:
        None where it has none, and for the VAE, whose single wide head no kernel has.
    """
    if component == "block":
        transformer = bundle.manifest.config["transformer"]
        return Attention(transformer["heads"], transformer["head_dim"])
    if component == "text_layer":
        graph = next(iter(bundle.component(component).graphs.values()))
        shapes = {spec.name: spec.shape for spec in graph.weights}
        heads, inner = int(shapes["position_bias"][1]), int(shapes["qkv"][1]) // 3
        return Attention(heads, inner // heads, mask=True)
    return None


def check_attention(job: Job, component: str, allow_unfused: bool) -> bool | None:
    """Refuse a component whose attention is not one kernel on every target.

    Args:
        job: What is built.
        component: Such as `block`.
        allow_unfused: Do not refuse it.

    Returns:
        Whether it is one kernel; None where there is no attention, or where that cannot be told.

    Raises:
        EngineError: It is not one kernel.
    """
    attention = find_attention(job.bundle, component)
    if attention is None or not job.library.can_check_attention:
        return None
    if has_fused_attention(job.library, attention, job.precision, job.request.targets):
        return True
    if not allow_unfused:
        raise EngineError(
            f"{component}: expected attention of {attention.heads} heads of {attention.head_dim} "
            f"to be one kernel in {job.precision} on {job.targets}, got none. "
            "Use --dtype bf16 or fp16, or build it nevertheless with --allow-unfused."
        )
    return False


def provide_engine(job: Job, component: str, fused: bool | None, advance: Advance) -> Sidecar:
    """Build an engine and keep it, unless one of the same inputs is there.

    Args:
        job: What is built.
        component: Such as `block`.
        fused: What `check_attention` said.
        advance: As for `build_plan`.

    Returns:
        The sidecar of the engine.

    Raises:
        EngineError: The graph is refused, or cannot be built.
        BundleError: The engine cannot be kept in the bundle.
    """
    form, library, request = job.precision, job.library, job.request
    inputs = hash_inputs(job.bundle, component, form, library, request)
    file = engine_file(library.backend, library.version, component, form, inputs)
    found = job.store.find(file, inputs)
    if found is not None:
        return found
    graph, start = job.bundle.graph(component, form), time.monotonic()
    plan = build_plan(library, graph, job.bundle.graph_path(component, form), request, advance)
    specs = (*graph.inputs, *graph.weights)
    sidecar = Sidecar(
        component=component,
        form=form,
        backend=library.backend,
        version=library.version,
        targets=request.targets,
        profiles=tuple(
            {spec.name: bound_tensor(spec, symbols) for spec in specs}
            for symbols in request.profiles
        ),
        inputs=inputs,
        fused_attention=fused,
        size=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        seconds=round(time.monotonic() - start, 2),
    )
    job.store.add(sidecar, plan)
    return sidecar
