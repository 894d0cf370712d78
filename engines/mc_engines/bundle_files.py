"""Writing files so that a crash at any instant leaves either the old or the new state.

Neighbours: `BundleWriter`, `add_files` and `EngineStore`, which are the only users.
"""

__all__ = [
    "LOCK_TIMEOUT_S",
    "full_disk_error",
    "lock_folder",
    "publish_file",
    "replace_file",
    "sync",
]

import errno
import os
from pathlib import Path

from filelock import FileLock, Timeout

from mc_engines.errors import BundleError
from mc_engines.manifest import LOCK_FILE

LOCK_TIMEOUT_S = 600.0
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644


def lock_folder(folder: Path, timeout: float | None = None) -> FileLock:
    """Take the lock that whoever writes into a folder holds; the kernel drops it with the process.

    Args:
        folder: A bundle, or one that is being written.
        timeout: Seconds to wait; `LOCK_TIMEOUT_S` where it is None.

    Returns:
        The lock, to be released by the caller. It follows the folder when that is renamed.

    Raises:
        BundleError: Another process or thread held it all the time.
        OSError: The folder cannot be written into.
    """
    lock = FileLock(folder / LOCK_FILE, mode=_FILE_MODE, thread_local=False)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S if timeout is None else timeout)
    except Timeout as error:
        raise BundleError(
            f"{folder}: expected to be the only writer, got another that holds {LOCK_FILE}. "
            "Wait until that command has finished."
        ) from error
    return lock


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: They cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_file(path: Path) -> None:
    """Make a file or folder readable by everybody, whatever the umask, and wait for the disk.

    Raises:
        OSError: It cannot be changed or written.
    """
    path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)
    sync(path)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside the old one and rename it over that.

    Raises:
        OSError: It cannot be written; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(data)
        publish_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def full_disk_error(
    error: BaseException, path: Path, bytes_needed: int | None = None
) -> BundleError | None:
    """Recognise a full disk and say so in words that help.

    Args:
        error: What was raised while writing.
        path: What was being written.
        bytes_needed: The size it would have, where that is known.

    Returns:
        The error to raise instead, or None if the disk is not what failed.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and torch raise errors of their own, with the system's words in the text.
    if not full and os.strerror(errno.ENOSPC) not in str(error):
        return None
    needed = "enough free space" if bytes_needed is None else f"{bytes_needed:,} free bytes"
    return BundleError(
        f"{path}: expected {needed}, got a full disk. "
        "Free some space or choose another disk; nothing of it was left behind."
    )
