"""Adding files to a finished bundle, so that a crash leaves it valid.

Neighbours: `BundleWriter` writes the bundle in the first place; `read_manifest` reads the pair of
manifest and hash that is replaced here.
"""

__all__ = ["add_files", "remove_files"]

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from mc_engines.bundle_files import (
    full_disk_error,
    lock_folder,
    publish_file,
    replace_file,
    sync,
)
from mc_engines.errors import BundleError
from mc_engines.manifest import (
    HASH_FILE,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    hash_file,
    hash_lines,
    is_inside,
    read_manifest,
)
from mc_engines.verify import find_file_faults


def add_files(
    bundle: str | Path,
    files: Mapping[str, Path | bytes],
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> None:
    """Add files under new names, then replace the manifest, under the lock of the bundle.

    At every instant the manifest on the disk is one whose hash is in `manifest.sha256` and whose
    files are all there: (1) the files are written, (2) `manifest.sha256` gets a second line for
    the new manifest, (3) the new manifest is renamed over the old one, (4) the first line goes.

    Args:
        bundle: The folder.
        files: What to add by its path in the bundle: a file to copy, or its content.
        change: Makes the new manifest from the one on the disk. It need not name the files: their
            sizes and hashes are entered afterwards.

    Raises:
        ValueError: A path is not inside the bundle.
        BundleError: The bundle is damaged, has a file of that name, is being written by another
            command, or the disk is full.
        OSError: A file cannot be read or written.
    """
    folder = Path(bundle)
    for path in files:
        if not is_inside(path):
            raise ValueError(f"'{path}': expected a relative path inside the bundle, got another.")
    bytes_needed = sum(map(_size, files.values()))
    read_manifest(folder)  # before the lock file is made in a folder that is no bundle
    lock = lock_folder(folder)
    try:
        _add_locked(folder, files, change)
    except Exception as error:
        full = full_disk_error(error, folder, bytes_needed)
        if full is None:
            raise
        raise full from error
    finally:
        lock.release()


def remove_files(bundle: str | Path, files: Iterable[str]) -> None:
    """Take files out of the manifest, then remove them, under the lock of the bundle.

    Meant for what can be made again, such as engines. A reader that opened the bundle before keeps
    what it has open. A crash may leave files that no manifest names.

    Args:
        bundle: The folder.
        files: Paths in the bundle; what the manifest does not have is left alone.

    Raises:
        BundleError: The bundle is damaged, or is being written by another command.
        OSError: A file cannot be removed.
    """
    folder = Path(bundle)
    read_manifest(folder)  # before the lock file is made in a folder that is no bundle
    lock = lock_folder(folder)
    try:
        old, old_hash = read_manifest(folder)
        gone = old.files.keys() & set(files)
        kept = {path: entry for path, entry in old.files.items() if path not in gone}
        _replace_manifest(folder, old_hash, replace(old, files=kept))
        for path in gone:
            (folder / path).unlink(missing_ok=True)
    finally:
        lock.release()


def _add_locked(
    folder: Path, files: Mapping[str, Path | bytes], change: Callable[[Manifest], Manifest]
) -> None:
    old, old_hash = read_manifest(folder)
    for path in files:
        if path in old.files:
            raise BundleError(
                f"{folder}: expected new names, got '{path}', which it has. Choose another name."
            )
    written: list[Path] = []
    try:
        added: dict[str, FileEntry] = {}
        for path, source in files.items():
            written.append(_make_room(folder, path))
            added[path] = _write(written[-1], source)
        new = replace(change(old), files={**old.files, **added})
        for fault in find_file_faults(folder, new, engines=False):
            raise BundleError(fault)
        _replace_manifest(folder, old_hash, new)
    except BaseException:
        if hash_file(folder / MANIFEST_FILE) == old_hash:
            for target in written:
                target.unlink(missing_ok=True)
        raise


def _replace_manifest(folder: Path, old_hash: str, new: Manifest) -> None:
    """Put a manifest in the place of another so that there is a valid one at every instant."""
    data = new.to_bytes()
    new_hash = hashlib.sha256(data).hexdigest()
    replace_file(folder / HASH_FILE, hash_lines(old_hash, new_hash))
    replace_file(folder / MANIFEST_FILE, data)
    replace_file(folder / HASH_FILE, hash_lines(new_hash))


def _make_room(folder: Path, path: str) -> Path:
    """Make the folders of a new file, and remove what an interrupted addition left in its place."""
    target = folder / path
    current = folder
    for part in path.split("/")[:-1]:
        current /= part
        if current.is_symlink():
            raise BundleError(f"{current}: expected a folder, got a link. Do not use this bundle.")
        if not current.exists():
            current.mkdir()
            publish_file(current)
            sync(current.parent)
    target.unlink(missing_ok=True)
    return target


def _write(target: Path, source: Path | bytes) -> FileEntry:
    with target.open("xb") as file:
        if isinstance(source, bytes):
            file.write(source)
        else:
            with source.open("rb") as origin:
                shutil.copyfileobj(origin, file)
    publish_file(target)
    sync(target.parent)
    return FileEntry(target.stat().st_size, hash_file(target))


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size
