"""Record the public names of the bindings of TensorRT and TensorRT-RTX, version by version.

A binding imports nothing but names as long as none of them is called. So its library can be an
one of empty functions, and every version can be read on any machine, without a GPU and without
the gigabytes of the libraries. Needs a C compiler, binutils, and the Python that the wheels are
for.

    pip download --no-deps tensorrt-cu13-bindings==10.13.3.9
    scripts/record_surfaces.py tests/engines/data/surfaces.json *.whl

What is written: by class, its names, grouped by the places that the libraries which have them have
in the list of libraries; the same for members of enumerations; aliases of such members. Neighbour:
`strict_library` makes a stand-in of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODULE = "module"  # stands for the class of what is not in one
READ = """
import importlib, json, sys, types

module = importlib.import_module(sys.argv[1])
names, enums, aliases = {}, {}, {}


def walk(path, owner):
    names[path] = []
    for name in dir(owner):
        value = getattr(owner, name)
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        names[path].append(name)
        inner = name if owner is module else f"{path}.{name}"
        if hasattr(value, "__members__"):
            enums[inner] = list(value.__members__)
        elif isinstance(value, type):
            walk(inner, value)
        elif owner is module and hasattr(type(value), "__members__"):
            aliases[name] = f"{type(value).__name__}.{value.name}"


walk(sys.argv[2], module)
print(json.dumps({"names": names, "enums": enums, "aliases": aliases}))
"""


def read_wheel(wheel: Path) -> tuple[str, dict[str, Any]]:
    """Return the library's name and version, and its names, as the child process found them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        zipfile.ZipFile(wheel).extractall(folder)
        (binding,) = folder.glob("*_bindings/*.so")
        make_empty_libraries(binding, folder)
        result = subprocess.run(
            [sys.executable, "-c", READ, binding.parent.name, MODULE],
            env={**os.environ, "LD_LIBRARY_PATH": temporary, "PYTHONPATH": temporary},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    library = binding.parent.name.removesuffix("_bindings")
    return f"{library} {wheel.name.split('-')[1]}", json.loads(result.stdout)


def make_empty_libraries(binding: Path, folder: Path) -> None:
    """Make a library of functions that do nothing for each of TensorRT's that a binding needs."""
    needed = run("readelf", "-d", binding).splitlines()
    symbols = [line.split()[-1] for line in run("nm", "-D", "-u", binding).splitlines()]
    functions = [name for name in symbols if name.isidentifier() and name[:2] not in ("Py", "_P")]
    source = folder / "functions.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions if name[0] != "_"))
    for name in (line.split("[")[1].rstrip("]") for line in needed if "(NEEDED)" in line):
        if name.startswith(("libnv", "libtensorrt")):
            run("cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source)


def run(*command: str | Path) -> str:
    """Run a tool and return what it prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def merge(surfaces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the names of several libraries into one table; see the top for what it holds."""
    found = list(surfaces.values())

    def collect(part: str) -> dict[str, dict[str, list[str]]]:
        owners = sorted({owner for each in found for owner in each[part]})
        return {owner: split([each[part].get(owner, []) for each in found]) for owner in owners}

    aliases = {name: value for each in found for name, value in each["aliases"].items()}
    return {
        "libraries": list(surfaces),
        "names": collect("names"),
        "enums": collect("enums"),
        "aliases": aliases,
    }


def split(sides: list[list[str]]) -> dict[str, list[str]]:
    """Group names by the places of the libraries that have them, such as "0 1 2"."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for side in sides for name in side):
        places = " ".join(str(place) for place, side in enumerate(sides) if name in side)
        groups.setdefault(places, []).append(name)
    return groups


def write(path: Path, table: dict[str, Any]) -> None:
    """Write the table with one class a line, so that a new version is a readable change."""
    lines = [f'"libraries": {json.dumps(table["libraries"])}']
    for part in ("names", "enums"):
        rows: Iterable[str] = (
            f"  {json.dumps(owner)}: {json.dumps(names)}" for owner, names in table[part].items()
        )
        lines.append(f'"{part}": {{\n' + ",\n".join(rows) + "\n}")
    lines.append(f'"aliases": {json.dumps(table["aliases"])}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Read the wheels that are named, oldest first, and write one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("wheels", type=Path, nargs="+")
    arguments = parser.parse_args()
    write(arguments.table, merge(dict(map(read_wheel, arguments.wheels))))


if __name__ == "__main__":
    main()
