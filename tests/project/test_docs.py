"""What the README promises is there: commands, flags, links, and lines to run."""

import importlib
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mc_export.fetch import PACKAGED
from mc_runtime import VideoPipeline

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = [PACKAGED / "README.md", ROOT / "scripts" / "train_mini" / "README.md"]
README = PAGES[0].read_text()
WORDS = set(
    re.findall(r"(?<![\w-])-{0,2}[a-z][\w-]*", "\n".join(page.read_text() for page in PAGES))
)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def load(name: str) -> click.Command:
    module, function = SCRIPTS[name].split(":")
    command: click.Command = getattr(importlib.import_module(module), function)
    return command


def flags(name: str) -> set[str]:
    """Every flag of a command and of its subcommands."""
    command = load(name)
    parts = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    return {
        flag
        for part in parts
        for parameter in part.get_params(click.Context(part))
        if isinstance(parameter, click.Option)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


LINES = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_and_its_flags_are_documented(name: str) -> None:
    assert {name, *flags(name)} - WORDS == set()


def test_the_readme_names_no_flag_that_no_command_has() -> None:
    known = set().union(*map(flags, SCRIPTS))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known == set()


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_scripts_of_the_readme_can_be_run() -> None:
    scripts = {line.split()[0] for line in LINES if line.startswith("scripts/")}
    assert scripts >= {"scripts/demo", "scripts/test"}
    assert [script for script in scripts if not os.access(ROOT / script, os.X_OK)] == []


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    export: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working folder with a checkpoint and bundles under the names that the README uses."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(tiny_bundle, tmp_path / "skyreels.bundle")
    shutil.copytree(export(PACKAGED), tmp_path / "mini.bundle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run_as_written(folder: Path) -> None:
    """An export takes most of a minute and made the bundle already: here it is a dry run."""
    commands = [shlex.split(line) for line in LINES if line.startswith("mc-")]
    assert {name for name, *_ in commands} == set(SCRIPTS)
    for name, *arguments in commands:
        if name == "mc-export":
            arguments.append("--dry-run")
        result = CliRunner().invoke(load(name), arguments)
        assert result.exit_code == 0, f"{name} {shlex.join(arguments)}: {result.output}"
        for output in (after for flag, after in pairwise(arguments) if flag == "-o"):
            assert Path(output).exists()


def test_the_python_of_the_readme_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, but for the size of the video."""
    generate = VideoPipeline.generate
    small = dict(num_frames=37, height=64, width=64, num_inference_steps=2)

    def generate_small(pipeline: VideoPipeline, *texts: Any, **settings: Any) -> Any:
        return generate(pipeline, *texts, **(settings | small))

    monkeypatch.setattr(VideoPipeline, "generate", generate_small)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "(17, 64, 64, 3)" in capsys.readouterr().out
