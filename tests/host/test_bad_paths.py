"""Paths that lead nowhere, and names that say more than they should: a plain no, never more."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmsandbox.host import permissions
from pytest_vmsandbox.host.permissions import (
    can_access,
    chmod_async,
    chmod_executable,
    chown_async,
    chown_to_qemu_vm,
    ensure_traversable,
    get_acl,
    get_mode,
    get_owner,
    grant_qemu_vm_access,
    grant_qemu_vm_file_access,
    probe_acl_support,
    remove_acl_user,
    set_acl_user,
    sudo_rm,
    verify_user_access,
)
from pytest_vmsandbox.host.run_directory import is_below_run_directory, mark_run_directory
from tests.people import CHECKOUT, as_user, plain_environment

if TYPE_CHECKING:
    from tests.host.conftest import Stubs

root_only = pytest.mark.skipif(os.getuid() != 0, reason="takes root: it has other users' files")


@pytest.fixture(autouse=True)
def existing_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a user that every host has for the VMMs' one, not probed yet."""
    monkeypatch.setattr(permissions, "_probe_cache", type(permissions._probe_cache)())
    monkeypatch.setattr(permissions, "QEMU_VM_USER", "daemon")


# Every function that takes a path, with its negative answer

Ask = Callable[[str], Coroutine[Any, Any, object]]

ASKING: dict[str, tuple[Ask, object]] = {
    "set_acl_user": (lambda path: set_acl_user(path, "daemon", "rw"), False),
    "remove_acl_user": (lambda path: remove_acl_user(path, "daemon"), False),
    "get_acl": (get_acl, None),
    "verify_user_access": (lambda path: verify_user_access(path, "daemon", "r"), False),
    "probe_acl_support": (probe_acl_support, False),
    "chmod_async": (lambda path: chmod_async(path, "600"), False),
    "get_mode": (get_mode, None),
    "get_owner": (get_owner, None),
    "chown_async": (lambda path: chown_async(path, "daemon", "daemon"), False),
    "chown_to_qemu_vm": (chown_to_qemu_vm, False),
    "sudo_rm": (sudo_rm, False),
    "can_access": (can_access, False),
    "grant_qemu_vm_access": (grant_qemu_vm_access, False),
    "grant_qemu_vm_file_access": (grant_qemu_vm_file_access, False),
    "grant_qemu_vm_file_access, writable": (
        lambda path: grant_qemu_vm_file_access(path, writable=True),
        False,
    ),
    "ensure_traversable": (lambda path: ensure_traversable([path]), False),
}

NAMES = {
    "NUL": "a\0b",
    "lone surrogate": "a\ud800b",
    "byte that is no text": "a\udcffb",
    "300 characters": "x" * 300,
    "loop": "loop",
    "below a loop": "loop/x",
    "below a file": "file/x",
    "missing": "missing",
    "below missing": "missing/x",
}


def bad_path(folder: Path, kind: str) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").touch(mode=0o600)
    return "" if kind == "empty" else f"{folder}/{NAMES[kind]}"


@pytest.mark.parametrize("kind", ["empty", *NAMES])
@pytest.mark.parametrize("ask", ASKING)
async def test_a_bad_path_gives_the_negative_answer(scratch: Path, ask: str, kind: str) -> None:
    function, negative = ASKING[ask]
    path = bad_path(scratch, kind)
    modes = folder_modes(Path.cwd())

    assert await function(path) is negative
    assert folder_modes(Path.cwd()) == modes


def folder_modes(folder: Path) -> list[int]:
    return [parent.stat().st_mode for parent in (folder, *folder.parents)]


@pytest.mark.parametrize("kind", ["empty", *NAMES])
async def test_only_making_something_executable_raises(scratch: Path, kind: str) -> None:
    path = bad_path(scratch, kind)

    with pytest.raises(OSError, match="Errno") as caught:
        await chmod_executable(path)

    assert caught.value.filename == path


@pytest.mark.parametrize("kind", ["NUL", "lone surrogate", "300 characters", "below a loop"])
async def test_a_bad_name_below_a_run_directory_is_not_removed(scratch: Path, kind: str) -> None:
    run_directory = scratch / "run"
    run_directory.mkdir()
    mark_run_directory(run_directory)

    assert await sudo_rm(bad_path(run_directory, kind)) is False


@pytest.mark.parametrize("kind", ["NUL", "lone surrogate", "300 characters", "loop"])
def test_what_is_below_a_bad_folder_is_not_below_a_run_directory(scratch: Path, kind: str) -> None:
    mark_run_directory(scratch)

    assert is_below_run_directory(f"{bad_path(scratch, kind)}/x") is False


@pytest.mark.parametrize("name", ["file", "a/b"])
async def test_a_relative_path_in_a_folder_that_is_gone_leads_nowhere(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (scratch / "gone").mkdir()
    monkeypatch.chdir(scratch / "gone")
    (scratch / "gone").rmdir()

    assert await grant_qemu_vm_file_access(name) is False
    assert await grant_qemu_vm_access(name) is False


# As an ordinary user, below a folder that only root may look into

AS_AN_ORDINARY_USER = """
import asyncio, json, os, sys
from pytest_vmsandbox.host import permissions
from tests.host.test_bad_paths import ASKING
permissions.QEMU_VM_USER = "daemon"
async def main():
    seen = {}
    for path in sys.argv[1:]:
        for name, (ask, negative) in ASKING.items():
            try:
                seen[f"{name} {path}"] = await ask(path) is negative
            except Exception as error:
                seen[f"{name} {path}"] = repr(error)
    print(json.dumps([os.getuid(), seen]))
asyncio.run(main())
"""


@root_only
def test_an_ordinary_user_gets_a_no_for_what_is_hidden(scratch: Path) -> None:
    hidden = scratch / "hidden"
    (hidden / "folder").mkdir(parents=True)
    (hidden / "file").touch()
    hidden.chmod(0o700)
    paths = [hidden / "file", hidden / "missing", hidden / "folder" / "x"]

    done = subprocess.run(
        [*as_user("nobody"), sys.executable, "-c", AS_AN_ORDINARY_USER, *paths],
        cwd=CHECKOUT,
        env=plain_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "PermissionError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")

    assert done.returncode == 0, done.stderr
    uid, seen = json.loads(done.stdout)
    assert uid != 0
    assert {name: answer for name, answer in seen.items() if answer is not True} == {}
    assert len(seen) == len(ASKING) * len(paths)


# Names that say more than they should


@pytest.mark.parametrize("end", ["\f", "\v", "\r", "\x1c", "\x85", "\u2028", "\n"])
@pytest.mark.parametrize("entry", ["user:daemon:rwx", "mask::rwx"])
async def test_the_name_of_a_file_grants_nothing(tmp_path: Path, end: str, entry: str) -> None:
    file = tmp_path / f"a{end}{entry}{end}mask::rwx{end}"
    file.touch(mode=0o600)

    acl = await get_acl(file)

    assert acl == {"user::": "rw-", "group::": "---", "other::": "---"}
    assert not await verify_user_access(file, "daemon", "r")


# Symbolic links


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("written", ["link", "link/", "link/.", "dangling", "folder-link/"])
async def test_nothing_is_run_for_a_symbolic_link(
    stubs: Stubs, scratch: Path, *, written: str, writable: bool
) -> None:
    for program in ("chmod", "sudo", "setfacl"):
        stubs.put(program)
    closed = scratch / "closed"
    closed.mkdir(mode=0o700)
    (scratch / "precious").touch(mode=0o600)
    (closed / "link").symlink_to(scratch / "precious")
    (closed / "dangling").symlink_to(scratch / "nothing")
    (closed / "folder-link").symlink_to(scratch)

    assert await grant_qemu_vm_file_access(f"{closed}/{written}", writable=writable) is False
    assert await grant_qemu_vm_access(f"{closed}/{written}") is False

    assert [stubs.calls(program) for program in ("chmod", "sudo", "setfacl")] == [[], [], []]


@root_only
async def test_the_target_of_a_link_keeps_its_owner_and_its_mode(scratch: Path) -> None:
    precious = scratch / "precious"
    precious.touch(mode=0o600)
    (scratch / "link").symlink_to(precious)

    for writable in (False, True):
        assert await grant_qemu_vm_file_access(scratch / "link", writable=writable) is False

    seen = precious.stat()
    assert (seen.st_uid, stat.S_IMODE(seen.st_mode)) == (os.getuid(), 0o600)


# The probe for the user


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: it replaces /usr/bin/id for a child")
def test_both_streams_of_the_id_program_are_the_null_device(scratch: Path) -> None:
    stub = scratch / "id"
    look = "seen=$(readlink /proc/$$/fd/1 /proc/$$/fd/2)"
    stub.write_text(f'#!/bin/sh\n{look}\necho "$seen" > {scratch}/streams\n')
    stub.chmod(0o755)
    script = (
        "import asyncio\n"
        "from pytest_vmsandbox.host import permissions as p\n"
        "print(asyncio.run(p.probe_qemu_vm_user()))\n"
    )
    inside = 'mount --bind "$1" /usr/bin/id && exec "$2" -c "$3"'

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, "sh", stub, sys.executable, script],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("True\n", "")
    assert (scratch / "streams").read_text() == "/dev/null\n" * 2
