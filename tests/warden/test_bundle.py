"""The bundle: all that runs with privilege, and nothing else; its length, and where it runs."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from pytest_vmsandbox.warden import requests, steps
from pytest_vmsandbox.warden.bundle import BOOTSTRAP, PRIVILEGED, open_bundle
from tests.people import CHECKOUT, Kind, Person

# What acts with privilege has at most so many lines of code: it is to be read in one sitting. The
# warden is what decides; below it lie the kernel's words, one call for each function.
LINES_OF_THE_WARDEN = 1300
LINES_OF_ALL = 2800

# They start programs, run what they read, or bring half a library with them.
TOO_MUCH = {
    *("subprocess", "shutil", "pickle", "asyncio", "multiprocessing", "threading", "tempfile"),
    *("runpy", "code", "logging", "http", "ssl", "sqlite3", "readline"),
}
# Who calls the kernel past Python's own functions.
WITH_CTYPES = {"capabilities", "libc", "mount_tree", "openat2", "seccomp"}

# What `python -c` runs here in the place of the warden's main: it tells which modules there are.
TELL_MODULES = """
import json
said = {name: module.__spec__.origin for name, module in sys.modules.items()
        if getattr(module, "__spec__", None)}
line.send(json.dumps(said).encode())
"""


def sources() -> Iterator[tuple[str, str]]:
    for name in PRIVILEGED:
        yield name, (CHECKOUT / f"{name.replace('.', '/')}.py").read_text()


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code: no blank ones, no comments, no docstrings."""
    lines: set[int] = set()
    nothing = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
        *(tokenize.ENCODING, tokenize.ENDMARKER),
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                lines -= set(range(first, last + 1))
    return lines


def imported(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module)):
                found.add(module)
    return found


def test_what_acts_with_privilege_can_be_read_in_one_sitting() -> None:
    lines = {name: len(code_lines(source)) for name, source in sources()}

    assert sum(count for name, count in lines.items() if ".warden." in name) <= LINES_OF_THE_WARDEN
    assert sum(lines.values()) <= LINES_OF_ALL


def test_four_things_can_be_asked_for_and_no_fifth() -> None:
    assert [kind.__name__ for kind in get_args(requests.Request)] == [
        *("Launch", "Connect", "OpenFile", "Signal"),
    ]
    assert set(requests._READERS) == {"launch", "connect", "open_file", "signal"}


def test_a_view_is_made_of_six_things_and_no_seventh() -> None:
    kinds = {kind.__name__: {field.name for field in fields(kind)} for kind in get_args(steps.Step)}

    assert kinds == {
        "Tmpfs": {"target", "size_mib", "mode"},
        "Bind": {"source", "target", "access", "devices"},
        "Device": {"name"},
        "Proc": {"target", "only_pids"},
        "Symlink": {"target", "text"},
        "ReadOnly": {"target", "writable"},
    }
    assert set(steps._KINDS.values()) == set(get_args(steps.Step))


def test_privileged_modules_import_each_other_and_the_library_alone() -> None:
    for name, source in sources():
        for other in imported(source):
            root = other.partition(".")[0]
            assert other in PRIVILEGED or root in sys.stdlib_module_names, f"{name}: {other}"
            assert root not in TOO_MUCH, f"{name}: {other}"
            if root == "ctypes":
                assert name.rpartition(".")[2] in WITH_CTYPES, f"{name}: {other}"


def test_no_privileged_module_runs_texts_as_code() -> None:
    for name, source in sources():
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Call(func=ast.Name(id=called)):
                    assert called not in {"eval", "exec", "compile", "__import__"}, name
                case ast.Attribute(value=ast.Name(id="os"), attr=attribute):
                    assert not re.match(r"(system|popen|spawn|posix_spawn)", attribute), name


def modules_in(python: Path | str, *before: str) -> dict[str, str]:
    """The modules of a fresh Python that was given the bundle, and where each came from."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bootstrap = BOOTSTRAP.replace("main(line)\n", TELL_MODULES)
    assert bootstrap != BOOTSTRAP
    bundle = open_bundle()
    with ours:
        with theirs:
            socket.send_fds(ours, [b"\0"], [bundle])
            os.close(bundle)
            argv = [*before, str(python), "-I", "-S", "-c", bootstrap]
            child = subprocess.Popen(argv, stdin=theirs.fileno(), stderr=subprocess.PIPE, cwd="/")
        _, said = child.communicate(timeout=60)
        assert (child.returncode, said) == (0, b"")
        told: dict[str, str] = json.loads(ours.recv(1 << 20))
        return told


def ours_of(modules: dict[str, str]) -> dict[str, str]:
    return {name: origin for name, origin in modules.items() if name.startswith("pytest_vms")}


@pytest.fixture(params=[11, 12, 13, 14])
def other_python(request: pytest.FixtureRequest) -> Path:
    """A Python of another version than ours."""
    minor: int = request.param
    if sys.version_info[1] == minor:
        pytest.skip("that is ours")
    versions = Path.home() / ".pyenv/versions"
    for python in (Path(f"/usr/bin/python3.{minor}"), *versions.glob(f"3.{minor}.*/bin/python")):
        if python.exists():
            return python
    pytest.skip(f"there is no Python 3.{minor} here")


def test_a_fresh_python_finds_all_of_it_in_the_bundle_alone() -> None:
    modules = ours_of(modules_in(sys.executable))

    packages = {"pytest_vmsandbox", "pytest_vmsandbox.linux", "pytest_vmsandbox.warden"}
    assert set(modules) == {*PRIVILEGED, *packages}
    assert modules == {name: f"<{name}>" for name in modules}


def test_a_fresh_python_loads_nothing_that_starts_programs() -> None:
    modules = modules_in(sys.executable)

    assert not TOO_MUCH & {name.partition(".")[0] for name in modules}


def test_a_python_of_another_version_takes_the_sources(other_python: Path) -> None:
    modules = ours_of(modules_in(other_python))

    assert modules == ours_of(modules_in(sys.executable))


def test_a_user_who_may_not_read_our_package_gets_it_too(people: dict[Kind, Person]) -> None:
    someone = people[Kind.ORDINARY]
    program = Path(sys.executable).resolve()
    tried = subprocess.run(
        someone.argv(program, "-I", "-S", "-c", ""), capture_output=True, check=False, timeout=60
    )
    if tried.returncode:
        pytest.skip("an ordinary user can't run this Python")
    # In that Python, nothing of ours lies on its path, readable or not: -I and -S leave none.
    modules = ours_of(modules_in(program, *someone.argv()))

    assert modules == ours_of(modules_in(sys.executable))
