"""Whether a tap can be made, in a network namespace."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

_REMEDY = "modprobe tun; sudo chmod 0666 /dev/net/tun"


async def probe_tap(trial: Trial, *, tier: Tier) -> Fact:
    """Make one: that /dev/net/tun opens proves nothing."""
    if not trial.platform.is_linux:
        return unsupported(Capability.TAP, trial.platform)
    return await probe_within(trial, Capability.TAP, tier=tier, remedy=_REMEDY)
