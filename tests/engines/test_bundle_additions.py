"""Adding to a bundle: all of it or nothing, one after the other, whenever the process dies."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from mc_engines import bundle_additions, bundle_files
from mc_engines.bundle import Bundle
from mc_engines.bundle_additions import add_files
from mc_engines.bundle_writer import BundleWriter
from mc_engines.errors import BundleError
from mc_engines.manifest import Manifest
from mc_engines.specs import ComponentSpec, GraphSpec
from mc_engines.verify import find_faults

ENGINE = "engines/rtx-1.7-sm89/block.engine"


def make_bundle(path: Path) -> Path:
    with BundleWriter(path) as writer:
        (writer.folder / "a.txt").write_text("a")
        writer.finish(Manifest("skyreels", None, "float32", (), {}, {}))
    return path


@pytest.fixture
def path(tmp_path):
    return make_bundle(tmp_path / "bundle")


def add_preset(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, presets={**manifest.presets, "fast": {"threshold": 1}})


def state(path: Path) -> dict[str, object]:
    """Every file but the lock, for comparison."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_content_and_copies_are_added_with_the_change_of_the_manifest(path, tmp_path):
    (tmp_path / "source").write_text("report")
    before = Bundle.open(path)
    add_files(path, {ENGINE: b"engine", "reports/r.json": tmp_path / "source"}, add_preset)
    bundle = Bundle.open(path)
    assert (path / ENGINE).read_bytes() == b"engine"
    assert (path / "reports/r.json").read_text() == "report"
    assert sorted(bundle.manifest.files) == ["a.txt", ENGINE, "reports/r.json"]
    assert bundle.manifest.presets == {"fast": {"threshold": 1}}
    assert bundle.hash != before.hash
    assert (path / "manifest.sha256").read_text() == f"{bundle.hash}  manifest.json\n"
    assert find_faults(path) == []


def test_the_manifest_alone_can_be_changed(path):
    add_files(path, {}, add_preset)
    assert Bundle.open(path).manifest.presets
    assert find_faults(path) == []


def test_a_change_cannot_drop_files(path):
    add_files(path, {"b.txt": b"b"}, lambda manifest: dataclasses.replace(manifest, files={}))
    assert sorted(Bundle.open(path).manifest.files) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", ["../b", "/b", "manifest.json", ".lock", "a//b"])
def test_a_path_outside_is_refused(path, name):
    before = state(path)
    with pytest.raises(ValueError, match="expected a relative path inside the bundle, got another"):
        add_files(path, {"ok": b"", name: b"x"})
    assert state(path) == before


def test_a_name_that_the_bundle_has_is_refused(path):
    before = state(path)
    with pytest.raises(BundleError, match=r"expected new names, got 'a.txt', which it has. Choose"):
        add_files(path, {"b.txt": b"b", "a.txt": b"x"})
    assert state(path) == before


def test_a_folder_that_is_a_link_is_refused(path, tmp_path):
    (tmp_path / "outside").mkdir()
    (path / "engines").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"engines: expected a folder, got a link. Do not use"):
        add_files(path, {ENGINE: b"x"})
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_damaged_bundle_is_refused(path):
    (path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match="One of the two was changed or damaged"):
        add_files(path, {"b": b""})


def test_a_folder_that_is_no_bundle_stays_as_it_is(tmp_path):
    with pytest.raises(BundleError, match=r"expected manifest.json, got a folder without it"):
        add_files(tmp_path, {"b": b""})
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_bundle_is_followed(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    add_files(tmp_path / "link", {ENGINE: b"engine"})
    assert find_faults(path) == []


def test_a_change_that_names_files_which_are_not_there_is_refused(path):
    before = state(path)

    def lie(manifest: Manifest) -> Manifest:
        block = ComponentSpec("block", {"fp32": GraphSpec("onnx/none.onnx", (), ())})
        return dataclasses.replace(manifest, components={"block": block})

    with pytest.raises(BundleError, match=r"component 'block': expected 'onnx/none.onnx' among"):
        add_files(path, {"b": b"b"}, lie)
    assert state(path) == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_error_in_the_change_takes_the_files_away_again(path, error):
    before = state(path)

    def fail(manifest: Manifest) -> Manifest:
        raise error

    with pytest.raises(type(error)):
        add_files(path, {"b": b"b"}, fail)
    assert state(path) == before


def test_a_full_disk_names_the_bytes_and_leaves_nothing(path, monkeypatch):
    before = state(path)

    def fail(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_additions, "publish_file", fail)
    with pytest.raises(BundleError, match=r"expected 1,001 free bytes, got a full disk"):
        add_files(path, {"big": bytes(1000), "small": b"x"})
    assert state(path) == before


# Interrupted


def stopped_at(call: int, stop, monkeypatch) -> None:
    """Make one of the calls that change the disk, counted together, do something else."""
    before = iter(range(1, call))
    for name in ("replace", "fsync"):
        function = getattr(os, name)

        def wrapped(*args, function=function):
            if next(before, None) is None:
                stop()
            return function(*args)

        monkeypatch.setattr(os, name, wrapped)


def test_an_error_at_any_step_leaves_the_old_bundle_or_the_new_one(tmp_path):
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    seen = []
    for call in range(1, 100):
        copy = make_bundle(tmp_path / f"copy-{call}")
        with pytest.MonkeyPatch.context() as monkeypatch:
            stopped_at(call, fail, monkeypatch)
            try:
                add_files(copy, {"b": b"b"}, add_preset)
            except OSError:
                complete = False
            else:
                complete = True
        manifest = Bundle.open(copy).manifest
        assert bool(manifest.presets) == ("b" in manifest.files)
        assert find_faults(copy) == []
        seen.append("b" in manifest.files)
        add_files(copy, {"c": b"c"})
        assert find_faults(copy) == []
        if complete:
            break
    assert complete
    assert seen == sorted(seen)  # old at first, new from the rename of the manifest on
    assert seen.count(True) > 3


def add_and_kill(path: Path, call: int) -> int:
    """Add in a process of its own, kill it at a call that changes the disk; give its code."""

    def run() -> None:
        stopped_at(call, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
        add_files(path, {ENGINE: b"engine"}, add_preset)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_kill_9_at_any_step_leaves_the_old_bundle_or_the_new_one(tmp_path):
    seen = set()
    for call in range(1, 100):
        copy = make_bundle(tmp_path / f"copy-{call}")
        code = add_and_kill(copy, call)
        bundle = Bundle.open(copy)
        added = ENGINE in bundle.manifest.files
        assert bool(bundle.manifest.presets) == added
        seen.add(added)
        if not added:  # the same addition goes through when it is tried again
            add_files(copy, {ENGINE: b"engine"}, add_preset)
            assert find_faults(copy) == []
        if code == 0:
            break
    assert code == 0
    assert call > 10
    assert seen == {False, True}


# Several at once


def test_additions_at_once_are_all_there(path):
    def add(index: int) -> None:
        add_files(
            path,
            {f"file-{index}": b"x"},
            lambda m: dataclasses.replace(m, presets={**m.presets, str(index): {}}),
        )

    threads = [threading.Thread(target=add, args=(index,)) for index in range(4)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=add, args=(index,)) for index in range(4, 8)]
    for task in [*processes, *threads]:
        task.start()
    for task in [*processes, *threads]:
        task.join()
    manifest = Bundle.open(path).manifest
    assert set(manifest.files) == {"a.txt", *(f"file-{index}" for index in range(8))}
    assert set(manifest.presets) == set("01234567")
    assert find_faults(path) == []


def test_readers_see_the_old_or_the_new_bundle_while_files_are_added(path):
    done = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                Bundle.open(path)
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(20):
        add_files(path, {f"file-{index}": b"x"})
    done.set()
    reader.join()
    assert errors == []


def test_waiting_for_another_addition_ends(path, monkeypatch):
    lock = bundle_files.lock_folder(path)
    monkeypatch.setattr(bundle_files, "LOCK_TIMEOUT_S", 0.05)
    with pytest.raises(BundleError, match=r"to be the only writer, got another that holds"):
        add_files(path, {"b": b"b"})
    lock.release()
    add_files(path, {"b": b"b"})
