"""The tier: how the warden is started here, chosen from facts alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.facts import Capability, Fact, HostFacts, Tier

# What a tier stands on, beside a jail that was built in its way. ROOT stands on being uid 0. Where
# the warden is root it does without the user qemu-vm: VMMs then get a uid that nobody has.
STANDS_ON: Mapping[Tier, tuple[Capability, ...]] = {
    Tier.ROOT: (),
    Tier.SUDO: (Capability.SUDO,),
    Tier.QEMU_VM: (Capability.SUDO_QEMU_VM, Capability.QEMU_VM_USER),
    Tier.USERNS: (Capability.USER_NAMESPACES,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChoice:
    """The tier, and one line that says why it and not a better one."""

    tier: Tier
    reason: str


def candidate_tiers(facts: Mapping[Capability, Fact], *, uid: int) -> tuple[Tier, ...]:
    """The tiers whose way of starting the warden is open to `uid`, best first; BARE apart."""
    return tuple(
        tier
        for tier, needed in STANDS_ON.items()
        if _is_for(tier, uid=uid) and all(fact.present for fact in _facts_named(facts, needed))
    )


def choose_tier(facts: Mapping[Capability, Fact], *, uid: int) -> TierChoice:
    """The best tier that is open to `uid` and in whose way a jail was really built."""
    jail = facts[Capability.JAIL]
    open_to_us = candidate_tiers(facts, uid=uid)
    if jail.present and jail.tier in open_to_us:
        return TierChoice(tier=jail.tier, reason=_reason(facts, jail.tier, uid=uid))
    if not open_to_us:
        blocked = facts[Capability.USER_NAMESPACES]
        return TierChoice(tier=Tier.BARE, reason=f"no way to build walls: {blocked.evidence}")
    return TierChoice(tier=Tier.BARE, reason=f"no jail could be built: {jail.evidence}")


def require_tier(wanted: str, facts: HostFacts, *, uid: int | None = None) -> Tier:
    """The tier by that name, or the best one for `auto`; HostUnfit where we can't have it."""
    uid = os.getuid() if uid is None else uid
    if wanted == "auto":
        return facts.tier
    tier = Tier(wanted)
    if tier is Tier.BARE:
        return tier
    for capability in (*STANDS_ON[tier], Capability.JAIL):
        facts.require(capability)
    if not _is_for(tier, uid=uid):
        whose = "root" if tier is Tier.ROOT else "ordinary users, or VMMs would run as root"
        raise HostUnfit(
            f"VMS-TIER-{tier.upper()}",
            f"the tier {tier}",
            f"it is for {whose}, and we are uid {uid}",
            "run pytest as another user, or leave the tier to `auto`",
        )
    return tier


def require_walls(wanted: str, facts: HostFacts) -> Tier:
    """The same for what must not go without walls: HostUnfit in the tier BARE as well."""
    tier = require_tier(wanted, facts)
    if tier is Tier.BARE:
        facts.require(Capability.JAIL)
        raise HostUnfit(
            "VMS-TIER-BARE",
            "walls",
            "the tier bare, which was asked for, has none",
            "leave the tier to `auto`",
        )
    return tier


def missing_for(tier: Tier, facts: Mapping[Capability, Fact]) -> tuple[Fact, ...]:
    """The facts that keep this host out of `tier`; empty for a tier that only root is in."""
    return tuple(fact for fact in _facts_named(facts, STANDS_ON.get(tier, ())) if not fact.present)


def _is_for(tier: Tier, *, uid: int) -> bool:
    match tier:
        case Tier.ROOT:
            return uid == 0
        case Tier.USERNS:
            return uid != 0  # a warden of root's is no rootless one, and VMMs would be root's
    return True


def _facts_named(
    facts: Mapping[Capability, Fact], capabilities: tuple[Capability, ...]
) -> tuple[Fact, ...]:
    return tuple(facts[capability] for capability in capabilities)


def _reason(facts: Mapping[Capability, Fact], tier: Tier, *, uid: int) -> str:
    shown = ", ".join(fact.evidence for fact in _facts_named(facts, STANDS_ON[tier]))
    better = [other for other in STANDS_ON if other is not Tier.ROOT or uid == 0]
    lost = [
        f"{other}: {fact.code}"
        for other in better[: better.index(tier)]
        for fact in missing_for(other, facts)[:1]
    ]
    because = "we are uid 0" if tier is Tier.ROOT else shown
    return f"{because} (not {'; not '.join(lost)})" if lost else because
