"""Habits of the code that no linter holds: what is public, how errors read, what is not named."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

import mc_engines.errors
from mc_engines.errors import McError

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT / outer).with_suffix("").parts).removesuffix(".__init__"): path
    for outer in ("motioncache", "engines", "runtime", "export")
    for path in sorted((ROOT / outer).rglob("*.py"))
}


def words(text: str) -> set[str]:
    """Stems of the words of a sentence or a name, but for the shortest."""
    return {word.lower()[:4] for word in re.findall(r"[A-Z]?[a-z]{2,}|[A-Z]{3,}", text)}


@pytest.mark.parametrize("name", FILES)
def test_a_module_says_what_is_public_and_what_that_is(name: str) -> None:
    module = importlib.import_module(name)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in module.__all__:
            said = words((ast.get_docstring(node) or "").partition("\n\n")[0])
            assert len(said - words(node.name)) > 1, f"{node.name} says no more than its name"


def test_the_tree_drawn_above_the_errors_is_that_of_the_classes() -> None:
    for name in FILES:
        importlib.import_module(name)
    document = mc_engines.errors.__doc__ or ""
    root, *children = re.findall(r"^ {4}(?:[├└]── )?(\w+)", document, re.MULTILINE)
    assert root == McError.__name__
    classes = McError.__subclasses__()
    assert children == [error.__name__ for error in classes]
    assert [error for parent in classes for error in parent.__subclasses__()] == []


# An error that a library raised, told with its own words, and what is not installed.
OTHER_MESSAGES = {
    "{}: ONNX Runtime: {}",
    "{}: ONNX Runtime cannot load it: {}",
    "The function gave other outputs than its graph. {}",
    "{}, to fetch {}; or give --checkpoint: {}.",
}


def messages(tree: ast.Module) -> list[str]:
    """Messages of the errors that a module makes, {} for what is filled in."""
    errors = {"ValueError", "TypeError", "OSError", *mc_engines.errors.__all__}
    errors -= {"not_installed", "require"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            if node.func.id in errors and isinstance(text, ast.JoinedStr | ast.Constant):
                found.append(
                    "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts)
                )
    return found


def test_messages_say_what_was_expected_and_what_was_got() -> None:
    made = {message for file in FILES.values() for message in messages(ast.parse(file.read_text()))}
    assert len(made) > 100
    form = re.compile(r".+: expected .+, got:? .+", re.DOTALL)
    assert {message for message in made if not form.fullmatch(message)} == OTHER_MESSAGES


def test_no_file_names_a_machine() -> None:
    """Such as the folders of whoever wrote it, or where packages came from."""
    if not (ROOT / ".git").exists():
        pytest.skip("Not a checkout.")
    paths = r"(^|[^A-Za-z0-9_.])/(work|opt|root|home|tmp)/|[.][.]/shared"
    hosts = r"(pypi|pythonhosted)[.]org|download[.]pytorch"
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    command = [*git, "grep", "-nIE", f"{paths}|{hosts}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 1)
