"""What may import what, seen from outside: the runtime works where torch is not installed."""

import subprocess
import sys

import pytest

BLOCKER = """
import importlib, pkgutil, sys
blocked = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""
HEAVY = ["torch", "onnx", "onnxruntime", "av", "transformers", "diffusers", "huggingface_hub"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("package", ["motioncache", "mc_engines", "mc_runtime"])
def test_every_module_imports_without_the_optional_libraries(package: str) -> None:
    code = BLOCKER.format(blocked=[*HEAVY, "safetensors", "mc_export"]) + (
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_help_of_mc_export_does_not_need_torch() -> None:
    code = BLOCKER.format(blocked=HEAVY) + ("from mc_export.cli import main\nmain(['--help'])\n")
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "--checkpoint" in result.stdout


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("torch", "export", "mc_export.cli:main --model skyreels --checkpoint . --dry-run"),
        ("onnxruntime", "cpu", "mc_export.cli:main --model skyreels --checkpoint . --dry-run"),
    ],
)
def test_a_missing_extra_names_the_pip_command(module: str, extra: str, command: str) -> None:
    target, *arguments = command.split()
    name, function = target.split(":")
    code = BLOCKER.format(blocked=[module]) + (
        f"from {name} import {function}\n{function}({arguments!r})\n"
    )
    result = run_python(code)
    assert result.returncode == 1
    assert result.stderr == f"{module}: not installed. Run: pip install 'motioncache[{extra}]'\n"
