"""How machines fail: each way has its own error, in time, with what there was to see."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox import (
    BootFailed,
    ChannelLost,
    GuestPanicked,
    Machine,
    MachineFactory,
    TimedOut,
    VmmDied,
)
from tests.signals import send_signal


def _vmm_pid(vm: Machine) -> int:
    running = vm._controller._running
    assert running is not None
    return running.process.pid


@contextmanager
def _within(*, seconds: float) -> Iterator[None]:
    """The block ends in time; far beyond what it takes, far below a test's own time-out."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def test_a_vmm_that_is_killed_is_noticed_by_whoever_waits(vm: Machine) -> None:
    sleeping = vm.popen("echo begun; sleep 100")
    sleeping.stdout.readline()
    send_signal(_vmm_pid(vm), signal.SIGKILL)

    with _within(seconds=10), pytest.raises(VmmDied, match="with -9") as died:
        sleeping.wait(timeout=60)
    assert "Linux version" in vm.console.text
    assert "console, last lines" in str(died.value)
    assert "qemu-system" in died.value.evidence.command_line


def test_after_its_vmm_died_every_verb_says_so_and_power_on_mends_it(vm: Machine) -> None:
    send_signal(_vmm_pid(vm), signal.SIGKILL)

    verbs: list[Callable[[], object]] = [
        lambda: vm.run(["true"]),
        lambda: vm.read_text("/etc/passwd"),
        lambda: vm.qmp("query-status"),
        lambda: vm.wait_until("true"),
        lambda: vm.console.wait_for("never printed"),
        vm.reboot,
    ]
    for verb in verbs:
        with _within(seconds=10), pytest.raises(VmmDied):
            verb()
    vm.power_cut()
    vm.power_on()

    assert vm.run(["true"]).returncode == 0


def test_a_panic_fails_the_command_at_once_with_its_text(vm: Machine) -> None:
    with (
        _within(seconds=20),
        pytest.raises(GuestPanicked, match="Kernel panic - not syncing: sysrq") as panicked,
    ):
        vm.run("echo c > /proc/sysrq-trigger")

    assert "Call Trace" in panicked.value.evidence.console_tail


def test_a_full_disk_in_the_guest_is_the_commands_own_failure(vm: Machine) -> None:
    done = vm.run("mount -t tmpfs -o size=1m tmpfs /mnt && cat /dev/zero > /mnt/x")

    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert vm.run(["true"]).returncode == 0


def test_a_guest_out_of_memory_does_not_hang_the_test(vm: Machine) -> None:
    with _within(seconds=100):
        done = vm.run("tail /dev/zero", timeout=60)

    assert done.returncode != 0
    assert vm.run(["true"]).returncode == 0


def test_an_agent_that_is_destroyed_takes_the_kernel_with_it(vm: Machine) -> None:
    # As pid 1 the agent can't be killed by a signal; its own memory can be overwritten.
    destroy = (
        "set -- $(grep -m1 r-xp /proc/1/maps); start=$((0x${1%%-*}));"
        "dd if=/dev/urandom of=/proc/1/mem bs=4096 seek=$((start / 4096)) count=20 conv=notrunc"
    )

    with _within(seconds=30), pytest.raises(GuestPanicked, match="Attempted to kill init"):
        vm.run(destroy)


def test_a_guest_whose_vmm_is_stopped_times_out_and_says_that_nobody_answers(
    vm: Machine,
) -> None:
    pid = _vmm_pid(vm)
    send_signal(pid, signal.SIGSTOP)
    try:
        with _within(seconds=20), pytest.raises(TimedOut) as late:
            vm.run(["true"], timeout=1)
        assert "QEMU answers QMP: no" in str(late.value)
        assert "the guest's agent answers: no" in str(late.value)
        assert "console:" in str(late.value)
    finally:
        send_signal(pid, signal.SIGCONT)

    assert vm.run(["true"]).returncode == 0


def test_a_stopped_vmm_is_ended_with_its_fixture_all_the_same(vm: Machine) -> None:
    pid = _vmm_pid(vm)
    send_signal(pid, signal.SIGSTOP)
    with _within(seconds=10):
        vm.power_cut()

    assert not Path(f"/proc/{pid}").exists()


def test_a_guest_that_shuts_itself_down_is_gone_and_says_so(vm: Machine) -> None:
    with _within(seconds=30), pytest.raises(ChannelLost, match="the guest shut itself down"):
        vm.run("poweroff -f; sleep 60")


def test_a_kernel_that_is_none_is_a_failed_boot(
    vm_factory: MachineFactory, tmp_path: Path, vm: Machine
) -> None:
    image = _copy_image(vm, tmp_path)
    (image / "vmlinux").write_bytes(b"\0" * (image / "vmlinux").stat().st_size)

    with pytest.raises(BootFailed) as failed:
        vm_factory(image=str(image))
    assert "qemu-system" in failed.value.evidence.command_line
    assert failed.value.evidence.vmm_stderr != ""
    assert "waiting for connection" not in failed.value.evidence.vmm_stderr


def test_an_initramfs_that_is_none_is_a_failed_boot_with_the_panic(
    vm_factory: MachineFactory, tmp_path: Path, vm: Machine
) -> None:
    image = _copy_image(vm, tmp_path)
    (image / "initramfs.cpio").write_bytes(b"\0" * (image / "initramfs.cpio").stat().st_size)

    with _within(seconds=60), pytest.raises(BootFailed, match="Kernel panic"):
        vm_factory(image=str(image))


def _copy_image(vm: Machine, tmp_path: Path) -> Path:
    """The image of `vm`, in a directory of the test's own."""
    source = vm._controller.build.config.kernel.parent
    target = tmp_path / "image"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
