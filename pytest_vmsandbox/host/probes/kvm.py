"""Whether KVM runs guest code here: the small guest must count to its end, at KVM's speed."""

from __future__ import annotations

from pathlib import Path

from pytest_vmsandbox.host.acceleration import (
    KVM_REMEDY,
    SmallGuestRun,
    first_complaint,
    gave_up,
    run_small_guest,
)
from pytest_vmsandbox.host.facts import Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.small_guest import CHUNKS
from pytest_vmsandbox.host.trial import Trial, unsupported

_DEVICE = "/dev/kvm"

# QEMU's words when it could not open the device (accel/kvm/kvm-all.c, kvm_init).
_REFUSALS = (
    (b"No such file or directory", Verdict.MISSING, "enable virtualisation; modprobe kvm"),
    (b"Permission denied", Verdict.DENIED, "vmsandbox setup (a udev rule), then log in again"),
)


async def probe_kvm(trial: Trial, *, qemu: Path | None) -> Fact:
    """UNCONFIRMED where the small guest ran: only a kernel can tell the rest (`confirm_kvm`)."""
    if not trial.platform.is_linux or trial.platform.machine != "x86_64":
        return unsupported(Capability.KVM, trial.platform)
    if qemu is None:
        return fact_of(
            Capability.KVM,
            Verdict.MISSING,
            evidence=f"no {trial.platform.qemu_program} to try {_DEVICE} with",
            remedy="vmsandbox setup",
        )
    return judge_kvm(await run_small_guest(trial, qemu=qemu, accelerator="kvm"))


def judge_kvm(run: SmallGuestRun) -> Fact:
    """The fact that follows from a run of the small guest under KVM."""
    if run.finished:
        return fact_of(
            Capability.KVM,
            Verdict.UNCONFIRMED,
            evidence=f"the small guest ran ({run.counted.chunk_s * 1e6:.0f} us a chunk); "
            "no kernel tried yet",
        )
    outcome = run.outcome
    if gave_up(outcome.stderr):
        return fact_of(
            Capability.KVM,
            Verdict.UNUSABLE,
            evidence=f"the small guest died: {first_complaint(outcome.stderr)}",
            remedy=KVM_REMEDY,
        )
    if outcome.timed_out and outcome.stdout and run.counted.chunks < CHUNKS // 2:
        # A chunk takes microseconds under a real KVM. Where the host is itself a guest, or KVM
        # emulates in software, it takes half a second, and a kernel would take minutes. Who got
        # half-way was only started late, by a busy host.
        return fact_of(
            Capability.KVM,
            Verdict.UNUSABLE,
            evidence=f"{_DEVICE} opens and a guest starts, but crawls: "
            f"{run.counted.chunks} of {CHUNKS} chunks in the time given",
            remedy=KVM_REMEDY,
        )
    for words, verdict, remedy in _REFUSALS:
        if not outcome.timed_out and words in outcome.stderr:
            evidence = f"{_DEVICE}: {words.decode()}"
            return fact_of(Capability.KVM, verdict, evidence=evidence, remedy=remedy)
    return fact_of(
        Capability.KVM,
        Verdict.TIMEOUT if outcome.timed_out else Verdict.UNUSABLE,
        evidence=f"the small guest did not end as it must: {_ending(run)}",
        remedy=KVM_REMEDY,
    )


def _ending(run: SmallGuestRun) -> str:
    outcome = run.outcome
    ending = outcome.error or ("no end" if outcome.timed_out else f"exit {outcome.returncode}")
    return f"{ending}, {first_complaint(outcome.stderr)}"
