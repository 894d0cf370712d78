"""The engines of a bundle: which attention they have, which are there, which must be built.

Not every graph can be built for every GPU: a layer of the text encoder has products of float32
matrices, which SM75 does not have. What a run cannot do without has to be built for every target;
the rest is built for the targets that can, and the outcome says what was left out and why. Nor is
every graph good in 16 bits: of the rest, one that is rough there is built where it is asked for.

Neighbours: `compile` builds one graph, `EngineStore` keeps what comes out; `mc-build` asks for each
component.
"""

__all__ = [
    "REQUIRED",
    "Job",
    "Outcome",
    "check_attention",
    "find_attention",
    "find_unfit",
    "provide_engine",
]

import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mc_engines.building.compile import (
    Advance,
    Attention,
    Request,
    build_plan,
    count_attention_kernels,
    has_fused_attention,
    name_targets,
)
from mc_engines.building.library import Library
from mc_engines.building.network import has_softmax
from mc_engines.building.partition import Part, bake_layers, graph_hash, graph_of
from mc_engines.building.store import EngineStore, Sidecar, engine_file, hash_inputs
from mc_engines.bundle import Bundle
from mc_engines.errors import BuildError, EngineError
from mc_engines.parity_report import find_rough
from mc_engines.specs import Precision

# What runs in every pass, and what makes the keys of the text: there is no run on a GPU without it.
REQUIRED = ("block", "text_projection", "context", "embed", "head", "motion", "combine")


@dataclass(frozen=True)
class Job:
    """What engines are built from, and what for.

    Attributes:
        bundle: Has the graphs.
        library: Builds.
        precision: Of the graphs.
        request: Targets, sizes and limits.
        store: Keeps the engines.
        required: Components that must be built for every target.
    """

    bundle: Bundle
    library: Library
    precision: Precision
    request: Request
    store: EngineStore
    required: Collection[str] = REQUIRED

    @property
    def targets(self) -> str:
        """The targets in words."""
        return name_targets(self.request.targets)


@dataclass(frozen=True)
class Outcome:
    """What became of a component, or of a part of it.

    Attributes:
        part: The component, or a group of its layers.
        sidecar: Of its engine; None where it cannot be built for any target.
        left_out: By target that the engine is not for, why.
    """

    part: Part
    sidecar: Sidecar | None
    left_out: dict[str, str] = field(default_factory=dict)


def find_attention(bundle: Bundle, component: str) -> Attention | None:
    """Find what decides whether a component's attention is one kernel, where it has to be.

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


def find_unfit(bundle: Bundle, form: Precision) -> dict[str, float]:
    """Find what a run can do without and should, as a precision is too rough for the model.

    Args:
        bundle: Of the graphs.
        form: Precision of the graphs.

    Returns:
        By component, its largest error relative to the largest value of the output.
    """
    rough = find_rough(bundle, form)
    return {name: error for name, error in rough.items() if name not in REQUIRED}


def check_attention(
    job: Job, component: str, allow_unfused: bool, parts: Sequence[Part] = ()
) -> bool | None:
    """Refuse a block or a layer of the text encoder whose attention is not one kernel everywhere.

    Args:
        job: What is built.
        component: Such as `block`.
        allow_unfused: Do not refuse it.
        parts: What becomes an engine each; where all of the component's are there already, with
            attention that was found to be one kernel, the library is not asked again.

    Returns:
        Whether it is one kernel, False also where it need not be; None where there is no
        attention, or where that cannot be told.

    Raises:
        EngineError: It is not one kernel.
    """
    attention = find_attention(job.bundle, component)
    if attention is None:
        return False if has_softmax(job.bundle.graph_path(component, job.precision)) else None
    if not job.library.can_check_attention:
        return None
    engines = [_find(job, part)[1] for part in parts if part.component == component]
    if engines and all(found is not None and found.fused_attention for found in engines):
        return True

    def is_fused(targets: tuple[int, ...]) -> bool:
        return has_fused_attention(job.library, attention, job.precision, targets)

    targets = job.request.targets
    if is_fused(targets):
        return True
    if not allow_unfused:
        without = tuple(target for target in targets if not is_fused((target,))) or targets
        raise EngineError(
            f"{component}: expected attention of {attention.heads} heads of {attention.head_dim} "
            f"to be one kernel in {job.precision} on {name_targets(without)}, got none. "
            "Use --dtype bf16 or fp16, or build it nevertheless with --allow-unfused."
        )
    return False


def _find(job: Job, part: Part) -> tuple[str, Sidecar | None]:
    """The hash of what an engine is made from, and the engine if it is there."""
    library, form = job.library, job.precision
    inputs = hash_inputs(job.bundle, part, form, library, job.request)
    file = engine_file(library.backend, library.version, part, form, inputs)
    return inputs, job.store.find(file, inputs)


def provide_engine(job: Job, part: Part, fused: bool | None, advance: Advance) -> Outcome:
    """Build an engine and keep it, unless one of the same inputs is there.

    Args:
        job: What is built.
        part: What the engine computes.
        fused: What `check_attention` said.
        advance: As for `build_plan`.

    Returns:
        The sidecar of the engine, and for which targets there is none.

    Raises:
        EngineError: The graph is refused.
        BuildError: It is required, and cannot be built for one of the targets.
        BundleError: The engine cannot be kept in the bundle.
    """
    form, library, request = job.precision, job.library, job.request
    inputs, found = _find(job, part)
    if found is not None:
        if found.left_out and part.component in job.required:
            raise BuildError(next(iter(found.left_out.values())))
        return Outcome(part, found, found.left_out)
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        bundle = job.bundle
        path = (
            bake_layers(bundle, part, form, Path(folder))
            if part.layers
            else bundle.graph_path(part.component, form)
        )
        plan, left_out = _build_where_possible(job, part, path, advance)
    if plan is None:
        return Outcome(part, None, left_out)
    sidecar = Sidecar(
        component=part.component,
        layers=part.layers,
        form=form,
        backend=library.backend,
        version=library.version,
        targets=tuple(target for target in request.targets if str(target) not in left_out),
        left_out=left_out,
        profiles=tuple(request.bound(graph_of(bundle, part, form))),
        graph=graph_hash(bundle, part, form),
        inputs=inputs,
        fused_attention=fused,
        attention_kernels=count_attention_kernels(plan),
        size=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        seconds=round(time.monotonic() - start, 2),
    )
    job.store.add(sidecar, plan)
    return Outcome(part, sidecar, left_out)


def _build_where_possible(
    job: Job, part: Part, path: Path, advance: Advance
) -> tuple[bytes | None, dict[str, str]]:
    """Build for all targets, or for each that can be built for; say why for the others."""
    graph, required = graph_of(job.bundle, part, job.precision), part.component in job.required

    def build(targets: tuple[int, ...]) -> bytes:
        request = replace(job.request, targets=targets)
        return build_plan(job.library, graph, path, request, advance)

    targets, left_out, plan = job.request.targets, {}, None
    try:
        return build(targets), {}
    except BuildError as error:
        if len(targets) < 2:
            if required:
                raise
            return None, {"".join(map(str, targets)): str(error)}
    for target in targets:
        try:
            plan = build((target,))
        except BuildError as error:
            if required:
                raise
            left_out[str(target)] = str(error)
    working = tuple(target for target in targets if str(target) not in left_out)
    return (build(working) if len(working) > 1 else plan), left_out
