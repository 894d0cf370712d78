"""Writing a bundle: aside, under a hidden name, and renamed when it is whole.

Neighbours: the exporter fills `BundleWriter.folder`; `add_files` adds to a finished bundle;
`Bundle.open` reads it.
"""

__all__ = ["BundleWriter"]

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

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
    LOCK_FILE,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    hash_file,
    hash_lines,
)

_PARTIAL, _REPLACED = "partial", "replaced"


class BundleWriter:
    """Writes one bundle; leaves nothing behind unless `finish` ran to its end.

    The files are written into `folder`, a hidden sibling of the target. A process that is killed
    leaves that sibling alone, and the next writer for the same target removes it. A sibling that
    another process is still writing is locked, and stays.

    Args:
        target: Folder of the bundle.
        overwrite: Replace the bundle that is there.
        bytes_needed: Size of the bundle, where the caller knows it.

    Attributes:
        target: Absolute path of the bundle.
        folder: Where to write the files.

    Raises:
        BundleError: The target is in the way, or cannot be written, or does not fit on the disk.
    """

    def __init__(
        self, target: str | Path, overwrite: bool = False, bytes_needed: int | None = None
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.folder = _sibling(self.target, _PARTIAL)
        self._overwrite = overwrite
        self._bytes_needed = bytes_needed
        if not self.target.parent.is_dir():
            raise BundleError(
                f"{self.target}: expected a folder to write into, got none. "
                f"Run: mkdir -p {self.target.parent}"
            )
        _remove_abandoned(self.target)
        _check_target(self.target, overwrite)
        _check_space(self.target, bytes_needed)
        try:
            self.folder.mkdir()
            self._lock = lock_folder(self.folder)
        except OSError as error:
            raise BundleError(
                f"{self.target}: expected a folder that can be written into, "
                f"got: {error.strerror}. Choose another output."
            ) from error

    def __enter__(self) -> "BundleWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if error is not None:
            full = full_disk_error(error, self.target, self._bytes_needed)
            if full is not None:
                raise full from error

    def finish(self, manifest: Manifest) -> None:
        """Hash the files, write the manifest, and give the folder its name.

        Args:
            manifest: Its `files` are replaced by what lies in the folder.

        Raises:
            BundleError: Something in the folder is a link, or the target has appeared meanwhile.
            OSError: A file cannot be read or written.
        """
        files: dict[str, FileEntry] = {}
        for path in _walk(self.folder):
            publish_file(path)
            relative = path.relative_to(self.folder).as_posix()
            if path.is_file() and relative != LOCK_FILE:
                files[relative] = FileEntry(path.stat().st_size, hash_file(path))
        replace_file(self.folder / MANIFEST_FILE, replace(manifest, files=files).to_bytes())
        replace_file(self.folder / HASH_FILE, hash_lines(hash_file(self.folder / MANIFEST_FILE)))
        try:
            self._publish()
        except OSError as error:
            raise BundleError(
                f"{self.target}: expected a name that is still free, got: {error.strerror}. "
                "Another command may have written it: choose another output, or --overwrite."
            ) from error
        sync(self.target.parent)
        self._lock.release()

    def _publish(self) -> None:
        """Rename the folder to the target; a bundle that is there moves aside first."""
        if not (self._overwrite and self.target.exists()):
            os.rename(self.folder, self.target)
            return
        _check_target(self.target, overwrite=True)
        aside = _sibling(self.target, _REPLACED)
        lock = lock_folder(self.target)
        try:
            os.rename(self.target, aside)
            try:
                os.rename(self.folder, self.target)
            except BaseException:
                with suppress(OSError):
                    os.rename(aside, self.target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            lock.release()


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}")


def _siblings(target: Path, role: str) -> list[Path]:
    return sorted(target.parent.glob(glob.escape(f".{target.name}.{role}-") + "*"))


def _remove_abandoned(target: Path) -> None:
    """Clean up after writers that were killed; put back what one of them had moved aside."""
    for folder in [*_siblings(target, _REPLACED), *_siblings(target, _PARTIAL)]:
        try:
            lock = lock_folder(folder, timeout=0)
        except (BundleError, OSError):
            continue  # its writer is alive, or it belongs to somebody else
        if f".{_REPLACED}-" in folder.name and not os.path.lexists(target):
            os.rename(folder, target)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BundleError(
            f"{target}: expected a name that is free, got one that exists. "
            "Choose another output, or --overwrite."
        )
    is_bundle = (target / MANIFEST_FILE).exists() or (target / HASH_FILE).exists()
    if target.is_symlink() or not is_bundle:
        raise BundleError(
            f"{target}: expected a bundle to overwrite, got something else. "
            "Choose another output, or remove it yourself."
        )


def _check_space(target: Path, bytes_needed: int | None) -> None:
    free = shutil.disk_usage(target.parent).free
    if bytes_needed is not None and bytes_needed > free:
        raise BundleError(
            f"{target}: expected {bytes_needed:,} free bytes, got {free:,}. "
            "Free some space or choose another disk."
        )


def _walk(folder: Path) -> Iterator[Path]:
    """Give every file and folder, content before container."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in [*files, *folders]:
            path = Path(parent) / name
            if path.is_symlink():
                raise BundleError(f"{path}: expected a regular file, got a link. Copy the file.")
        yield from (Path(parent) / name for name in files)
        yield Path(parent)
