"""What the tests of this room share: stub programs, users of four kinds, file systems to try."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

import pytest_vmsandbox
from tests.children import remember_children

CHECKOUT = Path(pytest_vmsandbox.__file__).parents[1]

SUDOERS = Path("/etc/sudoers.d")

# That the user `qemu-vm` was made by tests; each run that uses it holds a shared lock on the file.
QEMU_VM_MADE_BY_TESTS = Path("/run/vmsandbox-tests.qemu-vm")


# Programs that are not what they seem


@dataclass(frozen=True, slots=True, kw_only=True)
class Stubs:
    """A folder of stub programs, which stands first in PATH; each call of a stub is recorded."""

    directory: Path

    def put(self, name: str, body: str = "exit 0") -> Path:
        """A shell script; it gets no further than `body` says."""
        return self.put_raw(
            name,
            f"#!/bin/sh\n{{ printf '%s\\037' \"$@\"; echo; }} >> {self._calls(name)}\n{body}\n",
        )

    def put_raw(self, name: str, text: str) -> Path:
        program = self.directory / name
        program.write_text(text)
        program.chmod(0o755)
        return program

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call so far."""
        calls = self._calls(name)
        if not calls.exists():
            return []
        return [line.split("\037")[:-1] for line in calls.read_text().splitlines()]

    def _calls(self, name: str) -> Path:
        return self.directory / f"{name}.calls"


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    """Stub programs in front of the host's own."""
    directory = tmp_path / "stubs"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Stubs(directory=directory)


@pytest.fixture
def only_stubs(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    """Stub programs, and no others to be found in PATH."""
    monkeypatch.setenv("PATH", str(stubs.directory))
    return stubs


# Folders and file systems


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that other users can reach, unlike `tmp_path`; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmst-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def run(*argv: str | Path) -> str:
    """Run a program that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


@contextmanager
def mounted(target: Path, *arguments: str | Path) -> Iterator[Path]:
    """Mount something on `target`, which is made; skip the test where mount(8) refuses."""
    if os.getuid() != 0:
        pytest.skip("takes root: it mounts a file system")
    target.mkdir()
    done = subprocess.run(
        ["mount", *arguments, target], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mount {arguments}: {done.stderr.strip()}")
    try:
        yield target
    finally:
        run("umount", "--", target)
        target.rmdir()


@pytest.fixture
def tmpfs(scratch: Path) -> Iterator[Path]:
    with mounted(scratch / "tmpfs", "-t", "tmpfs", "-o", "size=1m", "none") as root:
        yield root


@pytest.fixture
def ext4(scratch: Path) -> Iterator[Path]:
    disk = scratch / "ext4.img"
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    run("mkfs.ext4", "-q", "-F", disk)
    with mounted(scratch / "ext4", "-o", "loop", disk) as root:
        yield root


@pytest.fixture
def without_acls(scratch: Path) -> Iterator[Path]:
    """A file system that takes no ACLs, however well setfacl runs."""
    with mounted(scratch / "ramfs", "-t", "ramfs", "none") as root:
        yield root


# Users


class Kind(StrEnum):
    ROOT = "root"
    ORDINARY = "ordinary"
    SUDO_TO_QEMU_VM = "ordinary with sudo to qemu-vm only"
    SUDO_TO_ALL = "ordinary with sudo to all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A user of this host, and how to do something as that user."""

    kind: Kind
    name: str
    uid: int
    gid: int

    def argv(self, *argv: str | Path) -> list[str]:
        """The command line that runs `argv` as this user, with that user's groups."""
        return [*as_user(self.name), *map(str, argv)]

    def python(self, script: str, *arguments: str | Path) -> object:
        """Run a script as this user; it prints JSON, which is given back."""
        done = subprocess.run(
            self.argv(sys.executable, "-c", script, *arguments),
            cwd=CHECKOUT,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def as_user(name: str) -> list[str]:
    """What to put before a command so that it runs as the user `name`."""
    entry = pwd.getpwnam(name)
    if entry.pw_uid == os.getuid():
        return []
    ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--init-groups"]
    return ["setpriv", *ids, "--inh-caps=-all", "--"]


def plain_environment() -> Mapping[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": "/",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture(scope="session")
def qemu_vm_user() -> Iterator[pwd.struct_passwd]:
    """The user `qemu-vm`; made, and removed afterwards, only where there is none."""
    require_root_and_sudo()
    with ExitStack() as undo:
        with user_database():
            if QEMU_VM_MADE_BY_TESTS.exists() or not user_exists("qemu-vm"):
                users = undo.enter_context(QEMU_VM_MADE_BY_TESTS.open("w"))
                fcntl.flock(users, fcntl.LOCK_SH)
                undo.callback(remove_qemu_vm_unless_used, users.fileno())
            if not user_exists("qemu-vm"):
                run(
                    *("useradd", "--system", "--user-group", "--no-create-home"),
                    *("--shell", "/usr/sbin/nologin", "qemu-vm"),
                )
        yield pwd.getpwnam("qemu-vm")


def remove_qemu_vm_unless_used(lock: int) -> None:
    """Remove the user with the last test run that uses it, which need not be the first."""
    with user_database():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if user_exists("qemu-vm"):
            run("userdel", "qemu-vm")
        QEMU_VM_MADE_BY_TESTS.unlink()


@pytest.fixture(scope="session")
def people(qemu_vm_user: pwd.struct_passwd) -> Iterator[Mapping[Kind, Person]]:
    """One user of each kind; those that are not root are made, and removed afterwards."""
    names = {
        Kind.ORDINARY: f"vmst{os.getpid()}o",
        Kind.SUDO_TO_QEMU_VM: f"vmst{os.getpid()}q",
        Kind.SUDO_TO_ALL: f"vmst{os.getpid()}a",
    }
    rules = [
        f"{names[Kind.SUDO_TO_QEMU_VM]} ALL=({qemu_vm_user.pw_name}) NOPASSWD: ALL",
        f"{names[Kind.SUDO_TO_ALL]} ALL=(ALL:ALL) NOPASSWD: ALL",
    ]
    with ExitStack() as undo:
        for name in names.values():
            undo.enter_context(made_user(name))
        undo.enter_context(made_sudoers(f"vmst{os.getpid()}", rules))
        everybody = {Kind.ROOT: "root", **names}
        yield {kind: person_named(name, kind=kind) for kind, name in everybody.items()}


@pytest.fixture(params=list(Kind), ids=lambda kind: kind.replace(" ", "-"))
def person(request: pytest.FixtureRequest, people: Mapping[Kind, Person]) -> Person:
    """Each kind of user in turn."""
    someone = people[request.param]
    tried = subprocess.run(
        someone.argv(sys.executable, "-c", "import pytest_vmsandbox"),
        cwd=CHECKOUT,
        env=plain_environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    if tried.returncode != 0:
        pytest.skip(f"{someone.kind} can't reach this checkout or its interpreter")
    return someone


def person_named(name: str, *, kind: Kind) -> Person:
    entry = pwd.getpwnam(name)
    return Person(kind=kind, name=name, uid=entry.pw_uid, gid=entry.pw_gid)


@contextmanager
def made_user(name: str) -> Iterator[None]:
    with user_database():
        run("useradd", "--user-group", "--no-create-home", "--shell", "/bin/sh", name)
    try:
        yield
    finally:
        with user_database():
            run("userdel", name)


@contextmanager
def made_sudoers(name: str, rules: Sequence[str]) -> Iterator[None]:
    """Add rules that visudo has accepted; sudo never sees half a file."""
    # sudo passes over names with a dot (sudoers(5), "@includedir").
    draft, final = SUDOERS / f".{name}.draft", SUDOERS / name
    try:
        draft.write_text("\n".join([*rules, ""]))
        draft.chmod(0o440)
        run("visudo", "-c", "-f", draft)
        draft.rename(final)
        yield
    finally:
        draft.unlink(missing_ok=True)
        final.unlink(missing_ok=True)


@contextmanager
def user_database() -> Iterator[None]:
    """Keep other test runs and workers from changing users at the same time."""
    lock = os.open(SUDOERS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def user_exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def require_root_and_sudo() -> None:
    if os.getuid() != 0:
        pytest.skip("takes root: it makes users")
    for program in ("sudo", "visudo", "useradd", "userdel", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"takes {program}")


# What must not be left behind


@pytest.fixture
def open_descriptors() -> Callable[[], list[str]]:
    """Lists what this process holds open, to be compared before and after."""

    def listed() -> list[str]:
        return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())

    return listed


@pytest.fixture(autouse=True)
def _children_before() -> None:
    remember_children()
