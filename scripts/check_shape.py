"""Hold the house's three limits: functions up to 60 lines, files up to 400, everything annotated.

Annotations are held by mypy --strict and ruff's ANN rules; this script counts lines.
"""

import ast
import sys
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
PACKAGES = ("motioncache", "engines", "runtime", "export")


def find_long_parts(path: Path) -> list[str]:
    """Return one line of complaint per function or file of `path` that is too long."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    long = [f"{path}: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                name = f"{path}:{node.lineno} {node.name}"
                long.append(f"{name}: {length} lines, at most {MAX_FUNCTION_LINES}")
    return long


def main() -> int:
    """Print every complaint; return 1 if there is one."""
    root = Path(__file__).parent.parent
    complaints = [
        complaint
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for complaint in find_long_parts(path)
    ]
    print("\n".join(complaints) or "shape: every function and file within its limit")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
