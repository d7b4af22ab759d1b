"""Acceleration: the small guest and a real kernel, under TCG and under the KVM of this host."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host import acceleration
from pytest_vmsandbox.host.acceleration import (
    SmallGuestRun,
    choose_accel,
    confirm_kvm,
    measure_time_scale,
    run_small_guest,
    watch_kernel,
)
from pytest_vmsandbox.host.facts import Accel, Capability, Verdict, fact_of
from pytest_vmsandbox.host.platform import Platform
from pytest_vmsandbox.host.probes.kvm import judge_kvm, probe_kvm
from pytest_vmsandbox.host.program import Outcome
from pytest_vmsandbox.host.small_guest import (
    CHUNKS,
    EXIT_STATUS,
    Counted,
    small_guest_arguments,
    small_guest_firmware,
)
from pytest_vmsandbox.host.trial import Trial, start_trial
from pytest_vmsandbox.linux import ProcessIdentity

QEMU = Path(shutil.which("qemu-system-x86_64") or "/no/qemu")

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(not QEMU.exists(), reason="takes qemu-system-x86_64"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="takes an x86_64 host"),
]
takes_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="takes a /dev/kvm that opens"
)

LINUX = Platform(system="linux", machine="x86_64")


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return start_trial(run_dir=tmp_path)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Debian kernel: the host's, or downloaded."""
    for candidate in sorted(Path("/boot").glob("vmlinuz-*")):
        if os.access(candidate, os.R_OK):
            return candidate
    folder = tmp_path_factory.mktemp("kernel")
    newest = "apt-cache depends --important linux-image-cloud-amd64"
    its_name = "sed -n 's/.*Depends: \\(linux-image-[0-9]\\)/\\1/p'"
    fetch = f"apt-get download $({newest} | {its_name}) && dpkg-deb -x linux-image-*.deb ."
    done = subprocess.run(
        ["sh", "-c", fetch], cwd=folder, capture_output=True, timeout=120, check=False
    )
    if done.returncode:
        pytest.skip(f"takes a Debian kernel from apt: {done.stderr.decode()[-200:]}")
    return next((folder / "boot").glob("vmlinuz-*"))


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest: an /init that the kernel starts, and that fails at once."""
    archive = tmp_path_factory.mktemp("initramfs") / "initramfs"
    content = b""
    for name, mode, data in (("init", 0o100755, b"#!/nothing\n"), ("TRAILER!!!", 0, b"")):
        fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        content += header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4)
    archive.write_bytes(content)
    return archive


def kernel_argv(kernel: Path, initramfs: Path, *, accelerator: str, words: str) -> list[str]:
    return [
        *(str(QEMU), "-M", "q35", "-accel", accelerator, "-m", "256", "-nodefaults"),
        *("-no-reboot", "-display", "none", "-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", words),
    ]


async def test_the_small_guest_counts_to_its_end_under_tcg(trial: Trial) -> None:
    run = await run_small_guest(trial, qemu=QEMU, accelerator="tcg")

    assert run.finished, run.outcome
    assert 0 < run.counted.chunk_s < 0.05


async def test_the_time_scale_is_never_below_one(trial: Trial) -> None:
    assert await measure_time_scale(trial, qemu=QEMU) >= 1.0
    assert await measure_time_scale(trial, qemu=Path("/bin/false")) == 1.0


@takes_kvm
async def test_kvm_is_tried_by_running_the_small_guest(trial: Trial) -> None:
    began = time.monotonic()

    fact = await probe_kvm(trial, qemu=QEMU)

    assert time.monotonic() - began < 3 * trial.guest_deadline_s
    if fact.present:
        assert fact.verdict is Verdict.UNCONFIRMED
        assert "no kernel tried yet" in fact.evidence
    else:
        assert "crawls" in fact.evidence or "died" in fact.evidence


def run_of(
    *, returncode: int | None = None, chunks: int = 0, stdout: bytes = b"", stderr: bytes = b""
) -> SmallGuestRun:
    outcome = Outcome(
        argv=("qemu",),
        returncode=returncode,
        stdout=stdout,
        stderr=stderr,
        timed_out=returncode is None,
    )
    return SmallGuestRun(outcome=outcome, counted=Counted(chunks=chunks, chunk_s=1e-6))


@pytest.mark.parametrize(
    ("run", "verdict", "evidence"),
    [
        (run_of(returncode=EXIT_STATUS, chunks=CHUNKS), Verdict.UNCONFIRMED, "no kernel tried"),
        (run_of(returncode=EXIT_STATUS, chunks=CHUNKS - 1), Verdict.UNUSABLE, "did not end"),
        (run_of(returncode=0, chunks=CHUNKS), Verdict.UNUSABLE, "did not end"),
        (run_of(stdout=b"xx", chunks=3), Verdict.UNUSABLE, f"3 of {CHUNKS}"),
        (run_of(), Verdict.TIMEOUT, "no end"),
        (run_of(stdout=b"xx", chunks=CHUNKS - 1), Verdict.TIMEOUT, "no end"),
        (
            run_of(returncode=1, stderr=b"Could not access KVM: Permission denied"),
            Verdict.DENIED,
            "Permission denied",
        ),
        (
            run_of(returncode=1, stderr=b"Could not access KVM: No such file or directory"),
            Verdict.MISSING,
            "No such file",
        ),
        (
            run_of(stdout=b"xx", stderr=b"q: warning: x\nKVM internal error. Suberror: 1\n"),
            Verdict.UNUSABLE,
            "KVM internal error. Suberror: 1",
        ),
    ],
    ids=lambda value: value.value if isinstance(value, Verdict) else "",
)
async def test_a_run_under_kvm_is_judged(
    run: SmallGuestRun, verdict: Verdict, evidence: str
) -> None:
    fact = judge_kvm(run)

    assert fact.verdict is verdict
    assert evidence in fact.evidence


async def test_another_platform_is_told_plainly_that_it_is_unsupported(tmp_path: Path) -> None:
    arm = Platform(system="linux", machine="aarch64")
    fact = await probe_kvm(Trial(run_dir=tmp_path, search_path="", platform=arm), qemu=QEMU)

    assert fact.code == "VMS-KVM-UNSUPPORTED"
    assert choose_accel(fact, arm).accel is Accel.TCG
    assert "aarch64" in choose_accel(fact, arm).reason


@pytest.mark.parametrize("verdict", Verdict)
async def test_kvm_is_chosen_only_where_it_worked(verdict: Verdict) -> None:
    kvm = fact_of(Capability.KVM, verdict, evidence="what was seen")
    mac = Platform(system="darwin", machine="aarch64")

    choice = choose_accel(kvm, LINUX)

    assert (choice.accel is Accel.KVM) == kvm.present
    assert "what was seen" in choice.reason
    assert choose_accel(kvm, mac).accel is Accel.TCG


async def test_a_kernel_that_starts_init_is_seen_to(kernel: Path, initramfs: Path) -> None:
    words = "console=ttyS0 loglevel=7"
    argv = kernel_argv(kernel, initramfs, accelerator="tcg", words=words)

    fact = await watch_kernel(argv, deadline_s=60)

    assert fact.code == "VMS-KVM-OK"
    assert "first process" in fact.evidence


async def test_a_kernel_that_crawls_is_given_up_at_the_deadline(
    kernel: Path, initramfs: Path
) -> None:
    argv = kernel_argv(kernel, initramfs, accelerator="tcg", words="console=ttyS0")
    began = time.monotonic()

    fact = await watch_kernel([*argv, "-S"], deadline_s=0.5)  # -S: the guest never starts

    assert fact.code == "VMS-KVM-UNUSABLE"
    assert "crawls" in fact.evidence
    assert time.monotonic() - began < 10


async def test_a_qemu_that_ends_is_seen_at_once_with_its_words() -> None:
    fact = await watch_kernel([str(QEMU), "-M", "no-such-machine"], deadline_s=30)

    assert "no-such-machine" in fact.evidence or "unsupported machine type" in fact.evidence
    assert fact.code == "VMS-KVM-UNUSABLE"


async def test_a_caller_cancelled_while_qemu_is_ended_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def boots_and_is_cancelled_with_its_caller(
        argv: Sequence[str], *, deadline_s: float, pass_fds: Sequence[int]
    ) -> Outcome:
        assert len(pass_fds) == 2
        Path(argv[-1].removeprefix("file:")).write_text("Run /init as init process")
        try:
            await asyncio.sleep(deadline_s)
        finally:
            caller.cancel()
        raise AssertionError("it was not cancelled")

    monkeypatch.setattr(acceleration, "run_program", boots_and_is_cancelled_with_its_caller)
    caller = asyncio.create_task(watch_kernel(["qemu"], deadline_s=30))

    with pytest.raises(asyncio.CancelledError):
        await caller


IN_THE_MIDDLE = """
import asyncio, sys
from pathlib import Path
from pytest_vmsandbox.host.acceleration import run_small_guest, watch_kernel
from pytest_vmsandbox.host.trial import Trial
what, qemu = sys.argv[1:]
trial = Trial(run_dir=Path.cwd(), search_path="/usr/bin", guest_deadline_s=60)
if what == "small guest":
    asyncio.run(run_small_guest(trial, qemu=Path(qemu), accelerator="tcg"))
else:
    asyncio.run(watch_kernel([qemu, "-M", "q35", "-nodefaults", "-display", "none"], deadline_s=60))
"""


@pytest.mark.parametrize("what", ["small guest", "kernel"])
@pytest.mark.skipif(not shutil.which("setpriv"), reason="takes setpriv")
async def test_a_kill_9_in_the_middle_leaves_neither_qemu_nor_a_file(
    what: str, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    stands_still = tmp_path / "qemu"  # a real one, whose guest does not start
    stands_still.write_text(f'#!/bin/sh\nexec {QEMU} -S "$@"\n')
    stands_still.chmod(0o755)
    prober = subprocess.Popen(
        [sys.executable, "-c", IN_THE_MIDDLE, what, str(stands_still)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    deadline = Deadline.after(seconds=20)
    try:
        while not (running := _qemu_below(prober.pid)):
            assert prober.poll() is None
            assert not deadline.passed
            time.sleep(0.01)
    finally:
        prober.kill()
        prober.wait()

    while running.is_alive():
        assert not deadline.passed
        time.sleep(0.01)
    assert list(temporary.iterdir()) == []


def _qemu_below(pid: int) -> ProcessIdentity | None:
    """The QEMU that a process has started, once it is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in map(int, children):
        if Path(f"/proc/{child}/comm").read_text().startswith("qemu-system"):
            return ProcessIdentity.of(child)
    return None


@takes_kvm
@pytest.mark.parametrize("cpu", ["host", "qemu64"])
async def test_kvm_is_confirmed_or_refused_by_a_real_kernel_in_time(
    cpu: str, kernel: Path, initramfs: Path
) -> None:
    began = time.monotonic()

    fact = await confirm_kvm(
        qemu=QEMU, kernel=kernel, initramfs=initramfs, command_line="quiet", cpu=cpu
    )

    assert time.monotonic() - began < 2 * 2.5
    assert fact.verdict in (Verdict.OK, Verdict.UNUSABLE)
    assert "kernel" in fact.evidence or "QEMU ended" in fact.evidence


@takes_kvm
async def test_a_kvm_internal_error_is_seen_long_before_the_deadline(
    tmp_path: Path, trial: Trial
) -> None:
    if (await probe_kvm(trial, qemu=QEMU)).present:
        pytest.skip("takes a KVM that emulates in software")
    firmware = bytearray(small_guest_firmware())
    firmware[0x40:0x44] = b"\xf3\x0f\xb8\xc1"  # popcnt: KVM's emulator has none
    image = tmp_path / "firmware"
    image.write_bytes(firmware)
    began = time.monotonic()

    argv = [str(QEMU), *small_guest_arguments(image, accelerator="kvm")]
    fact = await watch_kernel(argv, deadline_s=30)

    assert "KVM internal error" in fact.evidence
    assert time.monotonic() - began < 10
