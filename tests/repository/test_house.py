"""The house: rooms import downward, modules are short, what is public is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "pytest_vmsandbox"
MODULES = sorted(PACKAGE.glob("**/*.py"))
ROOTS = ("pytest_vmsandbox", "tests", "examples", "benchmarks", "docs", ".ci")
OURS = [
    path
    for root in ROOTS
    for path in sorted((CHECKOUT / root).glob("**/*"))
    if path.suffix in {".py", ".c", ".h", ".md", ".sh", ""} and path.is_file()
    if "__pycache__" not in path.parts and not path.name.startswith("agent-")
]

LONGEST_MODULE = 500
LONGEST_FUNCTION = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _id(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def _functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def _lines_without_docstring(function: Function) -> int:
    length = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        first = function.body[0]
        length -= (first.end_lineno or 0) - first.lineno + 1
    return length


def _public_definitions(scope: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in scope.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public_definitions(node)


def _contract() -> dict[str, object]:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    assert isinstance(contract, dict)
    return contract


def test_rooms_import_downward_only() -> None:
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_the_contract_names_every_room_and_no_other() -> None:
    contract = _contract()
    assert contract["exhaustive"] is True
    assert contract["containers"] == ["pytest_vmsandbox"]
    assert isinstance(contract["layers"], list)

    placed = {room for layer in contract["layers"] for room in layer.split(" | ")}
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}

    assert placed == there | modules


@pytest.mark.parametrize("module", MODULES, ids=_id)
def test_a_module_can_be_read_in_one_sitting(module: Path) -> None:
    text = module.read_text()

    assert len(text.splitlines()) <= LONGEST_MODULE
    for function in _functions(ast.parse(text)):
        assert _lines_without_docstring(function) <= LONGEST_FUNCTION, function.name


@pytest.mark.parametrize("module", MODULES, ids=_id)
def test_what_is_public_has_a_docstring(module: Path) -> None:
    tree = ast.parse(module.read_text())
    undocumented = [
        node.name
        for node in _public_definitions(tree)
        if ast.get_docstring(node) is None and not _is_overload(node)
    ]

    assert undocumented == []
    if module.stat().st_size:
        assert ast.get_docstring(tree)


def _is_overload(node: Function | ast.ClassDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def test_nothing_is_left_for_later() -> None:
    # Written so that this file does not hold the words itself.
    later = re.compile(r"\b(T[O]DO|F[I]XME|X[X]X)\b")

    assert [_id(path) for path in OURS if later.search(path.read_text())] == []


def test_only_what_fills_the_cache_removes_trees_without_looking_for_mounts() -> None:
    removing = [path for path in OURS if "rm" + "tree(" in path.read_text()]
    elsewhere = [
        _id(path)
        for path in removing
        if path.is_relative_to(PACKAGE) and path.parent.name != "image"
    ]

    assert elsewhere == [
        "pytest_vmsandbox/host/scratch.py",  # it looks for them, but for what it has just made
        "pytest_vmsandbox/machine/templates/shelf.py",
    ]


@pytest.mark.parametrize("module", MODULES, ids=_id)
def test_a_module_is_named_for_what_it_holds(module: Path) -> None:
    assert module.stem not in {"util", "utils", "helper", "helpers", "misc", "tools"}


def test_every_folder_of_tests_is_named_for_what_it_tests() -> None:
    tested = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | set(ROOTS)
    folders = {path.parent.name for path in (CHECKOUT / "tests").glob("*/test_*.py")}

    assert folders - tested == {"repository", "escape", "tiers"}
