"""Workers: machines side by side, and nothing left when one of them fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_vmsandbox import AsyncMachineFactory, HostUnfit, Machine, MachineFactory, RequestInvalid
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.tier import missing_for
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker


def test_nothing_is_acquired_before_it_is_needed(worker: Worker) -> None:
    assert not worker.engine.running
    worker.directory.path.rmdir  # noqa: B018  # asking for it makes it
    assert worker.directory.path.is_dir()


def test_a_closed_worker_leaves_neither_process_nor_file(worker: Worker) -> None:
    (machine,) = worker.engine.run(worker.make([MachineSpec()]))
    worker.engine.run(worker.boot([machine]))
    running = machine._running
    assert running is not None
    pid, directory = running.process.pid, worker.directory.path
    files = {path.name for path in machine.build.config.directory.iterdir()}
    worker.engine.run(worker.end([machine]))

    assert {"vmm.log", "console.log"} <= files
    assert not Path(f"/proc/{pid}").exists()
    assert list(directory.glob("m*")) == []


def test_when_one_of_several_does_not_boot_the_others_are_ended_too(
    vm_factory: MachineFactory, worker: Worker, tmp_path: Path
) -> None:
    good = MachineSpec()
    image = worker.engine.run(worker.image("mini"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in image.directory.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "vmlinux").write_bytes(b"\0" * (broken / "vmlinux").stat().st_size)

    machines = worker.engine.run(worker.make([good, MachineSpec(image=str(broken)), good]))
    with pytest.raises(Exception, match="did not boot"):
        worker.engine.run(worker.boot(machines))
    worker.engine.run(worker.end(machines))

    assert all(machine._running is None for machine in machines)


@pytest.mark.parametrize("tier", ["root", "sudo", "qemu-vm", "userns"])
def test_a_tier_that_can_not_be_had_is_a_skip_and_never_a_weaker_one(
    worker: Worker, tier: str
) -> None:
    somebody_elses = "userns" if os.getuid() == 0 else "root"
    if worker.facts.tier == tier:
        (machine,) = worker.engine.run(worker.make([MachineSpec(tier=tier)]))
        assert machine.facts.tier == tier
    elif missing_for(Tier(tier), worker.facts.facts) or tier == somebody_elses:
        with pytest.raises(HostUnfit, match="VMS-"):
            worker.engine.run(worker.make([MachineSpec(tier=tier)]))


@pytest.mark.vm_requires("jail")
def test_a_walled_machine_has_nothing_in_the_run_directory_but_its_logs(vm: Machine) -> None:
    if vm.facts.tier == "bare":
        pytest.skip("the tier bare was asked for")
    directory = vm._controller.build.config.directory

    assert {path.name for path in directory.iterdir()} <= {"vmm.log", "console.log"}
    assert vm.run("true").returncode == 0


@pytest.mark.parametrize("count", [0, -1, True, "2", 1.0])
def test_a_wrong_count_is_refused(vm_factory: MachineFactory, count: int) -> None:
    with pytest.raises(RequestInvalid, match="count="):
        vm_factory(count=count)


def test_machines_have_names_and_host_names(vm_factory: MachineFactory) -> None:
    one, other = vm_factory(count=2, name="node")

    assert [one.name, other.name] == ["node-1", "node-2"]
    assert other.run("hostname").stdout == "node-2\n"
    assert one.id != other.id


async def test_three_machines_answer_side_by_side(async_vm_factory: AsyncMachineFactory) -> None:
    machines = await async_vm_factory(count=3)

    answers = await asyncio.gather(*(machine.run("cat /etc/machine-id") for machine in machines))

    assert len({answer.stdout for answer in answers}) == 3


CLOSES_WITH_MACHINES_ON = """
import sys
from pathlib import Path
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings

cache, run, tier = sys.argv[1:]
worker = Worker(WorkerSettings(cache_dir=Path(cache), run_dir=Path(run), pool=False))
specs = [MachineSpec(tier=tier), MachineSpec(tier=tier, network="lan")]
machines = worker.engine.run(worker.make(specs))
worker.engine.run(worker.boot(machines))
twins = worker.engine.run(machines[1].fork(2))
worker.close()
assert not list(worker.incidents), worker.incidents
assert {machine._running for machine in (*machines, *twins)} == {None}
assert not list(Path(run).iterdir())
"""


@pytest.mark.machine
@pytest.mark.parametrize("walls", ["walled", "bare"])
def test_a_worker_that_closes_ends_the_machines_that_are_on_without_a_word(
    worker: Worker, walls: str, tmp_path: Path
) -> None:
    tier = "bare" if walls == "bare" else worker.facts.tier
    if walls == "walled" and tier == "bare":
        pytest.skip(f"no walls here: {worker.facts.tier_reason}")
    with tempfile.TemporaryDirectory(prefix="vmsb-") as run:  # a short path
        argv = [str(worker.settings.cache_dir), f"{run}/run", str(tier)]
        done = subprocess.run(
            [sys.executable, "-c", CLOSES_WITH_MACHINES_ON, *argv],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            cwd=tmp_path,
        )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.machine
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.04, 0.06, 0.08, 0.1])
def test_a_start_that_is_cancelled_over_and_over_leaves_no_line(
    worker: Worker, delay_s: float
) -> None:
    async def live() -> None:
        made = await worker.make([MachineSpec()])
        await worker.boot(made)
        await worker.end(made)

    async def give_up() -> None:
        (machine,) = await worker.make([MachineSpec()])
        boot = asyncio.create_task(machine.power_on())
        await asyncio.sleep(delay_s)
        while not boot.done():
            boot.cancel()
            await asyncio.sleep(0.001)
        await worker.end([machine])

    run = worker.engine.run
    run(live())  # what is held from the first machine on is held now
    before = _open_sockets()
    run(give_up())

    assert _open_sockets() == before


def _open_sockets() -> list[str]:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(entry.readlink()))
    return sorted(link for link in links if link.startswith("socket:"))
