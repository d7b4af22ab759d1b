"""Whether a jail can be built here: namespaces, a read-only bind, pivot_root."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

_REMEDY = "vmsandbox doctor shows which tier is nearest; in a container add --privileged"


async def probe_jail(trial: Trial, *, tier: Tier) -> Fact:
    """Build the smallest jail in the way of the tier, and look out of it."""
    if not trial.platform.is_linux:
        return unsupported(Capability.JAIL, trial.platform)
    return await probe_within(trial, Capability.JAIL, tier=tier, remedy=_REMEDY)
