"""Lifecycles: restored where a machine can be, else booted, and said."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox import GuestPanicked, Machine, MachineFactory, RequestInvalid
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.image.progress import SilentProgress
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.lifecycles import Lifecycles
from pytest_vmsandbox.machine.memory import is_sealed
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.cache import TemplateCache
from pytest_vmsandbox.machine.templates.shelf import make_shelf
from pytest_vmsandbox.machine.templates.templates import Templates, recipe_of
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.vmm.qemu import MachineType

RESTORED = MachineSpec(tier="bare").changed({"lifecycle": "restored"})


def test_a_machine_is_restored_and_says_out_of_what(vm_factory: MachineFactory) -> None:
    one, other = vm_factory(count=2)

    for machine in (one, other):
        assert machine.facts.lifecycle == "restored"
        assert machine.facts.restore_id == machine.id
        assert machine.timings.boot_s is None
        assert machine.timings.restore_s is not None
    assert one.facts.restore_id != other.facts.restore_id


@pytest.mark.vm(lifecycle="booted")
def test_one_that_boots_has_no_restore_id(vm: Machine) -> None:
    assert (vm.facts.lifecycle, vm.facts.restore_id) == ("booted", "")
    assert vm.timings.boot_s is not None
    assert vm.timings.restore_s is None


@pytest.mark.vm(lifecycle="restored")
def test_what_is_rebooted_or_powered_on_again_has_booted(vm: Machine) -> None:
    vm.reboot()
    assert (vm.facts.lifecycle, vm.facts.restore_id) == ("booted", "")

    vm.power_cut()
    vm.power_on()
    assert (vm.facts.lifecycle, vm.facts.restore_id) == ("booted", "")
    assert vm.timings.boot_s is not None


@pytest.mark.vm(lifecycle="both")
def test_the_console_begins_with_the_boot_whoever_booted(vm: Machine) -> None:
    assert re.search(r"Linux version", vm.console.text)
    assert vm.console.wait_for("Run /init as init process")

    vm.run("echo a word > /dev/console", check=True)
    vm.console.wait_for("a word")

    assert vm.console.text.count("Linux version") == 1
    assert "Linux version" in vm.console.text[: vm.console.text.index("a word")]


@pytest.mark.vm(lifecycle="restored")
def test_a_trouble_before_the_freeze_is_none_of_the_restored(vm: Machine) -> None:
    console = vm._controller.console
    vm.power_cut()
    console.recall(b"[1.0] Kernel panic - not syncing: an old one")

    vm.power_on()

    assert vm.run("true").returncode == 0


def test_a_device_that_forbids_freezing_is_named_and_the_machine_boots(
    worker: Worker, scratch: Path
) -> None:
    with _lifecycles(worker, cache=scratch / "cache") as lifecycles:
        build = _with_nvme(_build(worker), scratch)

        chosen = [worker.engine.run(lifecycles.restored(build, demanded=False)) for _ in range(2)]
        with pytest.raises(RequestInvalid, match=r"can't be restored: .*nvme"):
            worker.engine.run(lifecycles.restored(build, demanded=True))

        assert chosen == [build, build]
        (told,) = lifecycles.incidents
        assert re.match(r"booted each time, not restored: mini, 128 MiB, .*nvme", told)
        machine = MachineController(build)
        worker.engine.run(worker.boot([machine]))
        assert machine.facts.lifecycle == "booted"
        worker.engine.run(worker.end([machine]))


def test_a_demand_is_what_a_test_says_itself() -> None:
    usual = MachineSpec()

    assert usual.lifecycle == "restored"
    assert usual.demanded == frozenset()
    assert RESTORED.demanded == {"lifecycle"}
    assert MachineSpec(tier="bare") == RESTORED


def test_a_template_that_can_not_be_kept_is_used_none_the_less(
    worker: Worker, scratch: Path
) -> None:
    (scratch / "cache").write_text("no directory")
    with _lifecycles(worker, cache=scratch / "cache") as lifecycles:
        build = _build(worker)

        chosen = worker.engine.run(lifecycles.restored(build, demanded=True))
        again = worker.engine.run(lifecycles.restored(build, demanded=True))

        assert chosen.frozen is not None
        assert again.frozen is chosen.frozen
        assert is_sealed(chosen.frozen.state)
        (told,) = lifecycles.incidents
        assert "could not be kept" in told
        assert str(scratch / "cache") in told
        machine = MachineController(chosen)
        worker.engine.run(worker.boot([machine]))
        assert machine.facts.lifecycle == "restored"
        worker.engine.run(worker.end([machine]))


def test_who_waits_for_a_maker_that_lives_waits_as_long_as_it_takes(
    worker: Worker, scratch: Path
) -> None:
    cache = TemplateCache(scratch / "cache")
    with _lifecycles(worker, cache=scratch / "cache") as lifecycles:
        build = replace(_build(worker), time_scale=0.001)
        waited: list[float] = []

        with pytest.raises(RequestInvalid):  # a millisecond is too short to boot in
            worker.engine.run(_after_another_gave_up(cache, lifecycles, build, waited))

        assert waited[0] >= 1.5
        (told,) = lifecycles.incidents
        assert "who makes" not in told


def test_a_cache_that_can_not_be_locked_costs_the_next_run_its_template_and_no_test(
    worker: Worker, scratch: Path
) -> None:
    cache = TemplateCache(scratch / "cache")
    make_shelf(cache.directory)
    (cache.directory / ".lock").symlink_to("nowhere")
    with _lifecycles(worker, cache=scratch / "cache") as lifecycles:
        chosen = worker.engine.run(lifecycles.restored(_build(worker), demanded=True))

        assert chosen.frozen is not None
        (told,) = lifecycles.incidents
        assert "made for this run only" in told


def test_a_recipe_says_which_qemu_it_is_and_what_its_clock_was_measured_by(
    worker: Worker,
) -> None:
    build = _build(worker)
    assert worker.facts.qemu is not None
    (model,) = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    } or {""}

    assert worker.facts.qemu.version in recipe_of(build).parts["vmm"]
    assert model in recipe_of(build).parts["processor"]
    assert recipe_of(replace(build, qemu_version="0")).digest != recipe_of(build).digest


def test_an_image_that_does_not_boot_is_tried_once_for_a_template_and_told_without_the_time(
    worker: Worker, scratch: Path
) -> None:
    with _lifecycles(worker, cache=scratch / "cache") as lifecycles:
        build = _build(worker)
        nothing = scratch / "initramfs"
        nothing.write_bytes(bytes(build.config.initramfs.stat().st_size))
        broken = replace(build, config=replace(build.config, initramfs=nothing))

        for _ in range(2):
            assert worker.engine.run(lifecycles.restored(broken, demanded=False)) == broken

        (told,) = lifecycles.incidents
        assert "it did not boot: Kernel panic" in told


async def _after_another_gave_up(
    cache: TemplateCache, lifecycles: Lifecycles, build: Build, waited: list[float]
) -> None:
    began = time.monotonic()
    async with asyncio.timeout(60):
        async with cache.making(recipe_of(build), deadline=Deadline.after(seconds=10)):
            waiting = asyncio.create_task(lifecycles.restored(build, demanded=True))
            await asyncio.sleep(1.5)
            assert not waiting.done()
        try:
            await waiting
        finally:
            waited.append(time.monotonic() - began)


@contextmanager
def _lifecycles(worker: Worker, *, cache: Path) -> Iterator[Lifecycles]:
    with closing(
        Templates(TemplateCache(cache), room=lambda: cache, progress=SilentProgress())
    ) as templates:
        yield Lifecycles(templates)


def _build(worker: Worker) -> Build:
    (machine,) = worker.engine.run(worker.make([MachineSpec(tier="bare", lifecycle="booted")]))
    return machine.build


def _with_nvme(build: Build, scratch: Path) -> Build:
    """The same with a device that QEMU 7.2 can't migrate, as a wrapper around QEMU would add it."""
    program = scratch / "qemu-with-nvme"
    disk = "-drive if=none,id=n,file=null-co://,format=raw -device nvme,drive=n,serial=n"
    program.write_text(f'#!/bin/sh\nexec {build.config.program} "$@" {disk}\n')
    program.chmod(0o755)
    assert os.access(program, os.X_OK)
    return replace(build, config=replace(build.config, program=str(program)))


@pytest.mark.vm(lifecycle="restored", cpus=2, memory_mib=256)
def test_two_processors_and_more_memory_have_a_template_of_their_own(vm: Machine) -> None:
    assert vm.facts.lifecycle == "restored"
    assert vm.run("nproc").stdout == "2\n"
    assert 200_000 < int(vm.run("awk '/MemTotal/ { print $2 }' /proc/meminfo").stdout) < 262_144
    # Both processors run on: each one has to take a task of its own.
    assert vm.run("taskset 1 true && taskset 2 true").returncode == 0


@pytest.mark.vm(lifecycle="restored")
def test_a_restored_machine_that_panics_is_noticed_at_once(vm: Machine) -> None:
    with pytest.raises(GuestPanicked, match="sysrq triggered crash"):
        vm.run("echo c > /proc/sysrq-trigger")

    vm.power_cut()
    vm.power_on()
    assert vm.run("true").returncode == 0


def test_a_microvm_is_restored_too(worker: Worker) -> None:
    build = _build(worker)
    # Told its clock's rate, the kernel does not calibrate it, which under TCG may hang for good.
    mhz = re.search(r"cpu MHz\s*: (\d+)\.(\d+)", Path("/proc/cpuinfo").read_text())
    assert mhz is not None
    told = (*build.config.command_line, f"tsc_early_khz={''.join(mhz.groups())}")
    config = replace(build.config, machine_type=MachineType.MICROVM, command_line=told)
    micro = replace(build, config=config)

    chosen = worker.engine.run(worker._lifecycles.restored(micro, demanded=True))
    machine = MachineController(chosen)
    worker.engine.run(worker.boot([machine]))
    listed = worker.engine.run(machine.run("ls /sys/bus/pci/devices 2>/dev/null; hostname"))
    worker.engine.run(worker.end([machine]))

    assert listed.stdout == f"{machine.name}\n"
    assert machine.timings.boot_s is None


def test_what_a_vmm_without_walls_wrote_is_for_none_that_has_them(worker: Worker) -> None:
    build = _build(worker)
    tiers = {tier: recipe_of(replace(build, tier=tier)).digest for tier in Tier}

    assert tiers[Tier.BARE] not in [digest for tier, digest in tiers.items() if tier != Tier.BARE]
    assert len(set(tiers.values())) == 2
