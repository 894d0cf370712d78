"""What is imported when: the runtime without torch, an optional library only where it is used.

Each test is a process of its own in which some libraries are absent: they cannot be imported.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

OPTIONAL = (
    *(
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "av",
        "tensorrt",
        "tensorrt_rtx",
        "psutil",
        "cuda",
    ),
    *("transformers", "diffusers", "huggingface_hub", "safetensors"),
)
WITHOUT = """
import importlib, pkgutil, sys
from importlib.metadata import entry_points

class Absent:
    asked_for = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            self.asked_for.append(name)
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Absent())
"""
RUN_COMMAND = """
(command,) = entry_points(group="console_scripts", name={name!r})
command.load()({arguments}, {name!r})
"""


def run_without(absent: Iterable[str], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(absent=[*absent]) + code
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def call(line: str, **words: object) -> str:
    """Python code that runs a command line, with words filled in."""
    name, *arguments = [word.format(**words) for word in line.split()]
    return RUN_COMMAND.format(name=name, arguments=arguments)


def test_no_module_but_the_exporters_imports_an_optional_library(tmp_path: Path) -> None:
    code = """
count = 0
for package in ("motioncache", "mc_engines", "mc_runtime"):
    folders = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(folders, package + "."):
        importlib.import_module(module.name)
        count += 1
print(count > 20, Absent.asked_for)
"""
    result = run_without(OPTIONAL, code, tmp_path)
    assert (result.stdout, result.stderr) == ("True []\n", "")


def test_the_help_of_mc_export_imports_none_either(tmp_path: Path) -> None:
    code = "import atexit\natexit.register(lambda: print(Absent.asked_for))\n"
    result = run_without(OPTIONAL, code + call("mc-export --help"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--checkpoint" in result.stdout
    assert result.stdout.endswith("\n[]\n")


GENERATE = "mc-generate {bundle} --prompt lighthouse --num-frames 37 --height 64 --width 64"


@pytest.mark.parametrize(
    ("absent", "extra", "line", "code"),
    [
        ("onnxruntime", "cpu", "mc-export --model skyreels --checkpoint x -o new.bundle", 1),
        ("torch", "export", "mc-export --model skyreels --checkpoint x -o new.bundle", 1),
        ("onnx", "export", "mc-export --model skyreels --checkpoint x -o new.bundle", 1),
        ("huggingface_hub", "export", "mc-export --model skyreels -o new.bundle", 2),
        ("onnxruntime", "cpu", GENERATE + " -o new.mp4 --save-latents new.npz", 1),
        ("av", "video", GENERATE + " -o new.mp4", 1),
        ("av", "video", GENERATE + " --video {video} --save-latents new.npz", 1),
    ],
)
def test_a_command_names_the_extra_that_it_misses(
    absent: str, extra: str, line: str, code: int, tmp_path: Path, tiny_bundle: Path
) -> None:
    command = call(line, bundle=tiny_bundle, video=__file__)
    result = run_without([absent], command, tmp_path)
    assert f"not installed. Run: pip install 'motioncache[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert (result.returncode, result.stdout) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ("mc-inspect {bundle} --verify", set()),
        (GENERATE + " --num-inference-steps 4 --save-latents new.npz", {"onnxruntime"}),
    ],
)
def test_what_a_command_does_not_need_may_be_absent(
    line: str, needed: set[str], tmp_path: Path, tiny_bundle: Path
) -> None:
    absent = set(OPTIONAL) - needed
    result = run_without(absent, call(line, bundle=tiny_bundle), tmp_path)
    assert result.returncode == 0, result.stderr
