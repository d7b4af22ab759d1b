"""Facts: their codes, their JSON form, and what they require."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.facts import (
    NEEDS,
    Accel,
    Capability,
    Fact,
    HostFacts,
    QemuBuild,
    Tier,
    Verdict,
    capability_of,
    code_of,
    doctor_shows,
    fact_of,
)

HOSTS_PAGE = Path(__file__).parents[2] / "docs/hosts.md"
PACKAGE = Path(__file__).parents[2] / "pytest_vmsandbox"


def facts_of(*absent: Capability) -> HostFacts:
    facts = {
        capability: fact_of(
            capability,
            Verdict.MISSING if capability in absent else Verdict.OK,
            evidence=f"looked for {capability}",
            remedy=f"install {capability}",
            tier=Tier.USERNS if capability is Capability.JAIL else None,
        )
        for capability in Capability
    }
    return HostFacts(
        facts=facts,
        tier=Tier.USERNS,
        tier_reason="a reason",
        accel=Accel.TCG,
        accel_reason="another",
        time_scale=1.5,
        qemu=QemuBuild(path="/q", version="7.2.0", machines=("q35",), accelerators=("tcg",)),
    )


def test_facts_survive_json_and_pickle() -> None:
    facts = facts_of(Capability.KVM)

    again = HostFacts.from_json(json.loads(json.dumps(facts.to_json())))

    assert again == facts
    assert pickle.loads(pickle.dumps(again)) == facts


def test_facts_without_a_qemu_survive_json() -> None:
    form = {**facts_of().to_json(), "qemu": None}

    assert HostFacts.from_json(form).qemu is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"tier": "royal"},
        {"tier": 1},
        {"accel": "magic"},
        {"time_scale": "fast"},
        {"facts": []},
        {"facts": [1]},
        {"facts": None},
        {"qemu": {}},
    ],
    ids=str,
)
def test_another_form_is_refused(change: dict[str, object]) -> None:
    form = {**facts_of().to_json(), **change}

    with pytest.raises(ValueError):  # noqa: PT011 -- enums raise it too
        HostFacts.from_json(form)


@pytest.mark.parametrize("form", [None, [], {}, "facts"])
def test_what_is_no_form_is_refused(form: object) -> None:
    with pytest.raises(ValueError, match="not the facts"):
        HostFacts.from_json(form)


def test_what_is_there_may_be_required() -> None:
    facts_of(Capability.KVM).require(Capability.QEMU)


def test_what_is_missing_is_required_with_code_evidence_and_remedy() -> None:
    with pytest.raises(HostUnfit) as caught:
        facts_of(Capability.KVM).require(Capability.KVM)

    error = caught.value
    assert error.code == "VMS-KVM-MISSING"
    assert error.need == NEEDS[Capability.KVM]
    assert (error.evidence, error.remedy) == ("looked for kvm", "install kvm")


@pytest.mark.parametrize("verdict", Verdict)
def test_only_what_worked_is_present(verdict: Verdict) -> None:
    fact = fact_of(Capability.TAP, verdict, evidence="seen", remedy="do")

    assert fact.present == (verdict in (Verdict.OK, Verdict.UNCONFIRMED))
    assert fact.verdict is verdict
    assert (fact.remedy == "") == fact.present


def test_a_replaced_fact_leaves_the_others() -> None:
    kvm = fact_of(Capability.KVM, Verdict.UNUSABLE, evidence="died", remedy="none")

    changed = facts_of().with_fact(kvm)

    assert changed[Capability.KVM] is kvm
    assert changed[Capability.TAP].present


def test_facts_that_ran_out_of_time_are_not_settled() -> None:
    late = fact_of(Capability.SUDO, Verdict.TIMEOUT, evidence="late", remedy="again")

    assert facts_of(Capability.KVM).settled
    assert not facts_of().with_fact(late).settled


def test_capabilities_are_the_words_of_the_public_face() -> None:
    assert {capability.value for capability in Capability} == {
        *("qemu", "kvm", "qemu_vm_user", "sudo", "sudo_qemu_vm", "setfacl", "user_namespaces"),
        *("jail", "bridge", "tap", "nat", "cgroups", "image_builder"),
    }
    assert set(NEEDS) == set(Capability)


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    page = HOSTS_PAGE.read_text(encoding="utf-8")
    words = {word for line in page.splitlines() for word in line.split("`")[1::2]}

    stems = {code_of(capability, Verdict.OK).removesuffix("-OK") for capability in Capability}
    assert stems <= words
    assert {f"-{verdict.upper()}" for verdict in Verdict} <= words
    codes = {word for word in words if word.startswith("VMS-")} - stems
    others = {code for code in codes if capability_of(code) is None}
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("**/*.py"))
    assert {code for code in others if f'"{code}"' not in source} == set()


def test_a_code_names_capability_and_verdict() -> None:
    assert code_of(Capability.SUDO_QEMU_VM, Verdict.DENIED) == "VMS-SUDO-QEMU-VM-DENIED"


@pytest.mark.parametrize("capability", Capability)
def test_a_code_is_about_one_capability(capability: Capability) -> None:
    for verdict in Verdict:
        assert capability_of(code_of(capability, verdict)) is capability
        assert doctor_shows(code_of(capability, verdict))


@pytest.mark.parametrize("code", ["", "VMS-SUDO", "VMS-SUDO-", "VMS-SUDO-DENIED\n", "X-SUDO-OK"])
def test_another_code_is_about_none(code: str) -> None:
    assert capability_of(code) is None


@pytest.mark.parametrize("code", ["VMS-TIER-BARE", "VMS-WARDEN-ROOT", "VMS-WALLS-UNUSABLE"])
def test_what_is_about_walls_is_no_line_of_the_doctors(code: str) -> None:
    assert capability_of(code) is Capability.JAIL
    assert not doctor_shows(code)


def test_a_fact_is_frozen() -> None:
    fact: Fact = facts_of()[Capability.KVM]

    with pytest.raises(AttributeError):
        fact.present = False  # type: ignore[misc]  # that is the point
