"""Programs that are missing, hang, fail or print nonsense: never present, never late."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.host.facts import Capability, Fact, Tier, Verdict, fact_of
from pytest_vmsandbox.host.probes.image_builder import probe_image_builder
from pytest_vmsandbox.host.probes.jail import probe_jail
from pytest_vmsandbox.host.probes.kvm import probe_kvm
from pytest_vmsandbox.host.probes.nat import probe_nat
from pytest_vmsandbox.host.probes.qemu import probe_qemu
from pytest_vmsandbox.host.probes.qemu_vm_user import probe_qemu_vm_user
from pytest_vmsandbox.host.probes.setfacl import probe_setfacl
from pytest_vmsandbox.host.probes.sudo import probe_sudo, probe_sudo_qemu_vm
from pytest_vmsandbox.host.trial import Trial
from pytest_vmsandbox.host.way import interpreter

if TYPE_CHECKING:
    from tests.host.conftest import Stubs

pytestmark = pytest.mark.asyncio

QEMU = "qemu-system-x86_64"
USER_IS_THERE = fact_of(Capability.QEMU_VM_USER, Verdict.OK, evidence="qemu-vm is uid 4242")


async def qemu(trial: Trial) -> Fact:
    fact, build = await probe_qemu(trial)
    assert build is None
    return fact


async def kvm(trial: Trial) -> Fact:
    return await probe_kvm(trial, qemu=trial.find(QEMU))


async def nat(trial: Trial) -> Fact:
    return await probe_nat(trial, qemu=trial.find(QEMU))


async def sudo_qemu_vm(trial: Trial) -> Fact:
    return await probe_sudo_qemu_vm(trial, user=USER_IS_THERE)


async def jail_through_sudo(trial: Trial) -> Fact:
    return await probe_jail(trial, tier=Tier.SUDO)


Probe = Callable[[Trial], Coroutine[object, object, Fact]]

# The probe, and the programs that it runs, the one that misbehaves first.
PROBES: list[tuple[Probe, tuple[str, ...]]] = [
    (qemu, (QEMU,)),
    (kvm, (QEMU,)),
    (nat, (QEMU,)),
    (probe_sudo, ("sudo",)),
    (sudo_qemu_vm, ("sudo",)),
    (jail_through_sudo, ("sudo",)),
    (probe_qemu_vm_user, ("id",)),
    (probe_setfacl, ("setfacl", "getfacl")),
    (probe_setfacl, ("getfacl", "setfacl")),
    (probe_image_builder, ("apt-get", "dpkg-deb", "mke2fs")),
    (probe_image_builder, ("dpkg-deb", "apt-get", "mke2fs")),
    (probe_image_builder, ("mke2fs", "apt-get", "dpkg-deb")),
]
each_probe = pytest.mark.parametrize(
    ("probe", "programs"), PROBES, ids=[f"{probe.__name__}-{names[0]}" for probe, names in PROBES]
)


@each_probe
async def test_without_its_program_it_is_absent_and_says_which(
    probe: Probe, programs: tuple[str, ...], stub_trial: Trial, stubs: Stubs
) -> None:
    for other in programs[1:]:
        stubs.put(other)

    fact = await probe(stub_trial)

    assert not fact.present
    assert programs[0] in fact.evidence
    assert fact.remedy
    assert fact.verdict in (Verdict.MISSING, Verdict.UNUSABLE)


@each_probe
async def test_a_program_that_hangs_is_ended_in_time(
    probe: Probe, programs: tuple[str, ...], stub_trial: Trial, stubs: Stubs, hangs: str
) -> None:
    for other in programs[1:]:
        stubs.put(other, "echo something")
    stubs.put(programs[0], hangs)
    began = time.monotonic()

    fact = await probe(stub_trial)

    assert not fact.present
    assert fact.verdict is Verdict.TIMEOUT
    assert time.monotonic() - began < 50 * stub_trial.deadline_s  # and not for ever


@each_probe
async def test_a_program_that_fails_makes_it_absent(
    probe: Probe, programs: tuple[str, ...], stub_trial: Trial, stubs: Stubs
) -> None:
    for other in programs[1:]:
        stubs.put(other, "echo something")
    stubs.put(programs[0], "echo 'it is all broken' >&2; exit 3")

    fact = await probe(stub_trial)

    assert not fact.present
    assert "it is all broken" in fact.evidence or "exit 3" in fact.evidence


@each_probe
async def test_a_program_that_prints_nonsense_and_succeeds_makes_it_absent(
    probe: Probe, programs: tuple[str, ...], stub_trial: Trial, stubs: Stubs
) -> None:
    for other in programs[1:]:
        stubs.put(other, "echo something")
    stubs.put(programs[0], r"printf 'nonsense \377\000 {\"QMP\": 1}\n'")

    fact = await probe(stub_trial)

    assert not fact.present
    assert fact.verdict is Verdict.UNUSABLE


# Well-formed JSON of the wrong type, JSON that no parser gets to the end of, and no JSON at all.
NONSENSE: dict[str, bytes] = {
    "nothing": b"",
    "a number": b"1\n",
    "null": b"null\n" * 6,
    "true": b"true\n",
    "text": b'"text"\n',
    "a list": b"[]\n[1]\n",
    "an object": b"{}\n",
    "an object of lists": b'{"QMP": []}\n{"return": []}\n{"return": 1}\n{"return": null}\n',
    "events only": b'{"event": 1}\n' * 5,
    "a list of the right words": b'["event", "QMP", "return", "verdict"]\n',
    "wrong members": b'{"verdict": null, "evidence": []}\n',
    "a verdict of its own": b'{"verdict": "splendid", "evidence": "x"}\n',
    "brackets without end": b"[" * 200_000,
    "braces without end": b'{"a":' * 200_000,
    "a number without end": b"9" * 200_000,
    "half a surrogate": b'"\\ud800"\n',
    "no UTF-8": b"\xff\xfe\n",
    "zeros": b"\0" * 5000,
}


@each_probe
@pytest.mark.parametrize("printed", NONSENSE.values(), ids=NONSENSE)
async def test_an_answer_of_the_wrong_kind_makes_it_absent(
    probe: Probe, programs: tuple[str, ...], printed: bytes, stubs: Stubs, tmp_path: Path
) -> None:
    if probe is probe_qemu_vm_user and printed == b"1\n":
        pytest.skip("that is an answer of id")
    answer = tmp_path / "answer"
    answer.write_bytes(printed)
    for other in programs[1:]:
        stubs.put(other, "echo something")
    stubs.put(programs[0], f"exec /bin/cat {answer}")

    fact = await probe(Trial(run_dir=tmp_path, search_path=str(stubs.directory)))

    assert not fact.present
    assert fact.verdict is Verdict.UNUSABLE
    assert fact.evidence.encode()  # it can be printed


async def test_a_qemu_without_user_mode_networking_is_unusable(
    stub_trial: Trial, stubs: Stubs
) -> None:
    # As one says it that was built with --disable-slirp (net/net.c).
    complaint = "Parameter 'type' expects a netdev backend type"
    stubs.put(QEMU, f'echo "{complaint}" >&2; exit 1')

    fact = await nat(stub_trial)

    assert fact.code == "VMS-NAT-UNUSABLE"
    assert complaint in fact.evidence
    (arguments,) = stubs.calls(QEMU)
    assert "user,id=world" in arguments


async def test_a_qemu_that_ends_well_without_an_answer_proves_nothing(
    stub_trial: Trial, stubs: Stubs
) -> None:
    stubs.put(QEMU, "exit 0")

    assert (await nat(stub_trial)).code == "VMS-NAT-UNUSABLE"


async def test_a_sudo_that_makes_us_somebody_else_is_not_the_one_we_need(
    stubs: Stubs, tmp_path: Path
) -> None:
    stubs.put("sudo", "echo 65534")
    trial = Trial(run_dir=tmp_path, search_path=str(stubs.directory))

    assert (await probe_sudo(trial)).code == "VMS-SUDO-UNUSABLE"
    assert (await sudo_qemu_vm(trial)).code == "VMS-SUDO-QEMU-VM-UNUSABLE"


async def test_sudo_can_never_prompt(stubs: Stubs, tmp_path: Path) -> None:
    stubs.put("sudo", "(exec </dev/tty) 2>/dev/null && echo a terminal; cat; env; exit 1")
    trial = Trial(run_dir=tmp_path, search_path=f"{stubs.directory}:/usr/bin:/bin")

    fact = await probe_sudo(trial)

    assert not fact.present
    (arguments,) = stubs.calls("sudo")
    assert arguments[:2] == ["-n", "--"]
    outcome = await trial.run(["sudo", "x"])
    assert "a terminal" not in outcome.text
    assert "SUDO_ASKPASS" not in outcome.text


async def test_sudo_to_a_user_who_is_not_there_is_not_tried(
    stub_trial: Trial, stubs: Stubs
) -> None:
    stubs.put("sudo")
    nobody = fact_of(Capability.QEMU_VM_USER, Verdict.MISSING, evidence="none", remedy="make it")

    fact = await probe_sudo_qemu_vm(stub_trial, user=nobody)

    assert fact.code == "VMS-SUDO-QEMU-VM-MISSING"
    assert stubs.calls("sudo") == []


async def test_an_interpreter_out_of_the_other_users_reach_is_named(
    stubs: Stubs, tmp_path: Path
) -> None:
    stubs.put("sudo", 'echo "sudo: unable to execute $2: Permission denied" >&2; exit 1')
    trial = Trial(run_dir=tmp_path, search_path=str(stubs.directory))

    fact = await sudo_qemu_vm(trial)

    assert fact.code == "VMS-SUDO-QEMU-VM-UNUSABLE"
    assert interpreter(Tier.QEMU_VM) in fact.remedy
