"""`vmsandbox doctor`: its text, its JSON, its exit status."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import pytest

from pytest_vmsandbox.cli import doctor
from pytest_vmsandbox.host.facts import (
    Accel,
    Capability,
    HostFacts,
    Tier,
    Verdict,
    fact_of,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VMSANDBOX_REQUIRE", raising=False)


def run_doctor(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(words))


def facts_in(tier: Tier, *absent: Capability) -> HostFacts:
    facts = {
        name: fact_of(
            name,
            Verdict.MISSING if name in absent else Verdict.OK,
            evidence=f"evidence of {name}",
            remedy=f"remedy of {name}",
        )
        for name in Capability
    }
    return HostFacts(
        facts=facts, tier=tier, tier_reason="so it is", accel=Accel.TCG, accel_reason="slow"
    )


def test_the_json_is_one_object_that_facts_can_be_read_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = run_doctor("--json")

    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert set(report) == {
        *("schema", "tier", "tier_reason", "accel", "accel_reason", "time_scale", "qemu", "facts"),
        *("next_tier", "next_tier_needs"),
    }
    assert HostFacts.from_json(report).tier == report["tier"]
    assert [fact["capability"] for fact in report["facts"]] == [name.value for name in Capability]


def test_the_text_names_every_capability(capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor()

    text = capsys.readouterr().out
    assert all(f" {name}" in text for name in Capability)
    assert text.startswith("tier ")


def test_strict_fails_only_for_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor("--json")
    facts = HostFacts.from_json(json.loads(capsys.readouterr().out))
    present = [name for name in Capability if facts[name].present]
    absent = [name for name in Capability if not facts[name].present]

    assert run_doctor("--strict", "--require", ",".join(present)) == 0
    assert run_doctor("--strict") == (1 if absent else 0)
    for name in absent[:1]:
        assert run_doctor("--strict", "--require", name) == 1
        assert run_doctor("--require", name) == 0


def test_what_is_required_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSANDBOX_REQUIRE", "kvm, tap")
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)

    assert parser.parse_args([]).require == (Capability.KVM, Capability.TAP)


def test_an_unknown_capability_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_doctor("--require", "kvm,warp")

    complaint = capsys.readouterr().err
    assert "warp" in complaint
    assert "image_builder" in complaint


def test_an_absent_capability_is_shown_with_evidence_code_and_remedy() -> None:
    text = doctor.render(facts_in(Tier.USERNS, Capability.SUDO_QEMU_VM))

    assert "evidence of sudo_qemu_vm  (for tier qemu-vm)" in text
    assert "VMS-SUDO-QEMU-VM-MISSING" in text
    assert "try: remedy of sudo_qemu_vm" in text
    assert "remedy of tap" not in text


@pytest.mark.parametrize(
    ("tier", "absent", "expected"),
    [
        (Tier.ROOT, (), None),
        (Tier.ROOT, tuple(Capability), None),
        (Tier.SUDO, (), None),
        (Tier.QEMU_VM, (Capability.SUDO,), Tier.SUDO),
        (Tier.USERNS, (Capability.SUDO, Capability.SUDO_QEMU_VM), Tier.QEMU_VM),
        (Tier.USERNS, (Capability.SUDO,), Tier.SUDO),
        (Tier.BARE, (Capability.USER_NAMESPACES, Capability.SUDO), Tier.USERNS),
    ],
)
def test_the_next_tier_is_the_nearest_that_something_blocks(
    tier: Tier, absent: tuple[Capability, ...], expected: Tier | None
) -> None:
    facts = facts_in(tier, *absent)

    report = doctor.to_report(facts)

    assert report["next_tier"] == expected
    assert ("to unlock" in doctor.render(facts)) == (expected is not None)


def test_a_doctor_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    run_doctor()

    assert list(scratch.iterdir()) == []
