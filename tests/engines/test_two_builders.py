"""Two commands that build into one place, and commands that are killed: what is kept is whole."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mc_engines.building.store import EngineStore
from mc_engines.bundle import Bundle
from mc_engines.verify import find_faults

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")

NAMES = ["combine", "embed"]

# Each builder waits with its first plan until the other has one as well, and then both keep it,
# slowly.
TOGETHER = """
import os, time
build = engines.build_plan

def build_plan(*arguments):
    plan = build(*arguments)
    meeting.joinpath(str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.01)
    return plan

engines.build_plan = build_plan
publish_file = bundle_files.publish_file
bundle_files.publish_file = lambda path: (time.sleep(0.2), publish_file(path))
"""
DIE = """
import os, signal
def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
"""
WHILE_IT_BUILDS = (
    DIE
    + """
build = engines.build_plan
engines.build_plan = lambda library, graph, path, request, advance: build(
    library, graph, path, request, die if "embed" in path.name else advance
)
"""
)
BEFORE_THE_MANIFEST = DIE + "bundle_additions._replace_manifest = die"
WITHIN_THE_MANIFEST = (
    DIE
    + """
replace_file = bundle_additions.replace_file
bundle_additions.replace_file = lambda path, data: (
    die() if path.name == "manifest.json" else replace_file(path, data)
)
"""
)
BEFORE_THE_SIDECAR = (
    DIE
    + """
replace_file = store.replace_file
store.replace_file = lambda path, data: (
    die() if path.suffix == ".json" else replace_file(path, data)
)
"""
)
COMMAND = """
import sys
from pathlib import Path
from mc_engines import bundle_additions, bundle_files
from mc_engines.build_cli import main
from mc_engines.building import engines, store
meeting = Path(sys.argv.pop(1))
{change}
main(sys.argv[1:])
"""


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


@pytest.fixture
def start(bundle: Path, tmp_path: Path):
    """Start mc-build in a process of its own, with a change of what it calls."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()

    def start(change: str = "", *options: object) -> subprocess.Popen[str]:
        components = [word for name in NAMES for word in ("--component", name)]
        words = [meeting, bundle, "--sm", "86", *components, *options]
        command = [sys.executable, "-c", COMMAND.format(change=change), *map(str, words)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors


def components(bundle: Path, folder: Path | None = None) -> list[str]:
    sidecars, damaged = EngineStore(Bundle.open(bundle), folder).read()
    assert damaged == []
    return [each.component for each in sidecars]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_two_builders_at_once_leave_one_engine_of_each(bundle, start, tmp_path, elsewhere) -> None:
    folder = tmp_path / "engines" if elsewhere else None
    options = ("--engines", folder) if elsewhere else ()
    both = [start(TOGETHER, *options) for _ in range(2)]
    for process in both:
        finish(process)
    assert components(bundle, folder) == NAMES
    assert find_faults(bundle) == []
    store = EngineStore(Bundle.open(bundle), folder)
    assert all(store.find(each.file, each.inputs) for each in store.read()[0])


def test_killed_while_it_builds(bundle, start) -> None:
    finish(start(WHILE_IT_BUILDS), -signal.SIGKILL)
    assert find_faults(bundle) == []
    assert components(bundle) == ["combine"]
    finish(start())
    assert components(bundle) == NAMES and find_faults(bundle) == []


@pytest.mark.parametrize("change", [BEFORE_THE_MANIFEST, WITHIN_THE_MANIFEST])
@pytest.mark.parametrize("clean", [False, True])
def test_killed_while_it_keeps_an_engine(bundle, start, change, clean) -> None:
    """Files that no manifest names are left; the next command removes or replaces them."""
    finish(start(change), -signal.SIGKILL)
    assert components(bundle) == []
    assert all("left by an addition that was interrupted" in fault for fault in find_faults(bundle))
    assert len(find_faults(bundle)) == 2
    finish(start("", "--height", "64", "--clean") if clean else start())
    assert components(bundle) == NAMES and find_faults(bundle) == []


def test_killed_between_an_engine_and_its_sidecar_in_a_folder(bundle, start, tmp_path) -> None:
    folder = tmp_path / "engines"
    finish(start(BEFORE_THE_SIDECAR, "--engines", folder), -signal.SIGKILL)
    assert len(list(folder.rglob("*.engine"))) == 1 and components(bundle, folder) == []
    finish(start("", "--engines", folder))
    assert components(bundle, folder) == NAMES
