"""What is installed: four packages, their commands, and what they need."""

import ast
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "motioncache": ROOT / "motioncache",
    "mc_engines": ROOT / "engines",
    "mc_runtime": ROOT / "runtime",
    "mc_export": ROOT / "export",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of the wheel's files, with their texts."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, str]) -> Message:
    (text,) = (wheel[name] for name in wheel if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(text)


def test_it_holds_the_four_packages_with_their_types_the_small_model_and_nothing_else(
    wheel: dict[str, str],
) -> None:
    expected = {f"{package}/py.typed" for package in PACKAGES} | {
        path.relative_to(outer).as_posix()
        for package, outer in PACKAGES.items()
        for pattern in ("*.py", "*.cu", "*.schema.json")
        for path in (outer / package).rglob(pattern)
    }
    mini = ROOT / "export" / "mc_export" / "skyreels_mini"
    expected |= {
        path.relative_to(ROOT / "export").as_posix() for path in mini.rglob("*") if path.is_file()
    }
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_it_holds_the_licence(wheel: dict[str, str], metadata: Message) -> None:
    (text,) = (wheel[name] for name in wheel if name.endswith(".dist-info/licenses/LICENSE"))
    assert text == (ROOT / "LICENSE").read_text()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_its_commands(wheel: dict[str, str]) -> None:
    entries = ConfigParser()
    entries.read_string(next(wheel[name] for name in wheel if name.endswith("entry_points.txt")))
    assert entries.sections() == ["console_scripts"]
    assert set(entries["console_scripts"]) == {
        f"mc-{verb}" for verb in ("bench", "build", "calibrate", "export", "generate", "inspect")
    }


def requirements(metadata: Message, extra: str = "") -> set[str]:
    """Names of the distributions that the core needs, or an extra besides."""
    parsed = map(Requirement, metadata.get_all("Requires-Dist", []))
    return {
        normalize(requirement.name)
        for requirement in parsed
        if (requirement.marker is None) == (not extra)
        and (requirement.marker is None or requirement.marker.evaluate({"extra": extra}))
    }


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_core_needs_neither_torch_nor_an_engine(metadata: Message) -> None:
    core = requirements(metadata)
    assert {"numpy", "click"} <= core
    heavy = {
        "torch",
        "onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt",
        "tensorrt-rtx-cu13",
        "av",
    }
    assert not heavy & core
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"cpu", "gpu", "plugin", "rtx", "trt", "export", "video", "bench"}


def syntax_trees(package: str) -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in (PACKAGES[package] / package).rglob("*.py")]


def distributions(modules: set[str]) -> set[str]:
    known = packages_distributions()
    return {normalize(known[module.partition(".")[0]][0]) for module in modules}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_is_declared(package: str, metadata: Message) -> None:
    """The exporter runs ONNX Runtime too, so it is installed with an extra more."""
    modules: set[str] = set()
    for node in (node for tree in syntax_trees(package) for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    tops = {module.partition(".")[0] for module in modules}
    foreign = tops - sys.stdlib_module_names - PACKAGES.keys()
    declared = requirements(metadata)
    if package == "mc_export":
        declared |= requirements(metadata, "export") | requirements(metadata, "cpu")
    assert distributions(foreign) - declared == set()


def test_the_extra_that_an_error_names_installs_what_is_missing(metadata: Message) -> None:
    wanted = {
        (node.args[0].value, node.args[1].value)
        for package in PACKAGES
        for tree in syntax_trees(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "require"
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[1], ast.Constant)
    }
    assert wanted >= {("onnxruntime", "cpu"), ("av", "video")}
    known = packages_distributions()
    for module, extra in wanted:
        names = set(map(normalize, known[module.partition(".")[0]]))  # several share a namespace
        assert names & requirements(metadata, extra), (module, extra)
