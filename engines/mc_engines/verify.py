"""What is wrong with a bundle: its files against its manifest.

Neighbours: `Bundle.open` refuses a bundle for the first fault that is found without reading the
files; `mc-inspect --verify` lists all there are.
"""

__all__ = ["find_faults", "find_file_faults"]

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mc_engines.errors import BundleError
from mc_engines.manifest import (
    CACHE_SUFFIX,
    ENGINES_FOLDER,
    HASH_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    hash_file,
    is_inside,
    read_manifest,
)

_AGAIN = "Copy the bundle again, or export it again."
_BUILD = "Run mc-build again."


def find_faults(folder: Path) -> list[str]:
    """Check everything that can be checked about a bundle, the content of every file included.

    Args:
        folder: The bundle.

    Returns:
        One message per fault; none for a sound bundle. If the manifest cannot be trusted, that
        alone: nothing else can be compared with it.

    Raises:
        OSError: A file cannot be read.
    """
    try:
        manifest, _ = read_manifest(folder)
    except BundleError as error:
        return [str(error)]
    faults = list(find_file_faults(folder, manifest))
    for path, entry in sorted(manifest.files.items()):
        if _find_fault(folder, path, entry) is None:
            got = hash_file(folder / path)
            if got != entry.sha256:
                again = _BUILD if _is_engine(path) else _AGAIN
                faults.append(
                    f"{folder}: {path}: expected sha256 {entry.sha256}, got {got}. {again}"
                )
    return faults + list(_find_folder_faults(folder, manifest))


def find_file_faults(folder: Path, manifest: Manifest, engines: bool = True) -> Iterator[str]:
    """Check, without reading them, that the files a manifest names are there and are whole.

    Args:
        folder: The bundle.
        manifest: Of this bundle.
        engines: Whether an engine that is missing or not whole is a fault. It is none for who opens
            the bundle: there is a run without it, and mc-build, which makes it again, opens it too.

    Yields:
        A message for every path that leads outside, every link, every file that is missing or of
        another size, and every file of a component that the list of files does not have.
    """
    for path, entry in sorted(manifest.files.items()):
        fault = _find_fault(folder, path, entry)
        if fault is not None and (engines or fault.is_unsafe or not _is_engine(path)):
            yield f"{folder}: {path}: {fault.text}"
    for name, component in manifest.components.items():
        used = [*(graph.file for graph in component.graphs.values()), *component.weight_files]
        for path in dict.fromkeys(used):
            if path not in manifest.files:
                yield (
                    f"{folder}: component '{name}': expected '{path}' among the manifest's files, "
                    "got no such entry. Export the bundle again."
                )


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a file; unsafe: it is not to be touched, rather than made again."""

    text: str
    is_unsafe: bool = False


def _is_engine(path: str) -> bool:
    return path.startswith(f"{ENGINES_FOLDER}/")


def _find_fault(folder: Path, path: str, entry: FileEntry) -> _Fault | None:
    if not is_inside(path):
        text = "expected a path inside the bundle, got one that is not. Do not use this bundle."
        return _Fault(text, True)
    again = _BUILD if _is_engine(path) else _AGAIN
    current = folder
    for part in path.split("/"):
        current /= part
        try:
            status = current.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return _Fault(f"expected {entry.size} bytes, got no file. {again}")
        if stat.S_ISLNK(status.st_mode):
            text = f"expected a regular file, got a link ({current}). Put the file itself here."
            return _Fault(text, True)
    if not stat.S_ISREG(status.st_mode):
        return _Fault(f"expected a regular file, got something else. {again}", True)
    if status.st_size != entry.size:
        return _Fault(f"expected {entry.size} bytes, got {status.st_size}. {again}")
    return None


def _find_folder_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Walk the folder for what the manifest does not name, and what others cannot read."""
    known = {*manifest.files, MANIFEST_FILE, HASH_FILE}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from _find_mode_faults(Path(parent), 0o555, "folder")
        for name in sorted(files) + [
            name for name in folders if (Path(parent) / name).is_symlink()
        ]:
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                if relative not in known:
                    yield f"{folder}: {relative}: expected no links, got one. Delete it."
            elif relative in known:
                yield from _find_mode_faults(path, 0o444, "file")
            elif not _is_of_the_machine(relative, status.st_size):
                yield (
                    f"{folder}: {relative}: expected only files of the manifest, got another. "
                    "Delete it: it is foreign, or left by an addition that was interrupted."
                )


def _is_of_the_machine(relative: str, size: int) -> bool:
    """Whether a file may be there unnamed: the empty lock, and what a GPU's library compiled."""
    cache = _is_engine(relative) and relative.endswith(CACHE_SUFFIX)
    return cache or (relative == LOCK_FILE and not size)


def _find_mode_faults(path: Path, needed: int, kind: str) -> Iterator[str]:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & needed != needed:
        yield (
            f"{path}: expected a {kind} that other users can read, got mode {mode:04o}. "
            f"Run: chmod a+r{'x' if kind == 'folder' else ''} {path}"
        )
