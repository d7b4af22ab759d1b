"""Privileges: other users, capabilities, and set-user-id programs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.escape.attempts.calls import libc, syscall
from tests.escape.attempts.table import Refused, Targets, attempt

_PR_GET_SECCOMP, _PR_GET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _RAISE = 21, 39, 47, 2
_SET_USER_ID = ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount", "/usr/bin/sudo")


def _status(pid: int | str = "self") -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


@attempt("become root (setuid)")
def setuid(targets: Targets) -> str:
    os.setresuid(0, 0, 0)
    return "it is root"


@attempt("join the group of root (setgid)")
def setgid(targets: Targets) -> str:
    os.setresgid(0, 0, 0)
    return "its group is root's"


@attempt("join other groups (setgroups)")
def setgroups(targets: Targets) -> str:
    os.setgroups([0, 4, 6])
    return f"it is in {os.getgroups()}"


@attempt("use a capability that it has kept, or could get back")
def capabilities(targets: Targets) -> str:
    status = _status()
    sets = {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    if not any(int(value, 16) for value in sets.values()):
        raise Refused("all sets are empty")
    return f"{sets}"


@attempt("take capabilities (capset)")
def capset(targets: Targets) -> str:
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    chown = (1).to_bytes(4, "little")
    syscall("capset", header, chown + chown + bytes(16))
    return "took one"


@attempt("raise an ambient capability")
def ambient(targets: Targets) -> str:
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    chown = (1).to_bytes(4, "little")
    syscall("capset", header, chown * 3 + bytes(12))
    libc("prctl", _PR_CAP_AMBIENT, _RAISE, 0, 0, 0)
    return "raised one"


@attempt("run a set-user-id program as its owner")
def set_user_id(targets: Targets) -> str:
    for program in filter(os.path.exists, _SET_USER_ID):
        with subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as started:
            try:
                for _ in range(100):
                    if _status(started.pid)["Name"] == Path(program).name:
                        break
                    time.sleep(0.01)
                uid = _status(started.pid).get("Uid", "").split()
                if len(uid) > 1 and uid[1] == "0":
                    return f"{program} runs as root"
            finally:
                started.kill()
    raise Refused("none became root")


@attempt("gain privileges by exec (no no_new_privs)")
def new_privileges(targets: Targets) -> str:
    if libc("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0):
        raise Refused("no_new_privs is set")
    return "an exec may"


@attempt("call what no filter looks at (no seccomp)")
def no_filter(targets: Targets) -> str:
    if _status()["Seccomp"] != "0":
        raise Refused("there is a filter")
    return "there is no filter"


@attempt("change its personality (no address randomization)")
def personality(targets: Targets) -> str:
    libc("personality", 0x0040000)
    return "changed it"


@attempt("make the kernel spare it when memory is short", by_host=True)
def spare_me(targets: Targets) -> str:
    with open("/proc/self/oom_score_adj", "r+") as file:
        lower = int(file.read()) - 1
        file.seek(0)
        file.write(str(lower))
    return f"it is at {lower}"
