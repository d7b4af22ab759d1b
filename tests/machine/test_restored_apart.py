"""Machines out of one template: each one of its own, none with anything of another."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import time
from pathlib import Path

import pytest

from pytest_vmsandbox import AsyncMachine, AsyncMachineFactory
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker

RESTORED = MachineSpec().changed({"lifecycle": "restored"})

# How many machines in a row must leave nothing: more than a suite has time for shows more.
IN_A_ROW = int(os.environ.get("VMSANDBOX_RESTORES", "40"))
WARM_UP = 5

MARK_BYTES = 24 << 20
CHUNK_BYTES = 4 << 20

OWN = """
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo
cat /proc/sys/kernel/random/uuid
cat /etc/machine-id
hostname
"""

# busybox's date knows whole seconds only.
CLOCK = """
adjtimex | awk '/tv_sec/ { s = $2 } /tv_usec/ { us = $2 } END { printf "%d.%06d", s, us }'
"""


@pytest.mark.vm(lifecycle="restored")
async def test_eight_machines_out_of_one_template_share_no_identity(
    async_vm_factory: AsyncMachineFactory,
) -> None:
    machines = await async_vm_factory(count=8)

    said = await asyncio.gather(*(machine.run(OWN, check=True) for machine in machines))

    lines = [
        [*one.stdout.split(), m.facts.restore_id] for one, m in zip(said, machines, strict=True)
    ]
    assert [len(of_one) for of_one in lines] == [5] * 8
    for same in zip(*lines, strict=True):
        assert len(set(same)) == 8, same


@pytest.mark.vm(lifecycle="restored")
async def test_they_share_the_boot_that_was_frozen(async_vm_factory: AsyncMachineFactory) -> None:
    one, other = await async_vm_factory(count=2)

    boots = {await machine.read_text("/proc/sys/kernel/random/boot_id") for machine in (one, other)}

    assert len(boots) == 1


@pytest.mark.vm(lifecycle="restored")
async def test_their_clocks_are_right_and_go_forward(async_vm_factory: AsyncMachineFactory) -> None:
    for machine in await async_vm_factory(count=8):
        at_freeze_s = _last_of_the_boot(machine)
        early_s = await _uptime_s(machine)
        before_s = time.time()
        said_s = float((await machine.run(CLOCK, check=True)).stdout)
        after_s = time.time()

        assert before_s - 0.2 <= said_s <= after_s + 0.2
        assert at_freeze_s <= early_s <= await _uptime_s(machine)


async def _uptime_s(machine: AsyncMachine) -> float:
    return float((await machine.read_text("/proc/uptime")).split()[0])


def _last_of_the_boot(machine: AsyncMachine) -> float:
    """The kernel's clock when it last printed anything before the freeze."""
    *_, last = re.findall(r"^\[ *(\d+\.\d+)\]", machine.console.text, re.MULTILINE)
    return float(last)


def test_many_machines_in_a_row_leave_nothing_and_see_nothing_of_each_other(worker: Worker) -> None:
    run = worker.engine.run
    for number in range(WARM_UP + IN_A_ROW):
        if number == WARM_UP:
            held_before, memory_before = _held(worker), _memory_bytes()
        (machine,) = run(worker.make([RESTORED]))
        run(worker.boot([machine]))
        run(_sees_and_leaves(machine))
        run(worker.end([machine]))
        del machine

    assert _held(worker) == held_before
    # Less than a page for each machine, and what the allocator may keep.
    grown = _memory_bytes() - memory_before
    assert grown < 4096 * IN_A_ROW + (2 << 20), f"{grown} bytes more after {IN_A_ROW} machines"


async def _sees_and_leaves(machine: MachineController) -> None:
    """See nothing of an earlier machine; leave a file and a process for later ones to see."""
    assert machine.facts.lifecycle == "restored"
    seen = await machine.run("ls /root /tmp; ps")
    assert "left-" not in seen.stdout

    await machine.run("echo > /root/left-file", check=True)
    await machine.popen(["sh", "-c", "sleep 1000; : left-running"])
    seen = await machine.run("ls /root /tmp; ps")
    assert "left-file" in seen.stdout
    assert "left-running" in seen.stdout


def test_a_machine_has_nothing_of_an_earlier_ones_memory(worker: Worker) -> None:
    run = worker.engine.run
    marks: list[bytes] = []
    for _ in range(3):
        (machine,) = run(worker.make([RESTORED]))
        run(worker.boot([machine]))
        assert run(_marks_in_memory(machine, marks)) == []
        mark = b"pattern-" + os.urandom(16).hex().encode()
        run(machine.run(f"yes {mark.decode() * 40} | head -c {MARK_BYTES} > /root/left"))
        assert run(_marks_in_memory(machine, [mark])) == [mark]  # what is there is found
        marks.append(mark)
        run(worker.end([machine]))


async def _marks_in_memory(machine: MachineController, marks: list[bytes]) -> list[bytes]:
    """Which of the marks are anywhere in its RAM."""
    anywhere = re.compile(b"pattern-[0-9a-f]{32}")
    seen: set[bytes] = set()
    room = machine.running.order.view.directory
    for start in range(0, machine.build.config.memory_mib << 20, CHUNK_BYTES):
        arguments = {"val": start, "size": CHUNK_BYTES, "filename": str(room / "ram")}
        await machine.qmp("pmemsave", arguments)
        seen.update(anywhere.findall(await machine.running.process.read_file("ram")))
    return sorted(seen.intersection(marks))


def _held(worker: Worker) -> dict[str, list[str]]:
    """What this worker has open and has made: descriptors, processes, files."""
    gc.collect()
    return {
        "descriptors": sorted(_descriptors()),
        "processes": sorted(Path(f"/proc/{pid}/comm").read_text() for pid in _descendants()),
        "files": sorted(str(path) for path in worker.directory.path.rglob("*")),
    }


def _descriptors() -> list[str]:
    """What each is, without the numbers that differ from one to the next."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that this very list is read by
            found.append(re.sub(r"\d+", "N", str(entry.readlink())))
    return found


def _descendants(pid: int | str = "self") -> list[str]:
    """Whatever we started, and what that started: wardens, and VMMs that are left."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for children in listed for child in children.read_text().split()]
    return [*children, *(below for child in children for below in _descendants(child))]


def _memory_bytes() -> int:
    """What this process and all its descendants hold."""
    gc.collect()
    page = os.sysconf("SC_PAGESIZE")
    pids = ["self", *_descendants()]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)
