"""What would refuse the warden a VMM's walls refuses the probe `jail`, in the same words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import pytest

from pytest_vmsandbox.host.probes import inside_jail
from pytest_vmsandbox.linux.libc import _CALLS, _MACHINES
from tests.people import CHECKOUT, plain_environment

PROGRAM = Path(inside_jail.__file__).read_text(encoding="utf-8")
PYTHON = str(Path(sys.executable).resolve())

# The program's last arguments, by the tier's rights.
Way: TypeAlias = tuple[str, ...]
ROOTFUL: Way = ()
ROOTLESS: Way = ("userns",)

NOBODY = ("setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", "--inh-caps=-all")
FILTERED = f"""
import os, sys
sys.path.insert(0, {str(CHECKOUT)!r})
from pytest_vmsandbox.linux.seccomp import deny_system_calls
deny_system_calls(sys.argv[1:2])
os.execv(sys.argv[2], sys.argv[2:])
"""

as_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root")


def probe(*before: str, way: Way, program: str = PROGRAM) -> tuple[str, str]:
    """What the program reports when it is started through `before`."""
    done = subprocess.run(
        [*before, PYTHON, "-I", "-S", "-", "jail", "20", os.defpath, *way],
        input=program,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    return report["verdict"], report["evidence"]


@pytest.fixture
def way() -> Way:
    """The way of whoever runs these tests; a jail can be had in it."""
    way = ROOTFUL if os.getuid() == 0 else ROOTLESS
    verdict, evidence = probe(way=way)
    if verdict != "ok":
        pytest.skip(f"takes a jail: {evidence}")
    return way


@pytest.mark.parametrize(
    "call", ["mount_setattr", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount"]
)
def test_a_filter_that_refuses_one_of_the_warden_s_calls_is_named(call: str, way: Way) -> None:
    verdict, evidence = probe(PYTHON, "-c", FILTERED, call, way=way)

    assert verdict == "denied"
    assert evidence.startswith(f"[Errno 1] {call}: Operation not permitted")


def test_a_filter_that_refuses_nothing_of_it_is_no_hindrance(way: Way) -> None:
    assert probe(PYTHON, "-c", FILTERED, "kexec_load", way=way)[0] == "ok"


def test_a_kernel_without_mount_setattr_is_named(way: Way) -> None:
    old = PROGRAM.replace('"mount_setattr": 442', '"mount_setattr": 100442')  # not one's number

    verdict, evidence = probe(way=way, program=old)

    assert old != PROGRAM
    assert (verdict, evidence) == (
        "unusable",
        "[Errno 38] mount_setattr: Function not implemented: '/'",
    )


def test_root_of_one_id_only_can_be_no_warden_of_root_s() -> None:
    in_namespace = ("unshare", "--user", "--map-root-user")
    if subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("takes user namespaces")

    verdict, evidence = probe(*in_namespace, way=ROOTFUL)

    assert (verdict, evidence) == ("denied", "[Errno 1] setgroups: Operation not permitted")


@as_root
@pytest.mark.parametrize(
    ("missing", "evidence"),
    [
        ("sys_admin", "[Errno 1] unshare: Operation not permitted"),
        ("setgid", "[Errno 1] setgroups: Operation not permitted"),
        ("setuid", "[Errno 1] write '"),
    ],
)
def test_root_without_a_capability_that_it_takes_can_be_no_warden(
    missing: str, evidence: str
) -> None:
    found = probe("setpriv", f"--bounding-set=-{missing}", way=ROOTFUL)

    assert found[0] == "denied"
    assert found[1].startswith(evidence)


@as_root
def test_a_masked_proc_hinders_who_is_not_root_and_nobody_else() -> None:
    if probe(*NOBODY, way=ROOTLESS)[0] != "ok":
        pytest.skip("takes user namespaces for ordinary users")
    masked = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc/irq && exec "$@"', "sh")

    ordinary = probe(*masked, *NOBODY, way=ROOTLESS)
    root = probe(*masked, way=ROOTFUL)

    assert ordinary == ("denied", "[Errno 1] mount proc: Operation not permitted: '/proc'")
    assert root[0] == "ok"


@as_root
def test_without_the_user_qemu_vm_there_is_a_uid_that_nobody_has(way: Way) -> None:
    unknown = PROGRAM.replace('VMM_USER = "qemu-vm"', 'VMM_USER = "vmsandbox-nobody"')
    refused = unknown.replace("os.setgroups(groups)", "os._exit(report(lambda: str(uid)))")

    assert probe(way=way, program=unknown)[0] == "ok"
    assert probe(way=way, program=refused) == ("ok", str(inside_jail.free_uid()))


def test_a_usr_that_can_be_written_is_noticed_and_nothing_is_written(way: Way) -> None:
    writable = PROGRAM.replace(
        "mount_setattr(usr, attributes=inert | MOUNT_ATTR_RDONLY)",
        "mount_setattr(usr, attributes=inert)",
    ).replace("mount_setattr(root, attributes=MOUNT_ATTR_RDONLY)", "")
    before = Path("/usr").stat()

    found = probe(way=way, program=writable)

    assert writable != PROGRAM
    assert found == ("unusable", "/usr was bound read-only and could be written")
    assert Path("/usr").stat()[:7] + Path("/usr").stat()[8:] == before[:7] + before[8:]


def test_it_calls_by_the_numbers_that_the_warden_uses() -> None:
    machine = os.uname().machine
    if machine not in _MACHINES:
        pytest.skip(f"no numbers are known on {machine}")

    place = _MACHINES.index(machine)
    used = {name: _CALLS[name].numbers[place] for name in inside_jail.NUMBERS}

    assert used == inside_jail.NUMBERS
