"""A bundle appears whole or not at all, whatever happens to the process that writes it."""

import errno
import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from mc_engines import bundle_files
from mc_engines.bundle import Bundle
from mc_engines.bundle_writer import BundleWriter
from mc_engines.errors import BundleError
from mc_engines.manifest import Manifest
from mc_engines.verify import find_faults


def a_manifest(family: str = "skyreels") -> Manifest:
    return Manifest(family, None, "float32", (), {}, {})


def write(target: Path, family: str = "skyreels", **options: object) -> None:
    with BundleWriter(target, **options) as writer:
        (writer.folder / "onnx").mkdir()
        (writer.folder / "onnx" / "a.onnx").write_text(family)
        writer.finish(a_manifest(family))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def family(target: Path) -> str:
    bundle = Bundle.open(target)
    assert (target / "onnx" / "a.onnx").read_text() == bundle.manifest.family
    return bundle.manifest.family


def test_a_finished_bundle_is_alone_and_sound(tmp_path):
    write(tmp_path / "bundle")
    assert names(tmp_path) == ["bundle"]
    assert find_faults(tmp_path / "bundle") == []


def test_files_are_readable_by_others_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write(tmp_path / "bundle")
    finally:
        os.umask(before)
    for path in [tmp_path / "bundle", *(tmp_path / "bundle").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_a_relative_target_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with BundleWriter("bundle") as writer:
        (tmp_path / "other").mkdir()
        os.chdir("other")
        writer.finish(a_manifest())
    assert names(tmp_path) == ["bundle", "other"]


# Found before the work starts


@pytest.mark.parametrize("kind", ["folder", "bundle", "file", "link"])
def test_a_target_that_exists_is_refused_before_anything_is_written(tmp_path, kind):
    target = tmp_path / "bundle"
    make = {"folder": target.mkdir, "bundle": lambda: write(target), "file": target.touch,
            "link": lambda: target.symlink_to("nowhere")}  # fmt: skip
    make[kind]()
    with pytest.raises(BundleError, match=r"a name that is free, got one that exists. Choose an"):
        BundleWriter(target)
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_only_a_bundle_is_overwritten(tmp_path, kind):
    target = tmp_path / "photos"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("precious")
    else:
        write(tmp_path / "real")
        target.symlink_to("real")
    before = names(tmp_path)
    with pytest.raises(BundleError, match=r"a bundle to overwrite, got something else. Choose"):
        BundleWriter(target, overwrite=True)
    assert names(tmp_path) == before


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(BundleError, match=f"got none. Run: mkdir -p {tmp_path}/no"):
        BundleWriter(tmp_path / "no" / "bundle")


def test_a_parent_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def deny(self: Path, *args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", deny)  # root may write everywhere
    with pytest.raises(BundleError, match=r"can be written into, got: Permission denied. Choose"):
        BundleWriter(tmp_path / "bundle")


def test_a_bundle_that_will_not_fit_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"1,000,000,000,000,000 free bytes, got [\d,]+\."):
        BundleWriter(tmp_path / "bundle", bytes_needed=10**15)
    assert names(tmp_path) == []


# Interrupted


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(type(error)), BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "big").write_bytes(bytes(1000))
        raise error
    assert names(tmp_path) == []


def test_leaving_without_finish_leaves_nothing_behind(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "big").write_bytes(bytes(1000))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_path_and_the_bytes_and_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(BundleError, match=r"expected 2,000 free bytes, got a full disk. Free"),
        BundleWriter(tmp_path / "bundle", bytes_needed=2000) as writer,
    ):
        (writer.folder / "big").write_bytes(bytes(1000))
        raise error
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_while_the_manifest_is_written(tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_files, "publish_file", fail)
    with pytest.raises(BundleError, match="expected enough free space, got a full disk"):
        write(tmp_path / "bundle")
    assert names(tmp_path) == []


def export_and_kill(target: Path, call: int) -> int:
    """Export in a process of its own, kill it at a call that changes the disk; give its code."""

    def run() -> None:
        calls = iter(range(1, call))

        def kill_at(function):
            def wrapped(*args, **kwargs):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        for name in ("rename", "replace", "fsync"):
            setattr(os, name, kill_at(getattr(os, name)))
        write(target, "new", overwrite=True)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_kill_9_leaves_no_folder_that_looks_whole_and_the_next_export_cleans_up(tmp_path):
    target = tmp_path / "bundle"
    call, codes = 0, [-signal.SIGKILL]
    while codes[-1] == -signal.SIGKILL:
        call += 1
        codes.append(export_and_kill(target, call))
        if codes[-1] == -signal.SIGKILL and names(tmp_path) != ["bundle"]:
            assert [name[:16] for name in names(tmp_path)] == [".bundle.partial-"]
            with pytest.raises(BundleError, match="got nothing at this path"):
                Bundle.open(target)
    assert codes[-1] == 0
    assert call > 5
    assert names(tmp_path) == ["bundle"]
    assert family(target) == "new"


def test_kill_9_while_overwriting_keeps_the_old_bundle_or_has_the_new_one(tmp_path):
    for call in range(1, 100):
        target = tmp_path / str(call) / "bundle"
        target.parent.mkdir()
        write(target, "old")
        code = export_and_kill(target, call)
        if code == 0:
            break
        if not target.exists():  # between the two renames: the next writer puts it back
            with pytest.raises(BundleError, match="a name that is free, got one that exists"):
                BundleWriter(target)
        assert family(target) in ("old", "new")
        write(target, "newest", overwrite=True)
        assert family(target) == "newest"
        assert names(target.parent) == ["bundle"]
    assert code == 0
    assert names(target.parent) == ["bundle"]


def test_overwriting_that_fails_at_the_last_rename_keeps_the_old_bundle(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    write(target, "old")
    rename = os.rename

    def fail(source: Path, destination: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(BundleError, match=r"a name that is still free, got: Input/output error."):
        write(target, "new", overwrite=True)
    assert names(tmp_path) == ["bundle"]
    assert family(target) == "old"


# Two at once


def test_a_writer_leaves_the_folder_of_a_living_one_alone(tmp_path):
    with BundleWriter(tmp_path / "bundle") as first:
        (first.folder / "file").write_text("x")
        with BundleWriter(tmp_path / "bundle") as second:
            assert first.folder.is_dir()
            second.finish(a_manifest("second"))
        with pytest.raises(BundleError, match=r"still free, got: .*another output, or --over"):
            first.finish(a_manifest("first"))
    assert names(tmp_path) == ["bundle"]
    assert Bundle.open(tmp_path / "bundle").manifest.family == "second"


def test_two_writers_at_once_make_one_bundle(tmp_path):
    target = tmp_path / "bundle"
    barrier = threading.Barrier(2)
    errors: list[BundleError] = []

    def run(name: str) -> None:
        with BundleWriter(target) as writer:
            (writer.folder / "onnx").mkdir()
            (writer.folder / "onnx" / "a.onnx").write_text(name)
            barrier.wait()
            try:
                writer.finish(a_manifest(name))
            except BundleError as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert family(target) in ("one", "two")
    assert names(tmp_path) == ["bundle"]


def test_two_that_overwrite_follow_each_other(tmp_path):
    target = tmp_path / "bundle"
    write(target, "old")
    with BundleWriter(target, overwrite=True) as first:
        (first.folder / "onnx").mkdir()
        (first.folder / "onnx" / "a.onnx").write_text("first")
        write(target, "second", overwrite=True)
        assert family(target) == "second"
        first.finish(a_manifest("first"))
    assert family(target) == "first"
    assert names(tmp_path) == ["bundle"]


def test_a_bundle_that_is_being_added_to_is_not_overwritten(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    write(target, "old")
    lock = bundle_files.lock_folder(target)
    monkeypatch.setattr(bundle_files, "LOCK_TIMEOUT_S", 0.05)
    with pytest.raises(BundleError, match=r"only writer, got another that holds .lock. Wait until"):
        write(target, "new", overwrite=True)
    lock.release()
    assert family(target) == "old"
    assert names(tmp_path) == ["bundle"]


def test_names_with_the_signs_of_patterns_are_cleaned_up_alone(tmp_path):
    for name in ("[ab]", "a"):
        (tmp_path / f".{name}.partial-1-x").mkdir()
    write(tmp_path / "[ab]")
    assert names(tmp_path) == [".a.partial-1-x", "[ab]"]


def test_links_are_refused(tmp_path):
    with (
        pytest.raises(BundleError, match=r"a regular file, got a link. Copy the file"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        (writer.folder / "link").symlink_to("/etc")
        writer.finish(a_manifest())
    assert names(tmp_path) == []
