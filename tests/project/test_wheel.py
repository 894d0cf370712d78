"""What is installed: four packages, three commands, and nothing else."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"motioncache", "mc_engines", "mc_runtime", "mc_export"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def read(wheel: zipfile.ZipFile, ending: str) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(ending)]
    return wheel.read(name).decode()


def test_it_holds_the_four_packages_with_their_types_and_nothing_else(
    wheel: zipfile.ZipFile,
) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_source_file_is_in_it(wheel: zipfile.ZipFile) -> None:
    sources = {
        f"{path.relative_to(ROOT / outer)}"
        for outer in ("motioncache", "engines", "runtime", "export")
        for path in (ROOT / outer).rglob("*.py")
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == sources


def test_its_commands(wheel: zipfile.ZipFile) -> None:
    lines = read(wheel, "entry_points.txt").split()
    assert [line for line in lines if line.startswith("mc-")] == [
        "mc-export",
        "mc-generate",
        "mc-inspect",
    ]


def test_the_core_needs_neither_torch_nor_an_engine(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in core if line.startswith(("torch", "onnx", "tensorrt", "av"))]
    assert any(line.startswith("numpy") for line in core)
    assert any(line.startswith("click") for line in core)
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"cpu", "gpu", "rtx", "trt", "export", "video", "bench"}
