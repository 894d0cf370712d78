"""Where engines are kept, and when one that is there will do.

An engine is found by what it was made from: graph, library, targets, sizes, limits. Two builds of
the same inputs give different bytes, so the bytes say nothing. Beside each engine lies a sidecar, a
JSON that says what it is. Neighbours: `provide_engine` fills the store; `add_files` keeps it where
no other folder is named.
"""

__all__ = ["EngineStore", "Sidecar", "engine_file", "hash_inputs"]

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mc_engines.building.compile import Request
from mc_engines.building.library import Library
from mc_engines.building.partition import Part, graph_hash, graph_of
from mc_engines.bundle import Bundle
from mc_engines.bundle_additions import add_files, remove_files
from mc_engines.bundle_files import lock_folder, replace_file
from mc_engines.errors import BundleError, EngineError
from mc_engines.manifest import CACHE_SUFFIX, ENGINES_FOLDER, hash_file, read_manifest

SCHEMA = "motioncache.engine/v1"
_KEY_DIGITS = 16
_SIDECAR = ".engine.json"


def engine_file(backend: str, version: str, part: Part, form: str, inputs: str) -> str:
    """Say where an engine of these inputs lies, in a bundle or a folder of engines.

    Args:
        backend: That runs it.
        version: Of the library.
        part: What it computes.
        form: Precision of its graph.
        inputs: Of `hash_inputs`.

    Returns:
        A relative path.
    """
    name = f"{part.name}.{form}.{inputs[:_KEY_DIGITS]}.engine"
    return f"{ENGINES_FOLDER}/{backend}-{version}/{name}"


@dataclass(frozen=True)
class Sidecar:
    """What an engine is.

    Attributes:
        component: Such as `block`.
        layers: Whose weights are inside; empty: weights are inputs, or in the component's graph.
        form: Precision of its graph.
        backend: That runs it.
        version: Of the library, which has to be this one.
        targets: Compute capabilities that it is for, as 86 for 8.6.
        left_out: By compute capability that was asked for as well, why it is not for that.
        profiles: By input, the smallest, usual and largest shape; one mapping per profile.
        graph: Hash of its graph, and of the weights that are inside.
        inputs: Hash of everything it was made from.
        fused_attention: Whether its attention is one kernel on all targets, False also where it
            need not be; None where it has none, or where that cannot be told.
        size: Bytes.
        sha256: Of the engine.
        seconds: That the build took.
        attention_kernels: Kernels that were found in it which compute attention whole; None where
            none were seen, which says nothing.
    """

    component: str
    layers: tuple[int, ...]
    form: str
    backend: str
    version: str
    targets: tuple[int, ...]
    left_out: dict[str, str]
    profiles: tuple[dict[str, Any], ...]
    graph: str
    inputs: str
    fused_attention: bool | None
    size: int
    sha256: str
    seconds: float
    attention_kernels: int | None = None

    @property
    def part(self) -> Part:
        """What it computes."""
        return Part(self.component, self.layers)

    @property
    def file(self) -> str:
        """Path of the engine in a bundle or a folder of engines."""
        return engine_file(self.backend, self.version, self.part, self.form, self.inputs)

    def to_bytes(self) -> bytes:
        """The sidecar as it stands in its file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, path: str, data: bytes) -> "Sidecar":
        """Read a sidecar.

        Args:
            path: For messages.
            data: Content of the file.

        Returns:
            The sidecar.

        Raises:
            EngineError: It is none, or of another version.
        """
        try:
            value = json.loads(data)
            known = {SCHEMA: value}[value["schema"]]
            typed = {
                "layers": tuple(map(int, known["layers"])),
                "targets": tuple(map(int, known["targets"])),
                "profiles": tuple(map(dict, known["profiles"])),
                "left_out": dict(known["left_out"]),
            }
            return cls(**{entry.name: known[entry.name] for entry in fields(cls)} | typed)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{path}: expected the sidecar of an engine, got {error}. Run mc-build --clean."
            ) from error


def hash_inputs(bundle: Bundle, part: Part, form: str, library: Library, request: Request) -> str:
    """Hash everything that an engine is made from.

    Args:
        bundle: Of the graph.
        part: What it computes.
        form: Precision of its graph.
        library: That builds.
        request: Targets, sizes and limits.

    Returns:
        sha256, hexadecimal.
    """
    parts = {
        "graph": graph_hash(bundle, part, form),
        "library": [library.backend, library.version],
        "targets": request.targets,
        "profiles": request.bound(graph_of(bundle, part, form)),
        "workspace": request.workspace,
        "flags": library.builder_flags,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EngineStore:
    """Engines in the bundle, or in a folder of their own.

    Attributes:
        bundle: Whose engines they are.
        folder: Another place, for a bundle that is read-only; None: the bundle.
    """

    bundle: Bundle
    folder: Path | None = None

    @property
    def root(self) -> Path:
        """The folder that the paths of engines are relative to."""
        return self.folder or self.bundle.path

    def read(self) -> tuple[list[Sidecar], list[str]]:
        """Read all sidecars, and name those that are damaged; raises BundleError as `find` does."""
        sidecars, damaged = [], []
        for name in sorted(self._names()):
            try:
                sidecars.append(self._read(name))
            except EngineError:
                damaged.append(name)
        return sidecars, damaged

    def _names(self) -> set[str]:
        """Paths of the sidecars that are there; in a bundle, those that the manifest names."""
        if self.folder is None:
            files = read_manifest(self.root)[0].files
            return {
                name
                for name in files
                if name.startswith(ENGINES_FOLDER) and name.endswith(_SIDECAR)
            }
        found = (self.root / ENGINES_FOLDER).glob(f"*/*{_SIDECAR}")
        return {path.relative_to(self.root).as_posix() for path in found}

    def _read(self, name: str) -> Sidecar:
        path = self.root / name
        data = path.read_bytes() if path.is_file() else b""
        return Sidecar.from_bytes(str(path), data)

    def find(self, file: str, inputs: str) -> Sidecar | None:
        """Return the engine of that `engine_file` if it is there, of these inputs, and sound."""
        if f"{file}.json" not in self._names():
            return None
        try:
            sidecar = self._read(f"{file}.json")
        except EngineError:
            return None  # it is built again, and replaced
        if sidecar.inputs != inputs or not self.is_whole(sidecar):
            return None
        return sidecar if hash_file(self.path(sidecar)) == sidecar.sha256 else None

    def path(self, sidecar: Sidecar) -> Path:
        """Return where an engine lies."""
        return self.root / sidecar.file

    def is_whole(self, sidecar: Sidecar) -> bool:
        """Say whether an engine has the size that it was written with."""
        path = self.path(sidecar)
        return path.is_file() and path.stat().st_size == sidecar.size

    def add(self, sidecar: Sidecar, plan: bytes) -> None:
        """Keep an engine; a crash leaves it out, or in, with its sidecar.

        Where another command has kept one of the same inputs meanwhile, that one stays.

        Raises:
            BundleError: The bundle cannot be added to, or another command writes all the time.
            OSError: The folder cannot be written.
        """
        files = {sidecar.file: plan, f"{sidecar.file}.json": sidecar.to_bytes()}
        if self.folder is None:
            self._add_to_bundle(sidecar, files)
            return
        self.path(sidecar).parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.find(sidecar.file, sidecar.inputs) is None:
                for name, data in files.items():
                    replace_file(self.root / name, data)

    def _add_to_bundle(self, sidecar: Sidecar, files: dict[str, bytes]) -> None:
        if f"{sidecar.file}.json" in self._names():
            if self.find(sidecar.file, sidecar.inputs) is not None:
                return
            remove_files(self.root, files)  # what is there is damaged
        try:
            add_files(self.root, files)
        except BundleError:
            if self.find(sidecar.file, sidecar.inputs) is None:
                raise

    def clean(self, wanted: set[str]) -> tuple[list[str], list[str]]:
        """Remove all engines but those wanted, and what is left of damaged ones.

        Args:
            wanted: Paths of engines, as `Sidecar.file` has them.

        Returns:
            The paths of the engines that were removed, and those of damaged sidecars, of engines
            without a sidecar and of files that an interrupted command left.

        Raises:
            BundleError: The bundle is damaged or being written by another command.
            OSError: A file cannot be removed.
        """
        sidecars, damaged = self.read()
        others = [each.file for each in sidecars if each.file not in wanted]
        gone = [file + end for file in others for end in ("", ".json")]
        gone += [name.removesuffix(".json") for name in damaged] + damaged
        if self.folder is None:
            remove_files(self.root, gone)
        else:
            with self._locked():
                for name in gone:
                    (self.root / name).unlink(missing_ok=True)
        return others, damaged + self._remove_strays()

    def _remove_strays(self) -> list[str]:
        """Remove what a killed command left: engines without a sidecar, files half written."""
        if not (self.root / ENGINES_FOLDER).is_dir():
            return []
        with self._locked():
            known = self._names()
            known |= {name.removesuffix(".json") for name in known}
            strays = [
                path
                for ending in ("*.engine", f"*{_SIDECAR}", ".*.new")
                for path in sorted((self.root / ENGINES_FOLDER).glob(f"*/{ending}"))
                if path.relative_to(self.root).as_posix() not in known
            ]
            for path in strays:
                path.unlink()
            # What a library compiled for an engine that is gone is no fault, and is not named.
            for path in (self.root / ENGINES_FOLDER).glob(f"*/*{CACHE_SUFFIX}"):
                if _engine_of_cache(path.relative_to(self.root).as_posix()) not in known:
                    path.unlink()
        return [path.relative_to(self.root).as_posix() for path in strays]

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Be the only one who changes engines: in the bundle, or in the folder."""
        lock = lock_folder(self.root if self.folder is None else self.root / ENGINES_FOLDER)
        try:
            yield
        finally:
            lock.release()


def _engine_of_cache(name: str) -> str:
    """The engine that `X.engine.sm86.cache` lies beside."""
    return name[: name.rfind(".engine") + len(".engine")]
