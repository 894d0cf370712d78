"""Which of the engines that are there can run here; if none, what is different, and the way out.

An engine runs on the version of the library that made it, on the GPUs that it was made for, up to
the sizes that it was made for, and stands for the graph that it was made of.

Neighbours: `EngineStore` keeps engines, `mc-build` makes them.
"""

__all__ = [
    "Hindrance",
    "Place",
    "check_form",
    "choose_engine",
    "find_hindrance",
    "list_built",
    "read_plan",
    "usual_form",
]

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mc_engines.building.bounds import (
    Shape,
    VideoLimits,
    bound_symbols,
    bucket_symbols,
    fits,
)
from mc_engines.building.compile import Request, name_targets
from mc_engines.building.engines import find_unfit
from mc_engines.building.library import Backend
from mc_engines.building.partition import Part, graph_hash, graph_of
from mc_engines.building.store import EngineStore, Sidecar
from mc_engines.errors import EngineError
from mc_engines.specs import Precision

_FIRST_WITH_BF16 = 80  # compute capability
_Test = tuple[Callable[[Sidecar], bool], Callable[[Sidecar], str]]


@dataclass(frozen=True)
class Place:
    """Where engines are to run, and for what.

    Attributes:
        backend: That runs them.
        version: Of the library that is installed.
        capability: Compute capability of the GPU, as 86 for 8.6.
        form: Precision of the graphs.
        limits: The largest video.
    """

    backend: Backend
    version: str
    capability: int
    form: Precision
    limits: VideoLimits

    @property
    def name(self) -> str:
        """The place in words."""
        return f"{self.backend} {self.version} for {name_targets((self.capability,))}"

    def build_command(self, store: EngineStore, component: str | None = None) -> str:
        """Return the command that makes the engines that run here.

        Args:
            store: Where they are to be kept.
            component: That must be among them: one that is too rough in this precision is built
                where it is named alone.

        Returns:
            One line for a shell.
        """
        options: dict[str, object] = {"backend": self.backend}
        if self.backend == "tensorrt-rtx":  # TensorRT builds for the GPU that is there
            options["sm"] = self.capability
        options |= {
            "dtype": self.form if _has_form(self.capability, self.form) else "fp16",
            "height": self.limits.height,
            "width": self.limits.width,
            "max-frames": self.limits.max_frames,
            "causal-block-size": self.limits.chunk_frames,
        }
        if component in find_unfit(store.bundle, self.form):
            options["component"] = component
        if store.folder is not None:
            options["engines"] = store.folder
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        unfused = ["--allow-unfused"] if self.form == "fp32" else []  # no library fuses it there
        return shlex.join(["mc-build", str(store.bundle.path), *words, *unfused])


def usual_form(capability: int) -> Precision:
    """Return the precision of engines on a GPU where none is asked for.

    Args:
        capability: Compute capability, as 86 for 8.6.
    """
    return "bf16" if _has_form(capability, "bf16") else "fp16"


def _has_form(capability: int, form: Precision) -> bool:
    return form != "bf16" or capability >= _FIRST_WITH_BF16


def check_form(form: Precision, capability: int) -> None:
    """Refuse bf16 on a GPU that has none.

    Args:
        form: That engines are to have.
        capability: Compute capability, as 86 for 8.6.

    Raises:
        ValueError: The GPU has no such type.
    """
    if not _has_form(capability, form):
        raise ValueError(
            f"dtype: expected one that SM{capability} has, got bf16. Pass --dtype fp16 for it."
        )


def choose_engine(store: EngineStore, part: Part, place: Place) -> Sidecar:
    """Find the engine of a part that can run here; of several, the one for the smallest sizes.

    Args:
        store: Has the engines.
        part: What the engine computes.
        place: Where it is to run.

    Returns:
        Its sidecar; the bytes come from `read_plan`.

    Raises:
        EngineError: None can run here: says what is different, and which command makes one.
        BundleError: The bundle is damaged, or lacks the graph.
        ValueError: The sizes are none of a video.
    """
    found = [each for each in store.read()[0] if (each.part, each.form) == (part, place.form)]
    for is_met, tell in _list_tests(store, part, place):
        left = [each for each in found if is_met(each)]
        if not left:
            _say_if_left_out(part, place, found)
            _refuse(store, part, place, tell(max(found, key=_volume)) if found else "none")
        found = left
    return min(found, key=_volume)


def list_built(store: EngineStore, place: Place) -> set[str]:
    """Name the components that have an engine of this library for this GPU.

    Its sizes may be too small, or its graph another: that can be mended by building it again. What
    was left out for this GPU cannot, and is not named.

    Args:
        store: Has the engines.
        place: Where they are to run.

    Returns:
        The components.
    """
    return {
        each.component
        for each in store.read()[0]
        if (each.backend, each.version, each.form) == (place.backend, place.version, place.form)
        and place.capability in each.targets
        and not each.layers
    }


@dataclass(frozen=True)
class Hindrance:
    """Why an engine cannot run at a place.

    Attributes:
        text: What it is, such as `one for SM89`.
        is_final: No build can help.
    """

    text: str
    is_final: bool = False


def find_hindrance(store: EngineStore, sidecar: Sidecar, place: Place) -> Hindrance | None:
    """Hold one engine against what `choose_engine` asks for.

    Args:
        store: Has it.
        sidecar: Of the engine.
        place: Where it is to run; its precision has to be that of the engine.

    Returns:
        What is met first that is not as it should be; None where the engine can run.

    Raises:
        BundleError: The bundle lacks its graph.
        ValueError: The sizes are none of a video.
    """
    reason = sidecar.left_out.get(str(place.capability))
    for is_met, tell in _list_tests(store, sidecar.part, place):
        if not is_met(sidecar):
            if reason is not None and sidecar.version == place.version:
                return Hindrance(f"it cannot be built for this GPU: {reason}", True)
            return Hindrance(tell(sidecar))
    return None


def _list_tests(store: EngineStore, part: Part, place: Place) -> list[_Test]:
    """Tell what an engine has to be, and what is said of one that is not."""
    # In the order in which an engine could be nearer to what is needed: what differs first is told.
    passes, expected = _list_passes(store, part, place), graph_hash(store.bundle, part, place.form)
    return [
        (lambda each: each.backend == place.backend, lambda each: f"one of {each.backend}"),
        (lambda each: each.version == place.version, lambda each: f"one of version {each.version}"),
        (
            lambda each: place.capability in each.targets,
            lambda each: f"one for {name_targets(each.targets)}",
        ),
        (lambda each: each.graph == expected, lambda each: "one of another graph"),
        (lambda each: _covers(each, passes), lambda each: _tell_sizes(each, passes)),
        (store.is_whole, lambda each: f"a file that has not its {each.size:,} bytes"),
    ]


def read_plan(store: EngineStore, sidecar: Sidecar, place: Place) -> bytes:
    """Read an engine and hold it against its hash.

    Args:
        store: Has it.
        sidecar: Of `choose_engine`.
        place: Where it is to run.

    Returns:
        What the library serialized.

    Raises:
        EngineError: It is damaged: says which command makes it again.
        OSError: It cannot be read.
    """
    plan = store.path(sidecar).read_bytes()
    if hashlib.sha256(plan).hexdigest() != sidecar.sha256:
        _refuse(store, sidecar.part, place, f"other content in {store.path(sidecar)}")
    return plan


def _refuse(store: EngineStore, part: Part, place: Place, got: str) -> NoReturn:
    raise EngineError(
        f"{part.name}.{place.form}: expected an engine of {place.name}, got {got}. "
        f"Run: {place.build_command(store, part.component)}"
    )


def _say_if_left_out(part: Part, place: Place, sidecars: list[Sidecar]) -> None:
    """Send no one to build what has been tried."""
    for sidecar in sidecars:
        reason = sidecar.left_out.get(str(place.capability))
        if reason is not None and sidecar.version == place.version:
            raise EngineError(
                f"{part.name}.{place.form}: expected an engine of {place.name}, got none, as it "
                f"cannot be built: {reason} Run it with ONNX Runtime."
            )


def _list_passes(store: EngineStore, part: Part, place: Place) -> list[dict[str, Shape]]:
    """The largest shapes of inputs for all tokens of a chunk, and for every bucket of them."""
    config = store.bundle.manifest.config
    symbols = bound_symbols(config, place.limits)
    shares = sorted({1.0, *config["transformer"]["token_buckets"]}, reverse=True)
    request = Request((), [bucket_symbols(symbols, share) for share in shares])
    bounds = request.bound(graph_of(store.bundle, part, place.form))
    return [{name: most for name, (_, _, most) in shapes.items()} for shapes in bounds]


def _covers(sidecar: Sidecar, passes: Sequence[Mapping[str, Shape]]) -> bool:
    """Say whether every pass has a profile that takes all its inputs."""
    return all(
        any(_takes_all(profile, shapes) for profile in sidecar.profiles) for shapes in passes
    )


def _takes_all(profile: Mapping[str, Any], shapes: Mapping[str, Shape]) -> bool:
    return all(_takes(profile, name, shape) for name, shape in shapes.items())


def _takes(profile: Mapping[str, Any], name: str, shape: Shape) -> bool:
    least, _, most = profile[name]
    return fits(shape, least, most)


def _tell_sizes(sidecar: Sidecar, passes: Sequence[Mapping[str, Shape]]) -> str:
    """Name the first input that no profile takes, and the nearest profile."""
    for shapes in passes:
        for name, shape in shapes.items():
            bounds = [profile[name] for profile in sidecar.profiles]
            if not any(fits(shape, least, most) for least, _, most in bounds):
                larger = [each for each in bounds if _most(each) >= list(shape)]
                least, _, most = min(larger, default=max(bounds, key=_most), key=_most)
                return (
                    f"one that takes '{name}' from {tuple(least)} up to {tuple(most)}, not {shape}"
                )
    return "one whose profiles take no pass at its largest"


def _most(bounds: Sequence[Sequence[int]]) -> list[int]:
    return list(bounds[2])


def _volume(sidecar: Sidecar) -> tuple[int, str]:
    """Order engines by the sizes that they are for."""
    volumes = [
        sum(math.prod(most) for _, _, most in profile.values()) for profile in sidecar.profiles
    ]
    return max(volumes), sidecar.file
