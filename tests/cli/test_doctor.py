"""`vmsandbox doctor`: its text, its JSON, its exit status."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path

import pytest

from pytest_vmsandbox.cli import doctor
from pytest_vmsandbox.host import acceleration, survey
from pytest_vmsandbox.host.facts import (
    Accel,
    Capability,
    Fact,
    HostFacts,
    Tier,
    Verdict,
    fact_of,
)
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.host.remember import remember
from pytest_vmsandbox.host.survey import recall_host
from pytest_vmsandbox.host.trial import Trial, start_trial
from pytest_vmsandbox.image.manifest import Manifest
from pytest_vmsandbox.lease.bases import default_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VMSANDBOX_REQUIRE", raising=False)
    monkeypatch.delenv("VMSANDBOX_CACHE_DIR", raising=False)


UNCONFIRMED = fact_of(Capability.KVM, Verdict.UNCONFIRMED, evidence="the small guest ran")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small guest runs under KVM here, whatever this host's KVM is like."""

    async def probe(_trial: Trial, *, qemu: Path | None) -> Fact:
        assert qemu is not None
        return UNCONFIRMED

    if shutil.which(current_platform().qemu_program) is None:
        pytest.skip("takes QEMU")
    monkeypatch.setattr(survey, "probe_kvm", probe)


def remembered(cache_dir: Path, kvm: Fact) -> None:
    """As if a run of tests had found this of KVM."""
    key = survey._key(start_trial(run_dir=default_base()))
    facts = facts_in(Tier.BARE).with_fact(kvm)
    remember(cache_dir, key, facts)


def kvm_in(cache_dir: Path) -> Fact:
    facts = recall_host(cache_dir=cache_dir, run_dir=default_base())
    assert facts is not None
    return facts[Capability.KVM]


def put_image(cache_dir: Path, *, architecture: str) -> Path:
    """An image whose kernel is none: a real QEMU says so at once."""
    directory = cache_dir / "images" / f"broken-{architecture}"
    directory.mkdir(parents=True)
    for name in ("kernel", "initramfs"):
        (directory / name).write_text("no kernel")
    manifest = Manifest(
        name="broken",
        architecture=architecture,
        kernel="kernel",
        initramfs="initramfs",
        command_line=("quiet",),
        kernel_release="0",
    )
    (directory / "manifest.json").write_text(manifest.render())
    return directory


def test_without_a_kernel_to_try_what_one_said_before_still_holds(
    tmp_path: Path, ran: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = acceleration._kernel_failed("a kernel crawls", b"")
    remembered(tmp_path, said)

    status = run_doctor("--json", "--strict", "--require=kvm", f"--cache-dir={tmp_path}")

    report = json.loads(capsys.readouterr().out)
    assert status == 1
    assert report["accel"] == "tcg"
    assert HostFacts.from_json(report)[Capability.KVM] == said
    assert kvm_in(tmp_path) == said


def test_a_kvm_that_booted_a_kernel_stays_confirmed(tmp_path: Path, ran: None) -> None:
    said = fact_of(Capability.KVM, Verdict.OK, evidence="a kernel started its first process")
    remembered(tmp_path, said)

    assert run_doctor("--strict", "--require=kvm", f"--cache-dir={tmp_path}") == 0
    assert kvm_in(tmp_path) == said


@pytest.mark.parametrize("verdict", [Verdict.DENIED, Verdict.MISSING, Verdict.UNUSABLE])
def test_what_the_small_guest_said_before_does_not_outlive_its_next_word(
    tmp_path: Path, ran: None, verdict: Verdict
) -> None:
    remembered(tmp_path, fact_of(Capability.KVM, verdict, evidence="the small guest died"))

    run_doctor(f"--cache-dir={tmp_path}")

    assert kvm_in(tmp_path) == UNCONFIRMED


def test_a_kvm_that_no_kernel_was_tried_on_is_missing_to_who_is_strict(
    tmp_path: Path, ran: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_doctor("--strict", "--require=kvm", f"--cache-dir={tmp_path}") == 1
    assert "asked for and missing: kvm" in capsys.readouterr().err
    assert run_doctor("--require=kvm", f"--cache-dir={tmp_path}") == 0


def test_the_kernel_of_an_image_in_the_cache_is_tried(
    tmp_path: Path, ran: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered(tmp_path, fact_of(Capability.KVM, Verdict.OK, evidence="an older kernel did"))
    put_image(tmp_path, architecture=platform.machine())
    monkeypatch.setenv("VMSANDBOX_CACHE_DIR", str(tmp_path))

    status = run_doctor("--strict", "--require=kvm")

    assert status == 1
    assert kvm_in(tmp_path).code == "VMS-KVM-UNUSABLE"
    assert "the small guest ran, but" in kvm_in(tmp_path).evidence


def test_an_image_for_another_processor_is_not_tried(tmp_path: Path, ran: None) -> None:
    put_image(tmp_path, architecture="s390x" if platform.machine() != "s390x" else "x86_64")

    run_doctor(f"--cache-dir={tmp_path}")

    assert kvm_in(tmp_path) == UNCONFIRMED


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
        *("next_tier", "next_tier_needs", "notes"),
    }
    assert HostFacts.from_json(report).tier == report["tier"]
    assert [fact["capability"] for fact in report["facts"]] == [name.value for name in Capability]


def test_the_text_names_every_capability(capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor()

    text = capsys.readouterr().out
    assert all(f" {name}" in text for name in Capability)
    assert text.startswith("tier ")


def test_what_is_suspected_of_networks_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor()
    text = capsys.readouterr().out
    run_doctor("--json")
    notes = json.loads(capsys.readouterr().out)["notes"]

    assert [note["name"] for note in notes] == ["forward_policy", "bridge_netfilter"]
    for note in notes:
        assert f"note {note['name']}: {note['value']} ({note['evidence']})" in text
        assert note["matters"] in text


def test_strict_fails_only_for_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    run_doctor("--json")
    facts = HostFacts.from_json(json.loads(capsys.readouterr().out))
    present = [name for name in Capability if facts[name].present and name is not Capability.KVM]
    absent = [name for name in Capability if not facts[name].present]

    assert run_doctor("--strict", "--require", ",".join(present)) == 0
    lacks_a_need = {Capability.QEMU, Capability.IMAGE_BUILDER} & set(absent)
    assert run_doctor("--strict") == (1 if lacks_a_need else 0)
    assert run_doctor("--strict", "--require", "") == 0
    for name in absent[:1]:
        assert run_doctor("--strict", "--require", name) == 1
        assert run_doctor("--require", name) == 0


@pytest.mark.parametrize(
    ("words", "named", "expected"),
    [
        ([], None, "qemu, image_builder"),
        ([], "kvm, tap", "kvm, tap"),
        ([], "", None),
        (["--require="], None, None),
        (["--require="], "kvm", None),
        (["--require=nat"], "kvm", "nat"),
        (["--require=nat"], "warp", "nat"),
    ],
)
def test_what_is_asked_for_and_missing_is_named(
    words: list[str],
    named: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def nothing(**_: object) -> HostFacts:
        return facts_in(Tier.BARE, *Capability)

    monkeypatch.setattr(doctor, "examine", nothing)
    if named is not None:
        monkeypatch.setenv("VMSANDBOX_REQUIRE", named)

    plain = run_doctor(*words)
    status = run_doctor("--strict", *words)

    assert plain == 0
    assert status == (0 if expected is None else 1)
    complaint = capsys.readouterr().err
    if expected is None:
        assert complaint == ""
    else:
        assert complaint == f"vmsandbox doctor: asked for and missing: {expected}\n"


def test_a_wrong_word_in_the_environment_is_met_by_strict_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMSANDBOX_REQUIRE", "kvm,warp")

    assert run_doctor() == 0
    assert run_doctor("--strict") == 2
    complaint = capsys.readouterr().err
    assert "VMSANDBOX_REQUIRE" in complaint
    assert "warp" in complaint


def test_an_unknown_capability_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_doctor("--require", "kvm,warp")

    complaint = capsys.readouterr().err
    assert "warp" in complaint
    assert "image_builder" in complaint


def test_an_absent_capability_is_shown_with_evidence_code_and_remedy() -> None:
    text = doctor.render(facts_in(Tier.USERNS, Capability.SUDO_QEMU_VM))

    assert "evidence of qemu_vm_user  (for tier qemu-vm)" in text  # sudo does without
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
