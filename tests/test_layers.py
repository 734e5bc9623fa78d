"""The house rules of docs/design.md: imports point down, never in a circle, never hidden in a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastiq

ROOT = Path(elastiq.__file__).parent
LAYERS = {
    "core": 0, "linalg": 0, "parts": 0, "statistics": 0,
    "formats": 1, "transforms": 1, "splits": 1, "compensators": 1,
    "kernels": 1, "solvers": 1, "tuners": 1, "sensitivity": 1, "allocators": 1, "token_weights": 1,
    "rewrites": 1,
    "runtime": 2, "recipes": 2,
    "embedded": 3, "models": 3, "checkpoint": 3, "text": 3,
    "allocate": 4, "inference": 4, "foreign": 4, "pipeline": 4, "evaluate": 4, "measure": 4, "report": 4,
    "integrations": 4,
    "cli": 5, "__init__": 5,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def own_imports(path: Path, nodes: Iterator[ast.AST]) -> Iterator[tuple[str, ...]]:
    package = path.relative_to(ROOT.parent).parent.parts
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module.split(".") if node.module else ()))
            if target[:1] == ("elastiq",):
                if node.module is None:
                    yield from ((*target, alias.name) for alias in node.names)
                else:
                    yield target
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names if a.name.split(".")[0] == "elastiq")


def graph() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        targets = {target[1] for target in own_imports(path, ast.walk(tree)) if len(target) > 1}
        rooms = {target if target in LAYERS else "__init__" for target in targets}  # a name of the package itself
        edges.setdefault(room_of(path), set()).update(rooms - {room_of(path)})
    return edges


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("room", sorted(LAYERS))
def test_imports_point_down(room: str) -> None:
    for target in graph().get(room, set()):
        assert LAYERS[target] <= LAYERS[room], f"{room} imports {target}, which is above it"
        assert LAYERS[room] != 1 or LAYERS[target] != 1, f"{room} imports {target}: a method never imports another"


def test_no_circle() -> None:
    edges = graph()

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, f"circle: {' -> '.join((*trail, room))}"
        for target in edges.get(room, set()):
            visit(target, (*trail, room))

    for room in edges:
        visit(room, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(module_of(p)[1:]) or "elastiq")
def test_no_hidden_import(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = list(own_imports(path, ast.walk(node)))
            assert not hidden, f"{node.name} hides an import of {'.'.join(hidden[0])}"
