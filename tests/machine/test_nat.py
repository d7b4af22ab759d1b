"""The network with a way out: all of it, or none; what the gateway is, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine, MachineFactory, NetworkFailed, TemplateBuilder
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.ledger import read_ledger
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker

pytestmark = [pytest.mark.machine, pytest.mark.vm_requires("nat")]

TIERS = ["auto", "bare"]

# A QEMU that runs machines, and is no gateway.
NO_GATEWAY = """#!/bin/sh
case " $* " in *" -M none "*) echo no way out here >&2; exit 1;; esac
exec {program} "$@"
"""


def processes(worker: Worker) -> dict[Role, list[ProcessEntry]]:
    """What stands in the ledger, by role."""
    found: dict[Role, list[ProcessEntry]] = {}
    for entry in read_ledger(worker.directory.path / LEDGER).entries.values():
        if isinstance(entry, ProcessEntry):
            found.setdefault(entry.role, []).append(entry)
    return found


@contextmanager
def without_a_gateway(worker: Worker, scratch: Path) -> Iterator[None]:
    """As if the host's QEMU could not be one."""
    facts = worker.facts
    assert facts.qemu is not None
    program = scratch / "qemu"
    program.write_text(NO_GATEWAY.format(program=facts.qemu.path))
    program.chmod(0o755)
    worker._facts = replace(facts, qemu=replace(facts.qemu, path=str(program)))
    yield
    worker._facts = facts


@pytest.mark.parametrize("tier", TIERS)
def test_without_a_gateway_a_machine_does_not_start_and_leaves_nothing(
    worker: Worker, scratch: Path, tier: str
) -> None:
    engine, spec = worker.engine, MachineSpec(network=["lan", "nat"], tier=tier)
    with without_a_gateway(worker, scratch):
        (machine,) = engine.run(worker.make([spec]))
        with pytest.raises(NetworkFailed, match="gateway of the network nat can't be started") as e:
            engine.run(worker.boot([machine]))

        assert "no way out here" in str(e.value)
        assert not machine.is_on
        for entry in processes(worker).get(Role.GATEWAY, ()):  # kept, to be looked at in the end
            if entry.identity is not None:  # else it had ended before anybody could look
                assert not Path(f"/proc/{entry.identity.pid}").exists()
        assert Role.VMM not in processes(worker)
        engine.run(worker.end([machine]))
    assert worker.networks.names == ()

    # It is no longer so: nothing of the failure has stayed.
    (machine,) = engine.run(worker.make([spec]))
    engine.run(worker.boot([machine]))
    assert machine.address("nat").ip.compressed == "10.76.255.2"
    engine.run(worker.end([machine]))


@pytest.mark.parametrize("tier", TIERS)
def test_the_gateway_is_walled_in_but_for_the_host_s_network_and_outlives_machines(
    worker: Worker, tier: str
) -> None:
    engine, spec = worker.engine, MachineSpec(network="nat", tier=tier)
    pids = []
    for _ in range(2):
        (machine,) = engine.run(worker.make([spec]))
        engine.run(worker.boot([machine]))
        (entry,) = processes(worker)[Role.GATEWAY]
        assert entry.identity is not None
        pids.append(entry.identity.pid)
        engine.run(worker.end([machine]))
    pid = pids[0]
    assert pids == [pid, pid]

    if os.getuid() == 0:  # others may not look at what is in another user namespace
        for kind in ("net", "mnt", "pid", "user"):
            shared = kind == "net" or Tier(entry.tier) is Tier.BARE
            ours, its = Path(f"/proc/self/ns/{kind}"), Path(f"/proc/{pid}/ns/{kind}")
            assert ours.samefile(its) == shared
    if Tier(entry.tier) is not Tier.BARE and os.getuid() == 0:
        root = Path(f"/proc/{pid}/root")
        assert (root / "etc/resolv.conf").read_bytes() == Path("/etc/resolv.conf").read_bytes()
        assert {path.name for path in (root / "etc").iterdir()} <= {"resolv.conf", "ld.so.cache"}
        assert not (root / "home").exists()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
    worker.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_gateway_that_dies_is_told_of_and_replaced(worker: Worker) -> None:
    engine, spec = worker.engine, MachineSpec(network="nat")
    (first,) = engine.run(worker.make([spec]))
    engine.run(worker.boot([first]))
    gateway = worker.networks._gateway._gateway
    assert gateway is not None
    engine.run(ended(gateway.process.kill, lambda: gateway.over))
    assert any("gateway of the network nat died" in each for each in worker.incidents)

    (second,) = engine.run(worker.make([spec]))
    engine.run(worker.boot([second]))

    assert len([each for each in worker.incidents if "the network nat died" in each]) == 1
    for machine in (first, second):  # its address is answered for again
        asked = "ip neigh flush dev eth0; nc -w 1 10.76.255.254 9; ip neigh"
        done = engine.run(machine.run(asked))
        assert "lladdr 52:55:0a:4c:ff:fe" in str(done.stdout)
    engine.run(worker.end([first, second]))


async def ended(kill: Callable[[], None], is_over: Callable[[], bool]) -> None:
    kill()
    async with asyncio.timeout(20):
        while not is_over():
            await asyncio.sleep(0.01)


def resolving_by_itself(vm: Machine) -> None:
    vm.write_text("/etc/resolv.conf", "nameserver 192.0.2.9\n")


def resolving_and_read_only(vm: Machine) -> None:
    vm.write_text("/etc/resolv.conf", "nameserver 192.0.2.9\n")
    vm.run("mount -o remount,ro /", check=True)


def read_only_without_a_resolver(vm: Machine) -> None:
    vm.run("rm -f /etc/resolv.conf && mount -o remount,ro /", check=True)


@pytest.mark.parametrize("setup", [resolving_by_itself, resolving_and_read_only])
def test_who_is_on_it_asks_its_resolver_and_all_others_whom_they_asked(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder, setup: Callable[[Machine], None]
) -> None:
    template = vm_templates.build(setup=setup, network="lan")

    out = vm_factory(template=template, network="nat")
    lan = vm_factory(template=template, network="lan")

    assert lan.read_text("/etc/resolv.conf") == "nameserver 192.0.2.9\n"
    assert "192.0.2.9" not in out.read_text("/etc/resolv.conf")
    assert out.read_text("/etc/resolv.conf").startswith("# vmsandbox: ")
    assert "default" in out.run("ip route").stdout
    assert "default" not in lan.run("ip route").stdout


def test_a_guest_that_can_not_be_told_its_resolver_does_not_start(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    template = vm_templates.build(setup=read_only_without_a_resolver, network="lan")

    with pytest.raises(NetworkFailed, match=r"can't be told its resolver.*Read-only"):
        vm_factory(template=template, network="nat")


def without_ipv6(vm: Machine) -> None:
    vm.run("sysctl -w net.ipv6.conf.all.disable_ipv6=1", check=True)


def test_a_guest_that_can_not_be_given_its_address_does_not_start(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    template = vm_templates.build(setup=without_ipv6, network="lan")

    with pytest.raises(NetworkFailed, match=r"can't be given the address 10\.76\.255\.2"):
        vm_factory(template=template, network="nat")


VICTIM = """
import json, time
from pytest_vmsandbox.lease.entries import Role

def test_it(vm_factory):
    vm = vm_factory(network="nat")
    from pathlib import Path
    networks = vm._controller.build.wires._switch
    pid = networks._gateway._gateway.process.identity.pid
    Path("pid.new").write_text(str(pid))
    Path("pid.new").rename("pid")
    time.sleep(600)
"""


@pytest.mark.parametrize("tier", TIERS)
def test_kill_9_on_pytest_ends_the_gateway(tmp_path: Path, tier: str) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(VICTIM)
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--vm-tier={tier}",
        str(file),
    ]
    told = tmp_path / "pid"
    with (tmp_path / "log").open("wb") as log:
        victim = subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log, stdin=log)
        while not told.exists():
            assert victim.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        gateway = ProcessIdentity.of(int(told.read_text()))
        assert gateway.is_alive()
        victim.send_signal(signal.SIGKILL)
        victim.wait()

    until = time.monotonic() + 30
    while gateway.is_alive():
        assert time.monotonic() < until
        time.sleep(0.05)
