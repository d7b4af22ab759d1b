"""Every constant of the room against the kernel's and the C library's own headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from enum import IntEnum, IntFlag
from importlib.util import find_spec
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import (
    AT_FDCWD,
    AtFlags,
    Capabilities,
    CloneFlags,
    EventFDFlags,
    MountAttrFlags,
    MountFlags,
    MountSetattrFlags,
    MoveMountFlags,
    OpenTreeFlags,
    PidFDFlags,
    PrctlOption,
    ResolveFlags,
    SecureBits,
    UmountFlags,
    keyring,
    seccomp,
)
from pytest_vmsandbox.linux import capabilities as capabilities_module
from pytest_vmsandbox.linux import libc as libc_module
from pytest_vmsandbox.linux.prctl import _CAP_AMBIENT_RAISE

MOUNT = ("linux/fcntl.h", "linux/mount.h")
ENUMS: dict[type[IntFlag | IntEnum], tuple[tuple[str, ...], str]] = {
    AtFlags: (("linux/fcntl.h",), "AT_"),
    CloneFlags: (("linux/sched.h",), "CLONE_"),
    EventFDFlags: (("sys/eventfd.h",), "EFD_"),
    MountAttrFlags: (MOUNT, "MOUNT_ATTR_"),
    MountFlags: (MOUNT, "MS_"),
    MountSetattrFlags: (MOUNT, "AT_"),
    MoveMountFlags: (MOUNT, "MOVE_MOUNT_"),
    OpenTreeFlags: (MOUNT, "OPEN_TREE_|AT_"),
    PidFDFlags: (("linux/fcntl.h", "linux/pidfd.h"), "PIDFD_"),
    PrctlOption: (("linux/prctl.h",), "PR_"),
    ResolveFlags: (("linux/openat2.h",), "RESOLVE_"),
    SecureBits: (("linux/securebits.h",), "SECBIT_"),
    UmountFlags: (("sys/mount.h",), "MNT_|UMOUNT_"),
}
FAMILIES = ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK")
AUDIT, SECCOMP, KEYCTL = ("linux/audit.h",), ("linux/seccomp.h",), ("linux/keyctl.h",)
OWN_WORDS = {"NS_FLAGS", "UNSHARE_FLAGS", "PROPAGATION", "KERNEL_ONLY"}

Headers = tuple[str, ...]


def _expected() -> dict[tuple[Headers, str], int]:
    """Each name that a header should have, and the value that we give it."""
    found: dict[tuple[Headers, str], int] = {
        (("linux/fcntl.h",), "AT_FDCWD"): AT_FDCWD,
        (("linux/prctl.h",), "PR_CAP_AMBIENT_RAISE"): _CAP_AMBIENT_RAISE,
        (KEYCTL, "KEYCTL_JOIN_SESSION_KEYRING"): keyring._KEYCTL_JOIN_SESSION_KEYRING,
        (("linux/capability.h",), "_LINUX_CAPABILITY_VERSION_3"): capabilities_module._VERSION_3,
        (AUDIT, "AUDIT_ARCH_X86_64"): seccomp._AUDIT_ARCH["x86_64"],
        (AUDIT, "AUDIT_ARCH_AARCH64"): seccomp._AUDIT_ARCH["aarch64"],
        (SECCOMP, "SECCOMP_MODE_FILTER"): seccomp._MODE_FILTER,
        (SECCOMP, "SECCOMP_RET_KILL_PROCESS"): seccomp._RET_KILL_PROCESS,
        (SECCOMP, "SECCOMP_RET_ERRNO"): seccomp._RET_ERRNO,
        (SECCOMP, "SECCOMP_RET_ALLOW"): seccomp._RET_ALLOW,
    }
    for enum, (headers, prefix) in ENUMS.items():
        names = [name for name in enum.__members__ if re.match(prefix, name)]
        found |= {(headers, name): int(enum[name]) for name in names}
    for name, bit in Capabilities.__members__.items():
        if name.startswith("CAP_"):
            found[("linux/capability.h",), name] = int(bit).bit_length() - 1
    return found


EXPECTED = _expected()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Headers, str], int]:
    """What a C program, compiled on this host, prints for each name that its headers have."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("VMS-TEST-NO-CC: no C compiler for the installed headers; apt install gcc")
    room = tmp_path_factory.mktemp("headers")
    found: dict[tuple[Headers, str], int] = {}
    for headers in sorted({headers for headers, _name in EXPECTED}):
        names = [name for own, name in EXPECTED if own == headers]
        source, program = room / "print.c", room / "print"
        source.write_text(_printing_program(headers, names), encoding="utf-8")
        subprocess.run([compiler, "-o", program, source], check=True)
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        for line in printed.splitlines():
            name, value = line.split()
            found[headers, name] = int(value)
    return found


def _printing_program(headers: Headers, names: list[str]) -> str:
    includes = "".join(f"#include <{header}>\n" for header in (*headers, "stdio.h"))
    prints = "".join(
        f'#ifdef {name}\nprintf("{name} %lld\\n", (long long)({name}));\n#endif\n' for name in names
    )
    return f"#define _GNU_SOURCE\n{includes}int main(void) {{\n{prints}return 0;\n}}\n"


@pytest.mark.parametrize(("headers", "name"), sorted(EXPECTED), ids=str)
def test_a_constant_equals_the_one_in_the_installed_headers(
    headers: Headers, name: str, installed: dict[tuple[Headers, str], int]
) -> None:
    if (headers, name) not in installed:
        pytest.skip(f"VMS-TEST-OLD-HEADERS: <{headers[-1]}> has no {name}")

    # MS_NOUSER is 1 << 31, which is negative as a C int and a bit like others to the kernel.
    assert installed[headers, name] % 2**32 == EXPECTED[headers, name] % 2**32
    assert installed[headers, name] in {EXPECTED[headers, name], EXPECTED[headers, name] - 2**32}


@pytest.mark.parametrize("enum", ENUMS)
def test_a_short_name_means_what_its_long_one_means(enum: type[IntFlag | IntEnum]) -> None:
    _headers, prefix = ENUMS[enum]
    # MOUNT_ATTR__ATIME has two underscores in the header.
    long_names = {
        re.sub(prefix, "", name, count=1).lstrip("_"): name
        for name in enum.__members__
        if re.match(prefix, name)
    }
    short_names = set(enum.__members__) - set(long_names.values())

    for name in short_names - OWN_WORDS:
        assert enum[name] == enum[long_names[name]], name


def test_a_name_that_several_enums_have_is_one_number() -> None:
    # Of those that come from one header, only one is compared with it.
    numbers: dict[str, set[int]] = {}
    for enum, (_headers, prefix) in ENUMS.items():
        for name in filter(re.compile(prefix).match, enum.__members__):
            numbers.setdefault(name, set()).add(int(enum[name]))

    assert {name for name, different in numbers.items() if len(different) > 1} == set()


@pytest.mark.parametrize("machine", libc_module._MACHINES)
def test_call_numbers_are_those_of_each_machines_headers(machine: str, tmp_path: Path) -> None:
    names = {name: name for name in libc_module._CALLS} | {"eventfd": "eventfd2"}
    place = libc_module._MACHINES.index(machine)
    claims = {
        f"__NR_{names[name]}": call.numbers[place] for name, call in libc_module._CALLS.items()
    }

    assert _refuted(claims, ("asm/unistd.h",), machine=machine, room=tmp_path) == []


@pytest.mark.parametrize("machine", seccomp._MACHINES)
def test_numbers_of_denied_and_checked_calls_are_those_of_the_headers(
    machine: str, tmp_path: Path
) -> None:
    place = seccomp._MACHINES.index(machine)
    claims = {
        f"__NR_{name}": number
        for name, numbers in seccomp._DENIED.items()
        if (number := numbers[place]) is not None
    }
    checked = ("ioctl", "fcntl", "clone", "clone3", "personality", "socket", "socketpair")
    claims |= {
        f"__NR_{name}": check.numbers[place]
        for name, check in zip(checked, seccomp._CHECKS, strict=True)
    }
    absent = {f"__NR_{name}" for name, numbers in seccomp._DENIED.items() if numbers[place] is None}

    assert _refuted(claims, ("asm/unistd.h",), machine=machine, room=tmp_path) == []
    assert _defined(absent, machine=machine, room=tmp_path) == []


@pytest.mark.parametrize("machine", seccomp._MACHINES)
def test_the_words_of_a_filter_are_those_of_the_headers(machine: str, tmp_path: Path) -> None:
    includes = ("linux/filter.h", "linux/seccomp.h", "stddef.h", "sys/socket.h", "asm/ioctls.h")
    claims = {
        "BPF_LD|BPF_W|BPF_ABS": seccomp._LOAD_WORD,
        "BPF_JMP|BPF_JEQ|BPF_K": seccomp._JUMP_EQUAL,
        "BPF_JMP|BPF_JGE|BPF_K": seccomp._JUMP_AT_LEAST,
        "BPF_JMP|BPF_JSET|BPF_K": seccomp._JUMP_ANY_BIT,
        "BPF_RET|BPF_K": seccomp._RETURN,
        "offsetof(struct seccomp_data, nr)": seccomp._NR,
        "offsetof(struct seccomp_data, arch)": seccomp._ARCH,
        "offsetof(struct seccomp_data, args)": seccomp._ARGS,
        **dict(zip(("TIOCSTI", "TIOCLINUX"), seccomp._TERMINAL_INPUT, strict=True)),
        **dict(zip(FAMILIES, seccomp._FAMILIES, strict=True)),
    }

    assert _refuted_expressions(claims, includes, machine=machine, room=tmp_path) == []


def test_constants_equal_those_of_the_newest_headers_at_hand(tmp_path: Path) -> None:
    of_the_kernel = {own for own, _name in EXPECTED if own[-1].startswith("linux/")}
    refuted = [
        name
        for own in sorted(of_the_kernel)
        for name in _refuted(
            {name: value for (its, name), value in EXPECTED.items() if its == own},
            own,
            machine="x86_64",
            room=tmp_path,
        )
    ]

    assert refuted == []


def test_the_check_against_headers_notices_a_wrong_value(tmp_path: Path) -> None:
    claims = {"CLONE_NEWNS": int(CloneFlags.NEWNS), "CLONE_NEWPID": 7}

    refuted = _refuted(claims, ("linux/sched.h",), machine="x86_64", room=tmp_path)

    assert refuted == ["CLONE_NEWPID"]


def _refuted(claims: dict[str, int], headers: Headers, *, machine: str, room: Path) -> list[str]:
    """Those of `claims` that the headers in ziglang contradict; what they lack is not one."""
    asserts = "".join(
        f"#ifdef {name}\n{_assertion(name, value, says=name)}#endif\n"
        for name, value in claims.items()
    )
    return _failing(asserts, headers, machine=machine, room=room)


def _refuted_expressions(
    claims: dict[str, int], headers: Headers, *, machine: str, room: Path
) -> list[int]:
    """The places in `claims` of those that the headers contradict, or can't make sense of."""
    asserts = "".join(
        _assertion(text, value, says=str(place))
        for place, (text, value) in enumerate(claims.items())
    )
    return [int(place) for place in _failing(asserts, headers, machine=machine, room=room)]


def _defined(names: set[str], *, machine: str, room: Path) -> list[str]:
    """Those of `names` that the headers of `machine` have."""
    asserts = "".join(
        f'#ifdef {name}\n_Static_assert(0, "refuted {name}");\n#endif\n' for name in sorted(names)
    )
    return _failing(asserts, ("asm/unistd.h",), machine=machine, room=room)


def _assertion(text: str, value: int, *, says: str) -> str:
    mask = _mask(value)
    return f'_Static_assert((({text}) & {mask}LL) == {value & mask}LL, "refuted {says}");\n'


def _failing(asserts: str, headers: Headers, *, machine: str, room: Path) -> list[str]:
    """What the assertions that fail say."""
    if find_spec("ziglang") is None:
        pytest.skip("VMS-TEST-NO-ZIG: ziglang, with every machine's headers, is not installed")
    source = room / "claims.c"
    includes = "".join(f"#include <{header}>\n" for header in headers)
    source.write_text(includes + asserts, encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu"),
            *("-ferror-limit=0", "-c", "-o", room / "claims.o", source),
        ],
        env=os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(room)},
        capture_output=True,
        text=True,
        check=False,
    )
    refuted = re.findall(r"error: static assertion failed.*\"?refuted (\w+)", done.stderr)
    assert refuted or done.returncode == 0, done.stderr
    return refuted


def _mask(value: int) -> int:
    return 2**32 - 1 if -(2**31) <= value < 2**32 else 2**63 - 1
