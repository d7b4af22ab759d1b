"""Whether a jail can be built here: by the warden's own system calls, for the VMMs' user."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

_REMEDY = "vmsandbox doctor shows which tier is nearest; in a container add --privileged"


async def probe_jail(trial: Trial, *, tier: Tier) -> Fact:
    """Launch into the smallest jail in the way of the tier, and look out of it."""
    if not trial.platform.is_linux:
        return unsupported(Capability.JAIL, trial.platform)
    return await probe_within(trial, Capability.JAIL, tier=tier, remedy=_REMEDY)
