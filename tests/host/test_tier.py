"""The tier that follows from facts: every combination that decides, none tried on a host."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from pytest_vmsandbox.host.facts import Capability, Fact, Tier, Verdict, fact_of
from pytest_vmsandbox.host.tier import candidate_tiers, choose_tier, missing_for

C = Capability


def facts_with(*present: Capability, jail: Tier | None) -> dict[Capability, Fact]:
    there = {*present, C.JAIL} if jail else set(present)
    return {
        capability: fact_of(
            capability,
            Verdict.OK if capability in there else Verdict.DENIED,
            evidence=f"tried {capability}",
            remedy="do",
            tier=jail if capability is C.JAIL else None,
        )
        for capability in Capability
    }


ALL = (C.SUDO, C.QEMU_VM_USER, C.SUDO_QEMU_VM, C.USER_NAMESPACES)


@pytest.mark.parametrize(
    ("uid", "present", "jail", "expected"),
    [
        (0, (), Tier.ROOT, Tier.ROOT),
        (0, ALL, Tier.ROOT, Tier.ROOT),
        (0, (C.USER_NAMESPACES,), Tier.USERNS, Tier.BARE),  # VMMs would be root's
        (0, (), None, Tier.BARE),
        (1000, ALL, Tier.SUDO, Tier.SUDO),
        (1000, (C.SUDO, C.QEMU_VM_USER), Tier.SUDO, Tier.SUDO),
        (1000, (C.SUDO,), Tier.SUDO, Tier.SUDO),  # VMMs run as a uid that nobody has
        (1000, (C.SUDO_QEMU_VM,), Tier.QEMU_VM, Tier.BARE),  # nobody to become
        (1000, (C.SUDO, C.USER_NAMESPACES), Tier.USERNS, Tier.USERNS),
        (1000, (C.SUDO_QEMU_VM, C.QEMU_VM_USER), Tier.QEMU_VM, Tier.QEMU_VM),
        (1000, (C.USER_NAMESPACES,), Tier.USERNS, Tier.USERNS),
        (1000, (C.USER_NAMESPACES,), None, Tier.BARE),
        (1000, (), None, Tier.BARE),
        (1000, ALL, Tier.ROOT, Tier.BARE),  # a jail of root's is none of ours
    ],
)
def test_the_tier_is_the_best_in_which_a_jail_was_built(
    uid: int, present: Collection[Capability], jail: Tier | None, expected: Tier
) -> None:
    choice = choose_tier(facts_with(*present, jail=jail), uid=uid)

    assert choice.tier is expected
    assert choice.reason


def test_candidates_come_best_first() -> None:
    facts = facts_with(*ALL, jail=None)

    assert candidate_tiers(facts, uid=1) == (Tier.SUDO, Tier.QEMU_VM, Tier.USERNS)
    assert candidate_tiers(facts, uid=0) == (Tier.ROOT, Tier.SUDO, Tier.QEMU_VM)


def test_the_reason_names_what_keeps_us_out_of_better_tiers() -> None:
    choice = choose_tier(facts_with(C.USER_NAMESPACES, jail=Tier.USERNS), uid=1000)

    assert choice.reason.startswith("tried user_namespaces")
    assert "sudo: VMS-SUDO-DENIED" in choice.reason
    assert "qemu-vm: VMS-SUDO-QEMU-VM-DENIED" in choice.reason


def test_the_reason_for_bare_is_what_was_seen() -> None:
    without_a_way = choose_tier(facts_with(jail=None), uid=1000)
    without_a_jail = choose_tier(facts_with(C.USER_NAMESPACES, jail=None), uid=1000)

    assert "tried user_namespaces" in without_a_way.reason
    assert "tried jail" in without_a_jail.reason


def test_what_a_tier_still_needs() -> None:
    facts = facts_with(C.SUDO, C.SUDO_QEMU_VM, jail=None)

    assert missing_for(Tier.SUDO, facts) == ()
    assert [fact.capability for fact in missing_for(Tier.QEMU_VM, facts)] == [C.QEMU_VM_USER]
    assert missing_for(Tier.ROOT, facts) == ()
    assert missing_for(Tier.BARE, facts) == ()
