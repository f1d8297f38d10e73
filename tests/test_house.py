"""The plan of the house holds: rooms import one way, files stay small, and the map names what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dynnet"

# A room, or a module that stands between rooms, imports only what comes before it.
ORDER = (
    "errors", "schema", "registration", "backbone", "channels", "cost", "exits", "gates", "config", "outputs",
    "belongings", "model", "certificate", "wrapping", "cascading", "deploy", "thresholds", "evaluation", "pruning",
    "consolidating", "files", "learning", "zoo", "serving", "__init__", "command", "__main__",
)  # fmt: skip
LONGEST, MEDIAN = 350, 180  # lines of a file


def imports() -> dict[str, set[str]]:
    """By module, the modules of dynnet that it imports, wherever in the file."""
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dynnet"):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name for name in inside if name in files} or {node.module}
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name in files}
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> int:
    parts = module.split(".")
    return ORDER.index(parts[1] if len(parts) > 1 else "__init__")


def test_imports_run_one_way() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room_of(other) > room_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles() -> None:
    graph, done = imports(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_files_are_of_one_idea() -> None:
    rooms = (PACKAGE, ROOT / "training", ROOT / "eval", ROOT / "tests")
    files = [path for room in rooms for path in room.rglob("*.py") if path.name != "__init__.py"]
    lines = {path: len(path.read_text().splitlines()) for path in files}
    long = [f"{path.relative_to(ROOT)}: {count}" for path, count in lines.items() if count >= LONGEST]
    assert not long, long
    assert sorted(lines.values())[len(lines) // 2] < MEDIAN


def test_every_room_says_what_it_is() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_map_names_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text[text.index("| question |") :].split("\n\n")[0]
    named = re.findall(r"`([\w./*-]+)`", table)
    assert len(named) >= 20
    for name in named:
        assert list(ROOT.glob(name)), f"ARCHITECTURE.md sends readers to {name!r}, which is not there"
