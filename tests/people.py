"""Users of four kinds, and how to do something as each of them; for the tests of all rooms."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

import pytest_vmsandbox
from tests.removal import remove_as

CHECKOUT = Path(pytest_vmsandbox.__file__).parents[1]

SUDOERS = Path("/etc/sudoers.d")

# Each test run and worker that may use the user `qemu-vm` holds a shared lock on this file. What is
# in it says whether tests made the user.
QEMU_VM_USERS = Path("/run/vmsandbox-tests.qemu-vm")
MADE_BY_TESTS = "made by tests\n"

# userdel(8): the user is still that of a process, which may be about to end.
USER_IS_BUSY = 8
PATIENCE_S = 30


def run(*argv: str | Path) -> str:
    """Run a program that must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


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


def pytest_configure(config: pytest.Config) -> None:
    """Be counted to the very end: what machines have kept ends after the last of the fixtures."""
    if os.getuid() == 0 and SUDOERS.is_dir():
        counted = ExitStack()
        counted.enter_context(counted_for_qemu_vm())
        config.add_cleanup(counted.close)


@pytest.fixture(scope="session")
def qemu_vm_user() -> pwd.struct_passwd:
    """The user `qemu-vm`; where there is none it is made, and goes with the last test run."""
    require_root_and_sudo()
    return made_qemu_vm()


def made_qemu_vm() -> pwd.struct_passwd:
    """The same for who is no fixture; we are root, and counted."""
    with user_database():
        if not user_exists("qemu-vm"):
            QEMU_VM_USERS.write_text(MADE_BY_TESTS)
            run(
                *("useradd", "--system", "--user-group", "--no-create-home"),
                *("--shell", "/usr/sbin/nologin", "qemu-vm"),
            )
    return pwd.getpwnam("qemu-vm")


@contextmanager
def counted_for_qemu_vm() -> Iterator[None]:
    """Keep the user from being removed; with the last who is counted it goes, if tests made it.

    Whoever runs machines is to be counted: they may run as that user without having asked for it.
    """
    with ExitStack() as undo:
        with user_database():
            users = undo.enter_context(QEMU_VM_USERS.open("a"))
            fcntl.flock(users, fcntl.LOCK_SH)
            undo.callback(remove_qemu_vm_unless_used, users.fileno())
        yield


def remove_qemu_vm_unless_used(lock: int) -> None:
    with user_database():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if QEMU_VM_USERS.read_text() == MADE_BY_TESTS and user_exists("qemu-vm"):
            remove_user("qemu-vm")
        QEMU_VM_USERS.unlink()


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
    if not person_reaches_checkout(someone):
        pytest.skip(f"{someone.kind} can't reach this checkout or its interpreter")
    return someone


def person_reaches_checkout(someone: Person) -> bool:
    """Whether they can import this package with this interpreter."""
    tried = subprocess.run(
        someone.argv(sys.executable, "-c", "import pytest_vmsandbox"),
        cwd=CHECKOUT,
        env=plain_environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    return tried.returncode == 0


def person_named(name: str, *, kind: Kind) -> Person:
    entry = pwd.getpwnam(name)
    return Person(kind=kind, name=name, uid=entry.pw_uid, gid=entry.pw_gid)


@contextmanager
def made_user(name: str) -> Iterator[None]:
    with user_database():
        run("useradd", "--user-group", "--no-create-home", "--shell", "/bin/sh", name)
    user = pwd.getpwnam(name)
    run_directories = Path(f"/tmp/vmsandbox-{user.pw_uid}")
    try:
        yield
    finally:
        with user_database():
            remove_user(name)
            # While nobody can get the same uid: what they had for themselves goes with them.
            if run_directories.exists():
                stays = remove_as(user, run_directories)
                assert not stays, stays


def remove_user(name: str) -> None:
    """Remove a user whose processes have ended, or are ending."""
    until = time.monotonic() + PATIENCE_S
    while True:
        tried = subprocess.run(
            ["userdel", name], capture_output=True, text=True, timeout=60, check=False
        )
        if tried.returncode != USER_IS_BUSY or time.monotonic() > until:
            break
        time.sleep(0.1)
    assert tried.returncode == 0, tried.stderr


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
