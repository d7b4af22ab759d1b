"""A module in lines of text: its file, the own ones it imports, and what was loaded otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

from pytest_vmsandbox.machine.templates.code_origin import Origin, digest_of_file, origin_of_file
from pytest_vmsandbox.machine.templates.loaded_code import all_within, functions_of, lines_of
from pytest_vmsandbox.machine.templates.module_file import file_of, imports_of


def describe_module(name: str, *, seen: set[str]) -> Iterator[str]:
    """A module and all that it imports, but for those in `seen`, which are noted there.

    It is the same whether the module is loaded yet or not, unless its file was changed since.
    """
    if name in seen:
        return
    seen.add(name)
    file = file_of(name)
    origin = origin_of_file(file)
    if file is None or origin is Origin.PYTHON:
        return
    yield f"module {name} {digest_of_file(file)}"
    if origin is not Origin.OWN or (code := _compiled(file)) is None:
        return
    yield from _otherwise_loaded(name, file, code)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for module in sorted(set(imports_of(code, package=package))):
        yield from describe_module(module, seen=seen)


def _compiled(file: Path) -> CodeType | None:
    try:
        return compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):  # it is no text, or no more one that could be loaded
        return None


def _otherwise_loaded(module: str, file: Path, code: CodeType) -> Iterator[str]:
    """The functions of a loaded module that its text does not say: it was edited meanwhile."""
    if module not in sys.modules:
        return
    said = {_text(each) for each in all_within(code)}
    for name, value in sorted(vars(sys.modules[module]).items(), key=lambda item: item[0]):
        members = vars(value).values() if isinstance(value, type) else (value,)
        for function in (each for member in members for each in functions_of(member)):
            if isinstance(function, FunctionType) and function.__code__.co_filename == str(file):
                loaded = _text(function.__code__)
                if loaded not in said:
                    yield f"{name} {loaded}"


def _text(code: CodeType) -> str:
    return "\n".join(lines_of(code))
