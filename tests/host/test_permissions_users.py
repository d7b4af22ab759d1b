"""The same questions asked by four users: root, ordinary, with sudo to `qemu-vm`, to all."""

from __future__ import annotations

import os
import pwd
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.host.run_directory import mark_run_directory

if TYPE_CHECKING:
    from tests.people import Kind, Person

# What each user can do, by the name of the question in ASK.
ANSWERS: dict[str, dict[str, bool]] = {
    "root": {"sudo_to_qemu_vm": True, "sudo_to_root": True, "is_root": True},
    "ordinary": {"sudo_to_qemu_vm": False, "sudo_to_root": False, "is_root": False},
    "ordinary with sudo to qemu-vm only": {
        "sudo_to_qemu_vm": True,
        "sudo_to_root": False,
        "is_root": False,
    },
    "ordinary with sudo to all": {"sudo_to_qemu_vm": True, "sudo_to_root": True, "is_root": False},
}

ASK = """
import asyncio, json, os, sys
from pathlib import Path
from pytest_vmsandbox.host import permissions as p

async def main():
    mine, roots, tree = (Path(name) for name in sys.argv[1:])
    (mine / "file").touch(mode=0o600)
    (mine / "given").touch(mode=0o600)
    (mine / "image").touch(mode=0o600)
    mine.chmod(0o700)
    return {
        "qemu_vm_user": await p.probe_qemu_vm_user(),
        "sudo_as_qemu_vm": await p.probe_sudo_as_qemu_vm(),
        "setfacl": await p._probe_setfacl(),
        "getfacl": await p._probe_getfacl(),
        "acl_support": await p.probe_acl_support(mine),
        "acl_set_on_mine": await p.set_acl_user(mine / "file", "qemu-vm", "rw"),
        "acl_seen_on_mine": await p.verify_user_access(mine / "file", "qemu-vm", "rw"),
        "grant_mine": await p.grant_qemu_vm_access(mine / "file"),
        "acl_removed_from_mine": await p.remove_acl_user(mine / "file", "qemu-vm"),
        "acl_gone_from_mine": not await p.verify_user_access(mine / "file", "qemu-vm", "r"),
        "file_access_to_mine": await p.grant_qemu_vm_file_access(mine / "image"),
        "acl_set_on_roots": await p.set_acl_user(roots, "qemu-vm", "rw"),
        "chmod_roots": await p.chmod_async(roots, "750"),
        "open_roots": await p.ensure_traversable([roots]),
        "open_tmp": await p.ensure_traversable(["/tmp", "/"]),
        "can_access_roots": await p.can_access(roots),
        "chown_to_qemu_vm": await p.chown_to_qemu_vm(mine / "given"),
        "owner_of_given": await p.get_owner(mine / "given"),
        "sudo_rm": await p.sudo_rm(tree),
        "removed": not tree.exists(),
        "expected_uid": p.get_expected_socket_uid(True),
        "expected_own_uid": p.get_expected_socket_uid(False),
    }

print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture
def own_folder(scratch: Path, person: Person) -> Path:
    """A folder of the person's own."""
    folder = scratch / "mine"
    folder.mkdir(mode=0o700)
    os.chown(folder, person.uid, person.gid)
    return folder


@pytest.fixture
def own_run_tree(scratch: Path, person: Person) -> Path:
    """A tree in the person's run directory that belongs to root."""
    run = scratch / "run"
    run.mkdir()
    mark_run_directory(run)
    for path in (run, *run.iterdir()):
        os.chown(path, person.uid, person.gid)
    tree = run / "tree"
    tree.mkdir(mode=0o700)
    (tree / "file").touch()
    return tree


def test_each_user_gets_the_answers_that_are_true_for_that_user(
    person: Person,
    qemu_vm_user: pwd.struct_passwd,
    own_folder: Path,
    own_run_tree: Path,
    scratch: Path,
) -> None:
    roots = scratch / "roots"
    roots.mkdir(mode=0o700)
    can = ANSWERS[person.kind]

    seen = person.python(ASK, own_folder, roots, own_run_tree)

    given_to = qemu_vm_user.pw_name if can["sudo_to_root"] else person.name
    assert seen == {
        "qemu_vm_user": True,
        "sudo_as_qemu_vm": can["sudo_to_qemu_vm"],
        "setfacl": True,
        "getfacl": True,
        "acl_support": True,
        "acl_set_on_mine": True,
        "acl_seen_on_mine": True,
        "grant_mine": True,
        "acl_removed_from_mine": True,
        "acl_gone_from_mine": True,
        "file_access_to_mine": True,
        "acl_set_on_roots": can["is_root"],
        "chmod_roots": can["is_root"],
        "open_roots": can["is_root"],
        "open_tmp": True,
        "can_access_roots": can["is_root"],
        "chown_to_qemu_vm": can["sudo_to_root"],
        "owner_of_given": [given_to, given_to],
        "sudo_rm": can["sudo_to_root"],
        "removed": can["sudo_to_root"],
        "expected_uid": qemu_vm_user.pw_uid,
        "expected_own_uid": person.uid,
    }
    assert own_run_tree.exists() is not can["sudo_to_root"]


def test_the_vmms_user_can_read_what_was_made_accessible(
    person: Person, own_folder: Path, own_run_tree: Path, scratch: Path
) -> None:
    image = own_folder / "image"
    as_vmm = ["setpriv", "--reuid=qemu-vm", "--regid=qemu-vm", "--init-groups", "cat", str(image)]
    image.touch(mode=0o600)
    os.chown(image, person.uid, person.gid)
    before = subprocess.run(as_vmm, capture_output=True, check=False)

    person.python(ASK, own_folder, scratch / "nothing", own_run_tree)

    assert before.returncode != 0
    assert subprocess.run(as_vmm, capture_output=True, check=False).returncode == 0


# A terminal on which sudo could ask for a password

PROMPTING = """
import asyncio, sys
from pytest_vmsandbox.host import permissions as p

async def main():
    process = await p.sudo_exec(["true"], start_new_session=False)
    await process.wait()

asyncio.run(main())
"""

NOT_PROMPTING = """
import asyncio, json, sys
from pytest_vmsandbox.host import permissions as p

async def main():
    p._probe_cache.qemu_vm_user = True
    process = await p.sudo_exec(["true"])
    await process.wait()
    return [
        process.returncode == 0,
        await p.probe_sudo_as_qemu_vm(),
        await p.chown_to_qemu_vm(sys.argv[1]),
    ]

print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Our end of a terminal, and the other end for a child to have as its own."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def on_terminal(
    person: Person, theirs: int, script: str, *arguments: str | Path
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["setsid", "--ctty", *person.argv(sys.executable, "-c", script, *arguments)],
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C"},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shown_on(ours: int, *, seconds: float, until: bytes = b"\0") -> bytes:
    """What appears on the terminal until `until` does, or for so long."""
    shown = b""
    deadline = time.monotonic() + seconds
    while until not in shown and (left := deadline - time.monotonic()) > 0:
        if select.select([ours], [], [], left)[0]:
            shown += os.read(ours, 4096)
    return shown


def test_nothing_asks_for_a_password_though_there_is_a_terminal_to_ask_on(
    people: Mapping[Kind, Person], terminal: tuple[int, int], scratch: Path
) -> None:
    ours, theirs = terminal
    ordinary = next(who for kind, who in people.items() if kind == "ordinary")
    file = scratch / "file"
    file.touch()

    child = on_terminal(ordinary, theirs, NOT_PROMPTING, file)
    out, err = child.communicate(timeout=60)

    assert out == "[false, false, false]\n", err
    assert shown_on(ours, seconds=0.05) == b""


def test_sudo_does_ask_on_that_terminal_when_it_shares_our_session(
    people: Mapping[Kind, Person], terminal: tuple[int, int]
) -> None:
    # The counterpart of the test above: without it, that one could not fail.
    ours, theirs = terminal
    ordinary = next(who for kind, who in people.items() if kind == "ordinary")

    with on_terminal(ordinary, theirs, PROMPTING) as child:
        try:
            shown = shown_on(ours, seconds=30, until=b"assword")
            os.write(ours, b"\x04")  # no password: sudo gives up
            child.wait(timeout=60)
        finally:
            child.kill()

    assert b"assword" in shown
