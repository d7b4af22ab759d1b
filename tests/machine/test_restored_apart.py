"""Machines out of one template: each one of its own, none with anything of another."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_vmsandbox import AsyncMachine, AsyncMachineFactory
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker
from tests.people import CHECKOUT

RESTORED = MachineSpec().changed({"lifecycle": "restored"})

# How many machines in a row must leave nothing: more than a suite has time for shows more.
IN_A_ROW = int(os.environ.get("VMSANDBOX_RESTORES", "20"))

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


@pytest.mark.machine
def test_many_machines_in_a_row_leave_nothing_and_see_nothing_of_each_other(scratch: Path) -> None:
    # A process of its own: one that has run many tests gives and takes memory as it likes.
    done = subprocess.run(
        [sys.executable, "-m", "tests.machine.restores_in_a_row", str(IN_A_ROW), str(scratch)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60 + 2 * IN_A_ROW,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = (json.loads(line) for line in done.stdout.splitlines())
    grown = after.pop("memory_bytes") - before.pop("memory_bytes")

    assert after == before
    # Less than a page for each machine, and what allocators keep: 2.4 MB were seen.
    assert grown < 4096 * IN_A_ROW + (6 << 20), f"{grown} bytes more after {IN_A_ROW} machines"


def test_a_machine_has_nothing_of_an_earlier_ones_memory(worker: Worker) -> None:
    run = worker.engine.run
    mark = b"pattern-" + os.urandom(16).hex().encode()
    for number in range(3):
        (machine,) = run(worker.make([RESTORED]))
        run(worker.boot([machine]))
        assert run(_marks_in_memory(machine, [mark])) == []
        if number == 0:
            run(machine.run(f"yes {mark.decode() * 40} | head -c {MARK_BYTES} > /root/left"))
            assert run(_marks_in_memory(machine, [mark])) == [mark]  # what is there is found
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
