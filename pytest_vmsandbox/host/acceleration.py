"""Acceleration: what runs the guest's instructions here, and how fast TCG is."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.facts import Accel, Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.parent_death import dying_with_us
from pytest_vmsandbox.host.platform import Platform
from pytest_vmsandbox.host.program import Outcome, run_program
from pytest_vmsandbox.host.small_guest import (
    CHUNKS,
    EXIT_STATUS,
    Counted,
    parse_counted,
    small_guest_arguments,
    small_guest_firmware,
)
from pytest_vmsandbox.host.trial import Trial
from pytest_vmsandbox.host.unnamed_file import STDIN, open_unnamed_file, path_in_child

# A chunk of the small guest under QEMU 7.2's TCG on the machine on which the deadlines were
# chosen: two vCPUs of an AMD EPYC (family 26, 2.6 GHz) in a cloud, Linux 6.18, Debian 12.
REFERENCE_CHUNK_S = 0.000_30

# The kernel's last word before user space (init/main.c, run_init_process).
_MILESTONE = re.compile(rb"Run \S+ as init process")

# QEMU then stops the machine and lives on (accel/kvm/kvm-all.c, kvm_handle_internal_error).
_KVM_GAVE_UP = (b"KVM internal error", b"KVM: entry failed", b"error: kvm run failed")

# Appended, so that the milestone is printed whatever the caller's own words are; the kernel
# takes the last of each. A panic then ends QEMU (-no-reboot) instead of the deadline.
_LOUD = "console=ttyS0 loglevel=7 panic=-1"

_LOOK_EVERY_S = 0.02

_KERNEL_FAILED = "the small guest ran, but "

KVM_REMEDY = (
    "use a host whose KVM boots an unmodified kernel (bare metal, or a VM with nested "
    "virtualisation); --vm-accel=tcg works without"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelChoice:
    """The accelerator, and one line that says why it and not another."""

    accel: Accel
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallGuestRun:
    """One run of the small guest: how QEMU ended, and what the guest told before."""

    outcome: Outcome
    counted: Counted

    @property
    def finished(self) -> bool:
        """Whether every chunk was counted and the guest ended QEMU itself."""
        return self.outcome.returncode == EXIT_STATUS and self.counted.chunks == CHUNKS


def choose_accel(kvm: Fact, platform: Platform) -> AccelChoice:
    """KVM where what was tried of it worked, else TCG."""
    if not platform.is_linux:
        reason = f"this version accelerates on Linux only, and this is {platform.system}"
        return AccelChoice(accel=Accel.TCG, reason=reason)
    accel = Accel.KVM if kvm.present else Accel.TCG
    return AccelChoice(accel=accel, reason=f"{kvm.code}: {kvm.evidence}")


async def run_small_guest(trial: Trial, *, qemu: Path, accelerator: str) -> SmallGuestRun:
    """Run the small guest under the accelerator, within the trial's deadline for guests."""
    outcome = await trial.run(
        [*dying_with_us(), qemu, *small_guest_arguments(STDIN, accelerator=accelerator)],
        stdin=small_guest_firmware(),
        deadline=Deadline.after(seconds=trial.guest_deadline_s),
    )
    return SmallGuestRun(outcome=outcome, counted=parse_counted(outcome.stdout))


async def measure_time_scale(trial: Trial, *, qemu: Path) -> float:
    """How much slower TCG is here than on the reference machine; 1 where it is not, or unknown."""
    if trial.platform.machine != "x86_64":
        return 1.0
    run = await run_small_guest(trial, qemu=qemu, accelerator="tcg")
    if not run.counted.chunks:
        return 1.0
    return round(max(1.0, run.counted.chunk_s / REFERENCE_CHUNK_S), 2)


async def confirm_kvm(
    *,
    qemu: Path,
    kernel: Path,
    initramfs: Path,
    command_line: str,
    deadline_s: float = 2.5,
    cpu: str = "host",
) -> Fact:
    """Boot a real kernel under KVM until it starts its first process.

    The fact is OK, or UNUSABLE with what was seen; QEMU is gone in either case, and at the latest
    a moment after `deadline_s`.
    """
    argv = [
        str(qemu), "-M", "q35", "-accel", "kvm", "-cpu", cpu, "-m", "256",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-kernel", str(kernel), "-initrd", str(initramfs),
        "-append", f"{command_line} {_LOUD}",
    ]  # fmt: skip
    return await watch_kernel(argv, deadline_s=deadline_s)


async def watch_kernel(qemu_argv: Sequence[str], *, deadline_s: float) -> Fact:
    """Run QEMU until its guest's kernel starts init on the console, or fails to, and end it."""
    with open_unnamed_file() as console, open_unnamed_file() as complaints:
        argv = [
            # The shell becomes QEMU. The complaints go to a file because QEMU lives on after
            # them, and waiting for its end would cost the whole deadline.
            "/bin/sh", "-c", 'exec "$@" 2>"$0"', str(path_in_child(complaints)),
            *dying_with_us(), *qemu_argv, "-serial", f"file:{path_in_child(console)}",
        ]  # fmt: skip
        # Its deadline is the second line: at ours we have looked, and end it ourselves.
        boot = asyncio.create_task(
            run_program(
                argv,
                deadline_s=deadline_s + _LOOK_EVERY_S * 10,
                pass_fds=(console.fileno(), complaints.fileno()),
            )
        )
        try:
            return await _wait_verdict(boot, console, complaints, deadline_s=deadline_s)
        finally:
            boot.cancel()  # which kills and reaps QEMU
            # Not `await boot`: that ends alike where `boot` was cancelled and where we are.
            await asyncio.wait({boot})


async def _wait_verdict(
    boot: asyncio.Task[Outcome], console: IO[bytes], complaints: IO[bytes], *, deadline_s: float
) -> Fact:
    deadline = Deadline.after(seconds=deadline_s)
    while True:
        over = boot.done() or deadline.passed  # asked first: a last look is taken after the end
        said, complained = _read(console), _read(complaints)
        if _MILESTONE.search(said):
            took_s = deadline_s - deadline.left_s
            return fact_of(
                Capability.KVM,
                Verdict.OK,
                evidence=f"a kernel started its first process after {took_s:.1f} s under KVM",
            )
        if gave_up(complained):
            return _kernel_failed(f"a kernel died: {first_complaint(complained)}", said)
        if boot.done():
            return _kernel_failed(f"QEMU ended: {first_complaint(complained)}", said)
        if over:
            return _kernel_failed(f"a kernel crawls: no init after {deadline_s:.1f} s", said)
        await asyncio.sleep(_LOOK_EVERY_S)


def is_said_by_kernel(kvm: Fact) -> bool:
    """Whether it was a kernel that decided, and not the small guest before it."""
    return kvm.verdict is Verdict.OK or kvm.evidence.startswith(_KERNEL_FAILED)


def _kernel_failed(what: str, console: bytes) -> Fact:
    last = _last_line(console) or "nothing"
    return fact_of(
        Capability.KVM,
        Verdict.UNUSABLE,
        evidence=f"{_KERNEL_FAILED}{what}; last on its console: {last}",
        remedy=KVM_REMEDY,
    )


def _read(file: IO[bytes]) -> bytes:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def _lines(text: bytes) -> list[str]:
    return [line for line in text.decode(errors="backslashreplace").splitlines() if line.strip()]


def gave_up(complaints: bytes) -> bool:
    """Whether KVM itself gave up running the guest, as QEMU's stderr tells."""
    return any(words in complaints for words in _KVM_GAVE_UP)


def first_complaint(text: bytes) -> str:
    """What QEMU died of, in its words; warnings of missing CPU features are not that."""
    told = [line for line in _lines(text) if "warning:" not in line]
    return told[0].strip() if told else "without a word"


def _last_line(text: bytes) -> str:
    told = _lines(text)
    return told[-1].strip() if told else ""
