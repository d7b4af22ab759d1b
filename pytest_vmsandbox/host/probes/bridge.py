"""Whether a bridge can be made, in a network namespace."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

_REMEDY = "modprobe bridge"


async def probe_bridge(trial: Trial, *, tier: Tier) -> Fact:
    """Make one, up, by netlink."""
    if not trial.platform.is_linux:
        return unsupported(Capability.BRIDGE, trial.platform)
    return await probe_within(trial, Capability.BRIDGE, tier=tier, remedy=_REMEDY)
