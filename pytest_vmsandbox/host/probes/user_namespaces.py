"""Whether a user namespace can be made here, and is worth anything once it is."""

from __future__ import annotations

from pathlib import Path

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

# What may forbid it, and the value that does (user_namespaces(7); Debian's and Ubuntu's own).
_SWITCHES = (
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "1"),
    ("/proc/sys/user/max_user_namespaces", "0", "15000"),
)


async def probe_user_namespaces(trial: Trial) -> Fact:
    """Unshare, map and mount inside."""
    if not trial.platform.is_linux:
        return unsupported(Capability.USER_NAMESPACES, trial.platform)
    return await probe_within(trial, Capability.USER_NAMESPACES, tier=Tier.USERNS, remedy=_remedy())


def _remedy() -> str:
    """The switch that is off here; only a hint, the kernel has been asked by trying."""
    for path, forbids, allows in _SWITCHES:
        try:
            found = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if found == forbids:
            name = path.removeprefix("/proc/sys/").replace("/", ".")
            return f"sudo sysctl -w {name}={allows}"
    return "start the container with user namespaces allowed (seccomp and AppArmor profiles)"
