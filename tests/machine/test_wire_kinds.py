"""Networks of taps and networks of sockets: the same to whoever uses them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox.errors import BridgeLost, HostUnfit, SwitchDied, TapLost
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.templates import recipe_of
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.wire_kind import WireKind

pytestmark = pytest.mark.machine

TIER = os.environ.get("VMSANDBOX_TIER", "auto")
SPEC = MachineSpec(network="lan", tier=TIER)
RESTORED = replace(SPEC, lifecycle="restored")
_TUNGETDEVNETNS = 0x54E3


class Wired:
    """A worker whose networks are of one kind."""

    def __init__(self, run_dir: Path, kind: WireKind) -> None:
        cache = os.environ.get("VMSANDBOX_CACHE_DIR")
        self.kind = kind
        self.worker = Worker(
            WorkerSettings(
                cache_dir=Path(cache) if cache else user_cache_path("vmsandbox"),
                run_dir=run_dir,
                wires=kind,
            )
        )

    def machines(self, *specs: MachineSpec) -> list[MachineController]:
        """Machines that are on."""
        try:
            made = self.worker.engine.run(self.worker.make(specs))
        except HostUnfit as unfit:
            pytest.skip(str(unfit))
        self.worker.engine.run(self.worker.boot(made))
        return made

    def end(self, machines: Sequence[MachineController]) -> None:
        self.worker.engine.run(self.worker.end(machines))

    def reaches(self, one: MachineController, other: MachineController) -> bool:
        ping = ["ping", "-c", "1", "-W", "1", str(other.address().ip)]
        return self.worker.engine.run(one.run(ping)).returncode == 0

    def inside(self, *command: str) -> str:
        """What a command prints where the taps are; only root may look there."""
        if os.getuid():
            pytest.skip("VMS-TEST-NOT-ROOT: only root may enter the switch's network namespace")
        line = self.worker.networks._line
        assert line is not None
        with (
            self.worker.engine.run(line.loose_tap()) as tap,
            OwnedFd(fcntl.ioctl(tap, _TUNGETDEVNETNS)) as namespace,
        ):
            entering = ("nsenter", f"--net=/proc/self/fd/{namespace}", *command)
            done = subprocess.run(
                entering, pass_fds=[namespace], capture_output=True, text=True, check=True
            )
        return done.stdout


@pytest.fixture
def wired(kind: WireKind) -> Iterator[Wired]:
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        wired = Wired(Path(short) / "run", kind)
        with closing(wired.worker):
            yield wired
        assert list((Path(short) / "run").glob("*")) == []


both = pytest.mark.parametrize("kind", WireKind)
taps = pytest.mark.parametrize("kind", [WireKind.TAP])


@both
def test_machines_are_parted_slowed_down_captured_and_healed(wired: Wired, tmp_path: Path) -> None:
    run, networks = wired.worker.engine.run, wired.worker.networks
    one, two, three = wired.machines(*[RESTORED] * 3)
    names = [vm.name for vm in (one, two, three)]
    assert wired.reaches(one, two)

    run(networks.partition(names[:1], names[1:], network=None))
    parted = wired.reaches(one, two), wired.reaches(three, one), wired.reaches(two, three)
    run(networks.heal())
    healed = wired.reaches(one, two)
    capture = run(networks.start_capture(tmp_path / "lan.pcap", network="lan"))
    ping = f"ping -c 1 -W 5 -p 5a -s 100 {two.address().ip}"
    assert run(one.run(ping)).returncode == 0
    run(networks.end_capture(capture))
    assert run(one.run(ping)).returncode == 0
    run(networks.impair(network=None, loss=1.0))
    lost = wired.reaches(one, two)
    run(networks.heal())
    counts = run(networks.counts(network="lan"))

    assert parted == (False, False, True)
    assert (healed, lost) == (True, False)
    assert (tmp_path / "lan.pcap").read_bytes().count(b"\x5a" * 90) == 2  # there and back
    assert counts["cut"] > 0
    assert counts["lost"] > 0
    assert counts["carried"] > 10
    assert one.facts.wires == wired.kind
    wired.end([one, two, three])


@both
def test_the_host_reaches_a_machine_while_its_network_is_well_and_while_it_is_not(
    wired: Wired,
) -> None:
    run, networks = wired.worker.engine.run, wired.worker.networks
    (vm,) = wired.machines(RESTORED)
    run(vm.run("nc -ll -p 7 -e cat >/dev/null 2>&1 </dev/null &"))
    for delay_s in (0.0, 0.01, 0.0):
        run(networks.impair(network=None, delay_s=delay_s))
        run(vm.wait_for_port(7))
        with run(vm.connect(7)) as sock:
            sock.settimeout(30)
            sent = os.urandom(1 << 18)
            sock.sendall(sent)
            got = b""
            while len(got) < len(sent):
                got += sock.recv(1 << 16)
        assert got == sent
    wired.end([vm])


@both
def test_a_copy_goes_on_with_what_its_card_was(wired: Wired) -> None:
    (first,) = wired.machines(RESTORED)
    (twin,) = wired.worker.engine.run(first.fork(1))

    assert wired.reaches(twin, first)
    assert twin.facts.wires == wired.kind
    wired.end([first, twin])


def test_what_a_template_is_made_of_tells_its_cards_apart() -> None:
    recipes = []
    for kind in WireKind:
        with (
            tempfile.TemporaryDirectory(prefix="vmsb-") as short,
            closing(Wired(Path(short) / "run", kind).worker) as worker,
        ):
            try:
                build = worker.engine.run(worker.plan(SPEC))
            except HostUnfit as unfit:
                pytest.skip(str(unfit))
            recipes.append(recipe_of(build))
            worker.engine.run(worker.end([MachineController(build)]))

    one, other = recipes
    assert one.digest != other.digest
    assert set(one.parts.items()) ^ set(other.parts.items())


@taps
def test_a_bridge_that_is_removed_is_told_of_at_the_next_use_and_in_the_summary(
    wired: Wired,
) -> None:
    run = wired.worker.engine.run
    one, two = wired.machines(RESTORED, RESTORED)
    wired.inside("ip", "link", "delete", "net0")

    told = r"the bridge on network 'lan' was removed by somebody: net0"
    with pytest.raises(BridgeLost, match=told):
        run(one.connect(80))
    with pytest.raises(BridgeLost, match=told):
        run(wired.worker.networks.heal())
    assert not wired.reaches(one, two)
    wired.end([one, two])
    again = wired.machines(RESTORED, RESTORED)
    assert wired.reaches(*again)
    wired.end(again)
    assert len(wired.worker.incidents) == 1
    assert "BridgeLost: the bridge on network 'lan'" in wired.worker.incidents[0]


@taps
def test_a_tap_that_vanishes_is_told_of_and_a_power_cycle_brings_another(wired: Wired) -> None:
    run = wired.worker.engine.run
    one, two = wired.machines(RESTORED, RESTORED)
    taps = [line.split(": ")[1] for line in wired.inside("ip", "-o", "link").splitlines()]
    wired.inside("ip", "link", "delete", next(name for name in taps if name.startswith("tap")))

    with pytest.raises(TapLost, match=r"the tap of vm[0-9]+ on network 'lan' was removed"):
        run(wired.worker.networks.counts(network="lan"))
    for vm in (one, two):
        run(vm.power_cut())
        run(vm.power_on())
    assert wired.reaches(one, two)
    wired.end([one, two])


@both
def test_when_the_switch_dies_a_bridge_goes_on_and_whatever_needs_the_switch_says_so(
    wired: Wired,
) -> None:
    run = wired.worker.engine.run
    machines = wired.machines(RESTORED, RESTORED)
    line = wired.worker.networks._line
    assert line is not None
    run(_hang_up(line))

    with pytest.raises(SwitchDied, match="the switch has ended"):
        run(wired.worker.networks.counts(network="lan"))
    assert wired.reaches(*machines) == (wired.kind is WireKind.TAP)
    wired.end(machines)
    again = wired.machines(RESTORED, RESTORED)
    assert wired.reaches(*again)
    assert {vm.facts.wires for vm in again} == {wired.kind}
    wired.end(again)


async def _hang_up(line: SwitchLine) -> None:
    """Let go of the switch, which then ends, as if it had ended by itself."""
    line._line.shutdown(socket.SHUT_RDWR)
    while not line.over:
        await asyncio.sleep(0.01)


@taps
def test_machines_that_end_leave_no_interface_there(wired: Wired) -> None:
    machines = wired.machines(RESTORED, RESTORED)
    names = [vm.name for vm in machines]
    run = wired.worker.engine.run
    run(wired.worker.networks.partition(names[:1], names[1:], network=None))
    wired.end(machines)

    links = wired.inside("ip", "-o", "link").splitlines()

    names = [link.split(": ")[1] for link in links]
    assert [name for name in names if not name.startswith("loose")] == ["lo"]


@taps
def test_without_walls_taps_are_refused_with_the_reason(wired: Wired) -> None:
    run = wired.worker.engine.run

    with pytest.raises(HostUnfit, match="VMS-TAP-DENIED") as caught:
        run(wired.worker.networks.loose(["lan"], tier=Tier.BARE))

    assert "no network namespace" in caught.value.evidence
