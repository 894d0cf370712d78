"""What the README promises is there: commands, flags, links, and the lines to run."""

import importlib
import pkgutil
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PACKAGES = ("motioncache", "mc_engines", "mc_runtime", "mc_export")
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("mc-")
]


def load(name: str) -> click.Command:
    module, function = SCRIPTS[name].split(":")
    command: click.Command = getattr(importlib.import_module(module), function)
    return command


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_in_the_readme(name: str) -> None:
    flags = [
        flag
        for parameter in load(name).params
        if isinstance(parameter, click.Option)
        for flag in parameter.opts
        if flag.startswith("--")
    ]
    assert name in README
    assert [flag for flag in flags if flag not in README] == []


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_every_command_has_help_and_version(name: str, flag: str) -> None:
    assert CliRunner().invoke(load(name), [flag]).exit_code == 0


def test_relative_links_resolve() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert broken == []


def test_the_lines_of_the_readme_run_as_written(
    tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export itself is the fixture's: only its dry run is run again."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(tiny_bundle, tmp_path / "skyreels.bundle")
    monkeypatch.chdir(tmp_path)
    assert len(LINES) >= 5
    for line in LINES:
        name, *arguments = shlex.split(line)
        if name == "mc-export" and "--dry-run" not in arguments:
            arguments.append("--dry-run")
        result = CliRunner().invoke(load(name), arguments)
        assert result.exit_code == 0, f"{line}: {result.output}"


def modules() -> list[str]:
    return [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(
            importlib.import_module(package).__path__, f"{package}."
        )
    ]


@pytest.mark.parametrize("name", modules())
def test_every_public_name_exists_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if callable(value) and hasattr(value, "__module__") and value.__module__ == name:
            assert value.__doc__, f"{name}.{public}"


def test_no_file_names_a_machine() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:work|root|opt|home)/|\.\./shared|pypi\.org|://localhost")
    named = [
        name
        for name in files
        if Path(name).suffix in {".py", ".md", ".toml", ".txt", ""}
        and name != "tests/project/test_docs.py"
        and pattern.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert named == []
