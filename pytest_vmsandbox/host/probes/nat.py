"""Whether addresses can be translated, in a network namespace."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import Trial, unsupported

_REMEDY = "vmsandbox setup (apt-get install nftables)"


async def probe_nat(trial: Trial, *, tier: Tier) -> Fact:
    """Load a masquerade rule with nft and read it back."""
    if not trial.platform.is_linux:
        return unsupported(Capability.NAT, trial.platform)
    return await probe_within(trial, Capability.NAT, tier=tier, remedy=_REMEDY)
