"""Throw-away children for the tests of system calls: as root, and as an ordinary user.

A child is a fresh interpreter that runs one function of a test module: its source, below the
imports of that module. What it does to itself is gone with it, and it has no threads.
"""

from __future__ import annotations

import ast
import inspect
import os
import pwd
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest

PROJECT = Path(__file__).parents[2]
TIMEOUT_S = 60


class InChild(Protocol):
    """Runs a function in a child; fails with the child's traceback when it raised."""

    def __call__(self, body: Callable[..., None], *arguments: object) -> None: ...


@pytest.fixture(params=["root", "ordinary user"])
def user_id(request: pytest.FixtureRequest) -> int:
    """Whose process a child is: root's, and somebody's without any privilege."""
    if request.param == "root":
        if os.geteuid() != 0:
            pytest.skip("VMS-TEST-NOT-ROOT: only root can start a child as root")
        return 0
    user_id = os.geteuid() or _free_user_id()
    if refusal := _no_interpreter(user_id):
        pytest.skip(f"VMS-TEST-NO-INTERPRETER: uid {user_id} can't run this Python: {refusal}")
    return user_id


@pytest.fixture
def in_child(user_id: int) -> InChild:
    """A child as that user, in the namespaces of this process."""

    def run(body: Callable[..., None], *arguments: object) -> None:
        _run(user_id, _imports(body) + _call(body, arguments))

    return run


@pytest.fixture
def in_room(user_id: int) -> InChild:
    """A child as that user, root of a mount namespace of its own, in an empty tmpfs at /mnt."""
    if refusal := _refusal(user_id):
        pytest.skip(f"VMS-TEST-NO-NAMESPACE: uid {user_id} can't mount in its own: {refusal}")

    def run(body: Callable[..., None], *arguments: object) -> None:
        _run(user_id, _call(enter_room, ()) + _imports(body) + _call(body, arguments))

    return run


def enter_room() -> None:
    """Run in the child: from here on it mounts and unmounts for itself alone."""
    import os
    from pathlib import Path

    from pytest_vmsandbox.linux import CloneFlags, MountFlags, mount, unshare

    user, group = os.geteuid(), os.getegid()
    unshare(CloneFlags.NEWNS | (CloneFlags.NEWUSER if user else CloneFlags(0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount(None, "/", None, MountFlags.PRIVATE | MountFlags.REC)
    mount("room", "/mnt", "tmpfs", MountFlags.NOSUID)
    os.chdir("/mnt")


@cache
def _no_interpreter(user_id: int) -> str:
    """Why that user can't run our interpreter, which may lie in somebody's home; or nothing."""
    try:
        done = _start(user_id, "")
    except PermissionError as error:
        return str(error)
    return done.stderr


@cache
def _refusal(user_id: int) -> str:
    """Why that user can't mount in namespaces of its own; or nothing.

    Asked of the host's programs: were it our own calls, their mistakes would skip their tests.
    """
    map_user = ["--user", "--map-root-user"] if user_id else []
    mount_tmpfs = ["mount", "-t", "tmpfs", "room", "/mnt"]
    try:
        done = _as_user(user_id, ["unshare", "--mount", *map_user, "--", *mount_tmpfs])
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _run(user_id: int, script: str) -> None:
    done = _start(user_id, script)
    if done.returncode != 0:
        pytest.fail(f"the child ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _start(user_id: int, script: str) -> subprocess.CompletedProcess[str]:
    return _as_user(user_id, [sys.executable, "-B", "-W", "error", "-c", _START_COVERAGE + script])


def _as_user(user_id: int, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    other = user_id if user_id != os.geteuid() else None
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    environment |= {name: os.environ[name] for name in os.environ if name.startswith("COVERAGE_")}
    return subprocess.run(
        argv,
        user=other,
        group=other,
        extra_groups=None if other is None else [],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


# Lines that only a child reaches count too, where the suite itself is measured (coverage.py).
_START_COVERAGE = """
import os
if "COVERAGE_PROCESS_START" in os.environ:
    import coverage
    coverage.process_startup()
"""


def _call(body: Callable[..., None], arguments: tuple[object, ...]) -> str:
    source = textwrap.dedent(inspect.getsource(body))
    return f"{source}\n{body.__name__}({', '.join(repr(argument) for argument in arguments)})\n"


def _imports(body: Callable[..., None]) -> str:
    """The imports of the body's module; pytest's, which takes a while, only where it is used."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(body) or body))
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    unused = {"hypothesis", "__future__"}
    if "pytest." not in inspect.getsource(body):
        unused.add("pytest")
    ours = [node for node in nodes if _root(node) not in unused]
    return "".join(f"{ast.unparse(node)}\n" for node in ours)


def _root(node: ast.Import | ast.ImportFrom) -> str:
    name = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
    return name.partition(".")[0]


@cache
def _free_user_id() -> int:
    """A uid that nobody has and that owns no process."""
    taken = {user.pw_uid for user in pwd.getpwall()}
    running = {entry.stat().st_uid for entry in Path("/proc").glob("[0-9]*") if entry.exists()}
    first = 61000 + os.getpid() % 1000  # apart from other runs on this host
    return next(number for number in range(first, 65000) if number not in taken | running)
