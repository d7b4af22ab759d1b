"""Whether a control group can be made that limits anything."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

_REMEDY = "systemd-run --user --scope -p Delegate=yes pytest ..."


async def probe_cgroups(trial: Trial, *, tier: Tier) -> Fact:
    """Make one, limit it, put a process in it, remove it."""
    if not trial.platform.is_linux:
        return unsupported(Capability.CGROUPS, trial.platform)
    return await probe_within(
        trial, Capability.CGROUPS, tier=tier, remedy=_REMEDY, in_namespaces=False
    )
