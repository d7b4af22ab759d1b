"""Rights: what decides, outside our own files, what this process may do on this host.

Read, not tried, and cheap: when any of it changes, facts that were found before prove nothing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Lines of proc_pid_status(5): root in a container may have few capabilities, and sudo works for
# nobody who may gain no privileges.
_STATUS = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Seccomp_filters")

# The profile of AppArmor or context of SELinux; which users there are for us.
_PROFILE = Path("/proc/self/attr/current")
_USER_NAMESPACE = Path("/proc/self/ns/user")

_SYSCTLS = tuple(
    Path("/proc/sys", name)
    for name in (
        "kernel/apparmor_restrict_unprivileged_userns",
        "kernel/unprivileged_userns_clone",  # Debian's own
        "user/max_user_namespaces",
    )
)
_DEVICES = (Path("/dev/kvm"), Path("/dev/net/tun"))
_ACCOUNTS = tuple(Path("/etc", name) for name in ("passwd", "group", "sudoers", "sudoers.d"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """All of it, as text and numbers that are compared and never interpreted.

    What is not there, or can't be read, is as good as empty.
    """

    status: tuple[str, ...]
    profile: str
    user_namespace: str
    sysctls: tuple[str, ...]
    devices: tuple[tuple[int, ...], ...]
    accounts: tuple[tuple[int, ...], ...]


def read_rights() -> Rights:
    """The rights of this process at this moment."""
    return Rights(
        status=_status(),
        profile=_read(_PROFILE),
        user_namespace=_link(_USER_NAMESPACE),
        sysctls=tuple(map(_read, _SYSCTLS)),
        devices=tuple(map(_state, _DEVICES)),
        accounts=tuple(map(_state, _ACCOUNTS)),
    )


def _status() -> tuple[str, ...]:
    lines = _read(Path("/proc/self/status")).splitlines()
    return tuple(line for line in lines if line.partition(":")[0] in _STATUS)


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _link(path: Path) -> str:
    with suppress(OSError):
        return str(path.readlink())
    return ""


def _state(path: Path) -> tuple[int, ...]:
    """Whose it is, who may what, and when that or its content last changed.

    The time of the last change of status moves with that of the content, and when an ACL is set.
    """
    with suppress(OSError):
        seen = path.stat()
        return (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_ctime_ns)
    return ()
