"""Setups with a way out: what their machines are given for it, and that none of it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox import Machine, NetworkFailed, RequestInvalid
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.builder import Setup
from pytest_vmsandbox.machine.templates.shelf import NAME
from pytest_vmsandbox.machine.templates.template import read_manifest
from pytest_vmsandbox.machine.worker import Worker
from tests.machine.templates.preparing import Builder, Restored, names_in, require_made_once
from tests.machine.test_nat import without_a_gateway

pytestmark = [pytest.mark.machine, pytest.mark.vm_requires("nat")]

# All that a guest's network consists of, and who it knows by name.
STATE = """
ip addr; ip route show table all; ip -6 route show table all; ip neigh; ip -6 neigh
cd /proc/net; cat arp route ipv6_route if_inet6 tcp tcp6 udp udp6 raw fib_trie igmp dev_mcast
for file in /etc/hosts /etc/resolv.conf; do ls -l $file | cut -c1-10; cat $file; done
cat /proc/self/mounts; ls /run
"""

OURS = "# vmsandbox: who answers to names"
OWN = "nameserver 192.0.2.9\n"


def state_of(vm: Machine) -> str:
    done = vm.run(STATE)
    return done.stdout + done.stderr


def by_way_of_nat(vm: Machine) -> None:
    """Have all the state that a guest gets, a neighbour and connections included."""
    assert vm.ip == "10.76.255.2"
    assert OURS in vm.read_text("/etc/resolv.conf")
    assert "10.76.255.2 template\n" in vm.read_text("/etc/hosts")
    assert "default via 10.76.255.254" in vm.run("ip route").stdout
    vm.run("nc -w 1 10.76.255.254 9")
    assert "lladdr" in vm.run("ip neigh").stdout
    # One that goes on, and one that is over, which Linux remembers for a minute.
    for port, stays_s in ((7, 1000), (8, 0)):
        vm.popen(f"sleep {stays_s} | nc -l -p {port}")
        vm.wait_for_port(port)
        vm.popen(f"sleep {stays_s} | nc {vm.ip} {port}")
    for port, state in ((7, "01"), (8, "06")):  # established, and TIME_WAIT
        ours = f"cat /proc/net/tcp /proc/net/tcp6 | grep 02FF4C0A | grep :{port:04X}"
        vm.wait_until(f"{ours} | grep ' {state} '")
    vm.write_text("/root/made", "")


def without(vm: Machine) -> None:
    vm.write_text("/root/made", "")


@pytest.mark.parametrize("tier", ["auto", "bare"])
def test_a_machine_is_as_if_its_setup_had_had_no_way_out(
    worker: Worker, builder: Builder, tier: str
) -> None:
    lent = builder.build(setup=by_way_of_nat, setup_network="nat", tier=tier, name="lent")
    # A card, and nothing plugged into it.
    loose = builder.build(setup=without, network="lan", tier=tier, name="loose")

    states = []
    for template in (lent, loose):
        with Restored(worker, template, network=None, tier=tier, name="same") as vm:
            states.append(state_of(vm))
            assert vm.facts.wires == ""
            with pytest.raises(RequestInvalid, match="same is on no network"):
                assert vm.ip

    assert states[0] == states[1]
    for trace in ("10.76.255", "fd76", "02:76:6d:00:ff", "template"):
        assert trace not in states[0]


def test_a_machine_out_of_it_is_on_the_network_that_it_asks_for(
    worker: Worker, builder: Builder
) -> None:
    def setup(vm: Machine) -> None:
        by_way_of_nat(vm)
        vm.link.down()

    template = builder.build(setup=setup, setup_network="nat")

    with (
        Restored(worker, template, network="lan", name="one") as one,
        Restored(worker, template, network="lan", name="two") as two,
        Restored(worker, template, network="nat", name="three") as three,
        Restored(worker, template) as alone,
    ):
        assert (one.ip, two.ip, three.ip) == ("10.76.0.2", "10.76.0.3", "10.76.255.2")
        one.run(["ping", "-c", "1", "-W", "5", "two"], check=True)
        assert "02:76:6d:00:00:02" in one.run("ip link show eth0").stdout
        for vm in (one, alone):
            state = state_of(vm)
            assert "10.76.255" not in state
            assert "default" not in state
        assert "one" not in alone.read_text("/etc/hosts")
        assert OURS in three.read_text("/etc/resolv.conf")
        assert "default via 10.76.255.254" in three.run("ip route").stdout


def test_the_machines_of_a_template_may_stay_on_it(worker: Worker, builder: Builder) -> None:
    def setup(vm: Machine) -> None:
        assert vm.ip_on("nat") == "10.76.255.2"
        with pytest.raises(RequestInvalid, match="on no network 'lan'"):
            vm.ip_on("lan")

    template = builder.build(setup=setup, network=["lan", "nat"])

    with Restored(worker, template) as vm:
        assert (vm.ip, vm.ip_on("nat")) == ("10.76.0.2", "10.76.255.2")
        assert "default via 10.76.255.254 dev eth1" in vm.run("ip route").stdout


def test_a_layer_has_a_way_out_if_it_asks_for_one(worker: Worker, builder: Builder) -> None:
    def alone(vm: Machine) -> None:
        assert "10.76.255" not in state_of(vm)
        with pytest.raises(RequestInvalid, match="on no network"):
            assert vm.ip

    base = builder.build(setup=by_way_of_nat, setup_network="nat", name="base")
    middle = builder.build(setup=alone, base=base)
    top = builder.build(setup=by_way_of_nat, base=middle, setup_network="nat", name="top")
    plain = builder.build(setup=without, name="plain")

    with Restored(worker, top) as vm:
        assert "10.76.255" not in state_of(vm)
    with pytest.raises(RequestInvalid, match=r"setup_network=\"nat\" takes a .* <Template plain"):
        builder.build(setup=without, base=plain, setup_network="nat", name="too late")


# What a guest had before


def choosing(vm: Machine) -> None:
    vm.write_text("/etc/resolv.conf", OWN)


def read_only(vm: Machine) -> None:
    vm.write_text("/etc/resolv.conf", OWN)
    vm.run("mount -o remount,ro /", check=True)


def linking(vm: Machine) -> None:
    vm.run("mkdir -p /run/resolve; ln -s ../run/resolve/stub.conf /etc/resolv.conf", check=True)
    vm.write_text("/run/resolve/stub.conf", OWN)


@pytest.mark.parametrize("below", [choosing, read_only, linking])
def test_a_guest_gets_back_what_it_had(worker: Worker, builder: Builder, below: Setup) -> None:
    def setup(vm: Machine) -> None:
        assert OURS in vm.read_text("/etc/resolv.conf")
        assert OWN not in vm.read_text("/etc/resolv.conf")

    base = builder.build(setup=below, network="lan")
    template = builder.build(setup=setup, base=base, setup_network="nat", name="above")

    states = []
    for one in (base, template):
        with Restored(worker, one, network=None, name="same") as vm:
            states.append(state_of(vm))
            assert vm.read_text("/etc/resolv.conf") == OWN
    assert states[0] == states[1]


def test_what_a_setup_wrote_itself_stays(worker: Worker, builder: Builder) -> None:
    def setup(vm: Machine) -> None:
        vm.write_text("/etc/resolv.conf", OWN)
        vm.write_text("/etc/hosts", vm.read_text("/etc/hosts") + "192.0.2.7 mirror\n")

    template = builder.build(setup=setup, setup_network="nat")

    with Restored(worker, template) as vm:
        assert vm.read_text("/etc/resolv.conf") == OWN
        assert vm.read_text("/etc/hosts").endswith("192.0.2.7 mirror\n")
        assert "10.76.255" not in state_of(vm)


def test_what_a_setup_mounted_itself_stays(worker: Worker, builder: Builder) -> None:
    def setup(vm: Machine) -> None:
        vm.write_text("/root/hosts", "192.0.2.7 mirror\n")
        vm.run("mount --bind /root/hosts /etc/hosts", check=True)

    template = builder.build(setup=setup, setup_network="nat")

    with Restored(worker, template) as vm:
        assert vm.read_text("/etc/hosts") == "192.0.2.7 mirror\n"
        assert "10.76.255" not in state_of(vm)


def test_one_that_boots_in_its_setup_has_its_way_out_again(
    worker: Worker, builder: Builder
) -> None:
    def setup(vm: Machine) -> None:
        vm.reboot()
        by_way_of_nat(vm)
        vm.power_cut()
        vm.power_on()
        by_way_of_nat(vm)

    template = builder.build(setup=setup, setup_network="nat")

    with Restored(worker, template) as vm:
        assert "10.76.255" not in state_of(vm)
        vm.run("test -e /root/made", check=True)
        # Its card is still there, and nobody at its other end.
        vm.reboot()
        assert "10.76.255" not in state_of(vm)


# What is made once, and what is refused


def test_a_way_out_makes_it_another_template(builder: Builder) -> None:
    wishes = [
        {"network": "lan"},
        {"network": "lan", "setup_network": "nat"},
        {"network": "nat"},
        {"network": "nat", "setup_network": "nat"},
    ]
    made = [
        builder.build(setup=without, key="apart", name=f"{at}", **each)
        for at, each in enumerate(wishes)
    ]

    assert len({template.digest for template in made[:3]}) == 2
    assert made[1].digest == made[2].digest == made[3].digest
    assert len(builder.prepared) == 2


def test_of_two_workers_who_want_it_at_once_one_makes_it(
    new_worker: Callable[[str], Worker],
) -> None:
    builders = [Builder(new_worker(name)) for name in ("one", "two")]

    require_made_once(builders, setup=by_way_of_nat, setup_network="nat", key="at once")


def test_a_machine_that_is_called_as_it_is_and_another_setup_do_no_harm(
    worker: Worker, builder: Builder
) -> None:
    names = []

    def inner(vm: Machine) -> None:
        names.append(vm.name)

    def outer(vm: Machine) -> None:
        names.append(vm.name)
        builder.build(setup=inner, setup_network="nat", key="")

    spec = MachineSpec(network="nat", name="template")
    (machine,) = worker.engine.run(worker.make([spec]))
    builder.build(setup=outer, setup_network="nat", key="")
    worker.engine.run(worker.end([machine]))

    assert names == ["template-2", "template-3"]


@pytest.mark.parametrize("wanted", ["lan", "host", ["nat"], "", True])
def test_no_setup_is_on_a_network_with_others(builder: Builder, wanted: object) -> None:
    with pytest.raises(RequestInvalid) as raised:
        builder.build(setup=without, setup_network=wanted)  # type: ignore[arg-type]

    assert str(raised.value).startswith(f"setup_network={wanted!r}: a setup is on no network with")
    assert 'setup_network="nat"' in str(raised.value)
    assert builder.prepared == []


def test_one_without_a_gateway_fails_and_leaves_nothing(
    worker: Worker, builder: Builder, scratch: Path, cache_dir: Path
) -> None:
    before = names_in(cache_dir)
    told = r"gateway .* can't be started(?s:.*)no way out"
    with without_a_gateway(worker, scratch), pytest.raises(NetworkFailed, match=told):
        builder.build(setup=by_way_of_nat, setup_network="nat", name="stuck", key="stuck")

    assert builder.ended == len(builder.prepared)
    assert "stuck" not in worker.prepared
    assert worker.networks.names == ()
    # That program's own machine, booted, and nothing of the setup.
    (booted,) = names_in(cache_dir) - before
    assert read_manifest(cache_dir / NAME / booted).base is None
