"""Networks: machines that reach each other, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from pytest_vmsandbox import (
    AsyncMachineFactory,
    BootFailed,
    Machine,
    MachineFactory,
    NameTaken,
    Network,
    NetworkFailed,
    RequestInvalid,
    SwitchDied,
    TemplateBuilder,
)
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.ledger import read_ledger
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.wires import NEIGHBOUR_S
from pytest_vmsandbox.machine.worker import Worker
from tests.signals import send_signal


def test_machines_on_one_network_reach_each_other_by_address_and_by_name(
    vm_factory: MachineFactory,
) -> None:
    server, client = vm_factory(count=2, network="lan", name="node")

    for where in (server.ip, server.ip6, "node-1"):
        client.run(["ping", "-c", "1", "-W", "5", where], check=True)
    server.run(["ping", "-c", "1", "-W", "5", "node-2"], check=True)


WEB = "mkdir -p /www && echo hello > /www/index.html && httpd -h /www -p 80"


def test_a_test_reaches_what_listens_in_a_guest(vm_factory: MachineFactory) -> None:
    vm = vm_factory(network="lan")
    with pytest.raises(ConnectionRefusedError):
        vm.connect(80)
    vm.run(WEB, check=True)
    vm.wait_for_port(80)

    with vm.connect(80) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = sock.makefile("rb").read()
    host, port = vm.forward(80)
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as page:
        text = page.read()

    assert answer.endswith(b"\r\n\r\nhello\n")
    assert host == "127.0.0.1"
    assert text == b"hello\n"


# Each -l lets one more connection wait (busybox's nc.c); from the second on it serves for ever.
ECHO = f"nc -{'l' * 250} -p 7 -e cat"


def test_two_hundred_connections_at_once(vm_factory: MachineFactory) -> None:
    vm = vm_factory(network="lan", memory_mib=256)
    vm.popen(ECHO)
    vm.wait_for_port(7)
    address = vm.forward(7)

    async def one(number: int) -> bool:
        reader, writer = await asyncio.open_connection(*address)
        sent = f"{number:08}".encode() * 128
        writer.write(sent)
        writer.write_eof()
        got = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return got == sent

    async def all_at_once() -> list[bool]:
        async with asyncio.timeout(120):
            return await asyncio.gather(*map(one, range(200)))

    assert all(asyncio.run(all_at_once()))


def test_200_mb_through_a_forward_are_the_same_there_and_back(vm_factory: MachineFactory) -> None:
    vm = vm_factory(network="lan")
    vm.popen(ECHO)
    vm.wait_for_port(7)
    block, times = os.urandom(1 << 20), 200
    sent, got = hashlib.sha256(), hashlib.sha256()

    with socket.create_connection(vm.forward(7), timeout=60) as sock:

        def send() -> None:
            for number in range(times):
                piece = number.to_bytes(4, "big") + block
                sent.update(piece)
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)

        sender = Thread(target=send)
        sender.start()
        length = 0
        while piece := sock.recv(1 << 20):
            got.update(piece)
            length += len(piece)
        sender.join()

    assert length == times * (len(block) + 4)
    assert got.digest() == sent.digest()


@pytest.mark.parametrize("how", ["forward", "connect"])
def test_a_connection_to_a_guest_that_dies_is_an_error_and_no_wait(
    vm_factory: MachineFactory, how: str
) -> None:
    vm = vm_factory(network="lan")
    vm.popen("nc -ll -p 9 -e cat /dev/zero")
    vm.wait_for_port(9)
    with vm.connect(9) if how == "connect" else socket.create_connection(vm.forward(9)) as sock:
        sock.settimeout(60)
        assert sock.recv(1000)
        began = time.monotonic()
        vm.power_cut()

        with pytest.raises(ConnectionError):
            _read_to_the_end(sock)

    assert time.monotonic() - began < 15


def _read_to_the_end(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def test_a_forward_stays_where_it_is_through_reboots_and_power_cuts(
    vm_factory: MachineFactory,
) -> None:
    vm = vm_factory(network="lan")
    address = vm.forward(7)
    with socket.create_connection(address) as refused, pytest.raises(ConnectionError):
        refused.recv(1)
    for step in ("as it is", "reboot", "power cut"):
        if step == "reboot":
            vm.reboot()
        if step == "power cut":
            vm.power_cut()
            with socket.create_connection(address) as refused, pytest.raises(ConnectionError):
                refused.recv(1)
            vm.power_on()
        vm.popen(ECHO)
        vm.wait_for_port(7)
        with socket.create_connection(address) as sock:
            sock.sendall(step.encode())
            assert sock.recv(100) == step.encode()


def test_a_machine_without_a_network_is_reached_too(vm: Machine) -> None:
    with pytest.raises(ConnectionRefusedError, match=r"port 80 of 127.0.0.1, from inside"):
        vm.connect(80)
    vm.run(WEB, check=True)

    host, port = vm.forward(80)
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as page:
        text = page.read()

    assert text == b"hello\n"
    with pytest.raises(RequestInvalid, match="no network"):
        _ = vm.ip


def _reaches(one: Machine, other: str, *, within_s: int = 10) -> bool:
    return one.run(["ping", "-c", "1", "-W", str(within_s), other]).returncode == 0


def _is_cut_off_from(one: Machine, other: str) -> bool:
    return not _reaches(one, other, within_s=1)


def test_a_partition_parts_and_heals(vm_factory: MachineFactory, vm_network: Network) -> None:
    one, two, three = vm_factory(count=3, network="lan")
    assert _reaches(one, two.ip)

    vm_network.partition([one], [two, three])
    parted = _is_cut_off_from(one, two.ip) and _is_cut_off_from(three, one.ip6)
    together = _reaches(two, three.ip)
    vm_network.heal()

    assert (parted, together) == (True, True)
    for other in (one.ip, one.ip6):  # a kernel that asked in vain asks again within seconds
        three.wait_until(["ping", "-c", "1", "-W", "1", other])
    assert vm_network.counts()["cut"] > 0


def test_delays_are_felt_and_healed(vm_factory: MachineFactory, vm_network: Network) -> None:
    one, two = vm_factory(count=2, network="lan")

    vm_network.delay("150ms")
    assert _reaches(one, two.ip)  # and each knows the other's Ethernet address now
    slow = _round_trip_ms(one, two.ip)
    vm_network.heal()
    quick = _round_trip_ms(one, two.ip)

    assert slow >= 300
    assert quick < slow - 200


def _round_trip_ms(one: Machine, other: str) -> float:
    done = one.run(["ping", "-c", "3", "-W", "5", other], check=True)
    found = re.search(r"min/avg/max = ([0-9.]+)/", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


def test_a_link_that_is_down_has_no_carrier(vm_factory: MachineFactory) -> None:
    one, two = vm_factory(count=2, network="lan")

    one.link.down()
    down = one.run("cat /sys/class/net/eth0/carrier").stdout, _is_cut_off_from(two, one.ip)
    one.link.up()
    # Linux sends nothing before it has looked at its links again, up to a second later.
    one.wait_until("grep -q up /sys/class/net/eth0/operstate")

    assert down == ("0\n", True)
    assert _reaches(two, one.ip)


def test_what_passes_is_captured(
    vm_factory: MachineFactory, vm_network: Network, tmp_path: Path
) -> None:
    one, two = vm_factory(count=2, network="lan")

    with vm_network.capture(tmp_path / "lan.pcap") as capture:
        one.run(["ping", "-c", "1", "-p", "5a", "-s", "100", two.ip], check=True)
    content = capture.path.read_bytes()
    one.run(["ping", "-c", "1", "-p", "a5", "-s", "100", two.ip], check=True)

    assert content.count(b"\x5a" * 90) == 2  # there and back
    assert capture.path.read_bytes() == content


def test_three_machines_talk_by_tcp_udp_broadcast_and_multicast(
    vm_factory: MachineFactory,
) -> None:
    one, two, three = vm_factory(count=3, network="lan", name="node")
    one.popen("nc -ll -p 1000 -e hostname")
    for host in (one.ip, one.ip6, "node-1"):
        two.wait_for_port(host, 1000)
        assert two.run(["nc", host, "1000"], input="").stdout == "node-1\n"
    # UDP, answered by ICMP (udp(7)); DHCP, which is UDP to everybody; and every machine on a link
    # answers to ff02::1 (RFC 4291, 2.7.1), the others as duplicates of the first.
    traced = two.run(["traceroute", "-n", "-q", "1", "-m", "3", three.ip]).stdout
    three.write_text("/tmp/d.conf", "start 10.76.0.200\nend 10.76.0.209\ninterface eth0\n")
    three.run("touch /var/lib/leases; udhcpd /tmp/d.conf", check=True)
    leased = one.run("udhcpc -n -q -t 9 -T 1 -i eth0 -s /bin/true 2>&1").stdout
    heard = three.run("ping -c 2 -I eth0 ff02::1").stdout

    assert re.search(rf"^ 1  {three.ip} ", traced, re.MULTILINE), traced
    assert "lease of 10.76.0.20" in leased
    assert len(set(re.findall(r"from (fe80::[0-9a-f:]+):", heard))) >= 2, heard


def test_networks_do_not_reach_each_other_but_by_way_of_a_router(
    vm_factory: MachineFactory,
) -> None:
    left = vm_factory(network="left", name="left")
    right = vm_factory(network="right", name="right")
    router = vm_factory(network=["left", "right"], name="router")
    for end in (left, right):
        with contextlib.suppress(ConnectionError):
            end.connect(1)  # so that the host has an end of both
    assert _reaches(left, "router")
    assert _reaches(right, "router")
    route = "ip route add default via {ip}; ip route add default via {ip6}"

    # Not by a machine that does not forward, nor by the host's end.
    left.run(route.format(ip="10.76.0.1", ip6="fd76:6d73:6200::1"), check=True)
    right.run(route.format(ip="10.76.1.1", ip6="fd76:6d73:6200:1::1"), check=True)
    assert _is_cut_off_from(left, right.ip)
    assert _is_cut_off_from(left, right.ip6)
    for end, network in ((left, "left"), (right, "right")):
        end.run("ip route del default; ip -6 route del default")
        ip, ip6 = router.ip_on(network), router.ip6_on(network)
        end.run(route.format(ip=ip, ip6=ip6), check=True)
    assert _is_cut_off_from(left, right.ip)

    router.run("sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1", check=True)

    left.wait_until(["ping", "-c", "1", "-W", "1", right.ip])
    left.wait_until(["ping", "-c", "1", "-W", "1", right.ip6])


def test_a_machine_on_no_network_has_no_card(vm: Machine) -> None:
    assert vm.run("ls /sys/class/net").stdout.split() == ["lo"]


def test_a_machine_on_a_network_reaches_neither_the_host_nor_the_world(
    vm_factory: MachineFactory,
) -> None:
    vm = vm_factory(network="lan")
    with contextlib.suppress(ConnectionError):
        vm.connect(1)  # so that the host has an end of it
    with socket.socket() as listener:
        listener.bind((_own_address(), 0))
        listener.listen()
        host, port = listener.getsockname()
        without = vm.run(["nc", "-w", "2", host, str(port)], input="").returncode
        vm.run("ip route add default via 10.76.0.1", check=True)
        by_our_end = vm.run(["nc", "-w", "2", host, str(port)], input="").returncode
        of_our_end = vm.run(["nc", "-w", "2", "10.76.0.1", str(port)], input="").returncode
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()

    assert 0 not in (without, by_our_end, of_our_end)


def _own_address() -> str:
    """An address of the host, on a real interface where it has one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(sock.getsockname()[0])


@pytest.mark.parametrize("lifecycle", ["booted", "restored"])
def test_a_machine_has_its_own_addresses_however_it_began_and_after_a_reboot(
    vm_factory: MachineFactory, lifecycle: str
) -> None:
    one, two = vm_factory(count=2, network=["front", "back"], lifecycle=lifecycle)
    for _ in range(2):
        for vm, number in ((one, 2), (two, 3)):
            # It can be used from the first moment on. That a carrier came is noted within a second;
            # until then its state is unknown, and good to send by (operstates.rst of the kernel).
            states = vm.run("cat /sys/class/net/eth*/operstate").stdout.split()
            assert len(states) == 2
            assert {"up", "unknown"} >= set(states)
            shown = vm.run("ip -o address; ip -o link").stdout
            for network, place in (("front", 0), ("back", 1)):
                assert f"{vm.ip_on(network)}/24" in shown
                assert f"{vm.ip6_on(network)}/64" in shown
                assert f"02:76:6d:00:{place:02x}:{number:02x}" in shown
        assert _reaches(one, two.ip_on("back"))
        assert _reaches(one, two.ip6_on("front"))
        one.reboot()


def test_whoever_comes_later_is_known_by_name_and_whoever_has_left_is_forgotten(
    vm_factory: MachineFactory,
) -> None:
    first = vm_factory(network="lan", name="first")
    first.run("echo 9.9.9.9 mine >> /etc/hosts", check=True)

    second = vm_factory(network="lan", name="second")

    assert _reaches(first, "second")
    assert _reaches(second, "first")
    assert "9.9.9.9 mine\n" in first.read_text("/etc/hosts")


def test_whoever_is_paused_learns_who_came_when_it_goes_on(vm_factory: MachineFactory) -> None:
    def make(name: str) -> float:
        began = time.monotonic()
        vm_factory(network="lan", name=name)
        return time.monotonic() - began

    one = vm_factory(network="lan", name="one")
    usual_s = make("two")
    one.pause()
    took_s = make("three")

    one.resume()
    known = one.read_text("/etc/hosts")

    assert took_s < usual_s + 0.8 * NEIGHBOUR_S
    assert "three" in known
    assert _reaches(one, "three")


def test_whoever_is_slow_learns_who_came_once_it_is_not(vm_factory: MachineFactory) -> None:
    one = vm_factory(network="lan", name="one")
    one.qmp("stop")  # of which nobody is told
    began = time.monotonic()
    vm_factory(network="lan", name="two")
    first_s = time.monotonic() - began
    vm_factory(network="lan", name="three")
    second_s = time.monotonic() - began - first_s

    one.qmp("cont")
    deadline = time.monotonic() + 60
    while "three" not in one.read_text("/etc/hosts") and time.monotonic() < deadline:
        time.sleep(0.2)

    assert first_s >= NEIGHBOUR_S  # for which the first waits, and nobody else
    assert second_s < first_s - NEIGHBOUR_S / 2
    for name in ("two", "three"):
        assert _reaches(one, name)


def test_a_list_of_names_that_never_ends_is_not_read(vm_factory: MachineFactory) -> None:
    hostile = vm_factory(network="lan", name="hostile")
    hostile.run("umount /etc/hosts; ln -sf /dev/zero /etc/hosts && test -L /etc/hosts", check=True)
    before = _resident_mib()
    began = time.monotonic()

    newcomer = vm_factory(network="lan", name="newcomer")
    took = time.monotonic() - began

    assert _reaches(newcomer, "hostile")
    assert _resident_mib() - before < 100
    assert took < 60
    hostile.power_cut()
    hostile.power_on()  # its root is its initramfs: all is as new
    assert _reaches(hostile, "newcomer")


def test_a_machine_whose_own_list_of_names_never_ends_is_refused(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    def setup(vm: Machine) -> None:
        vm.run("ln -sf /dev/zero /etc/hosts && test -L /etc/hosts", check=True)

    template = vm_templates.build(setup=setup, name="endless_names", network="lan")

    with pytest.raises(NetworkFailed, match="longer than 1048576 bytes"):
        vm_factory(template=template, network="lan")


def _resident_mib() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) >> 10


def test_a_name_is_on_a_network_once(vm_factory: MachineFactory) -> None:
    vm_factory(network="lan", name="db")

    with pytest.raises(NameTaken, match="has a machine 'db' already"):
        vm_factory(network="lan", name="db")
    vm_factory(network="dmz", name="db")


def test_a_machine_whose_name_is_taken_leaves_nothing(worker: Worker) -> None:
    spec = MachineSpec(network=["lan", "dmz"], name="db")
    (first,) = worker.engine.run(worker.make([spec]))

    with pytest.raises(NameTaken, match="has a machine 'db' already"):
        worker.engine.run(worker.make([spec]))

    directories = {path for path in worker.directory.path.rglob("m*") if path.is_dir()}
    assert directories == {first.build.config.directory}
    assert worker.networks.members("dmz") == {"db": first.address("dmz")}


def test_a_machine_that_did_not_start_can_be_powered_on_again(worker: Worker) -> None:
    one, two = worker.engine.run(worker.make([MachineSpec(network="lan")] * 2))
    with pytest.raises(BootFailed):
        worker.engine.run(one.power_on(timeout=0.001))

    worker.engine.run(worker.boot([one, two]))

    ping = ["ping", "-c", "1", "-W", "5", str(one.address().ip)]
    worker.engine.run(two.run(ping, check=True))


def test_what_can_not_be_done_to_networks_is_said(
    vm_factory: MachineFactory, vm_network: Network
) -> None:
    with pytest.raises(RequestInvalid, match="not a network now"):
        vm_network.delay("1ms")
    one, two = vm_factory(count=2, network="lan")
    alone = vm_factory(name="alone")

    for wrong in (
        lambda: vm_network.named("dmz").heal(),
        lambda: vm_network.partition(one, one),
        lambda: vm_network.partition(one, alone),
        lambda: vm_network.partition(one, []),
        lambda: vm_network.delay("soon"),
        alone.link.down,
        lambda: one.link.down(network="dmz"),
        lambda: one.connect(80, network="dmz"),
        lambda: one.connect(0),
        lambda: one.forward(1 << 16),
    ):
        with pytest.raises(RequestInvalid):
            wrong()
    assert _reaches(one, two.ip)


async def test_coroutines_have_the_same(
    async_vm_factory: AsyncMachineFactory, vm_network: Network
) -> None:
    server, client = await async_vm_factory(count=2, network="lan")
    await server.run(WEB, check=True)
    await client.wait_for_port(server.ip, 80)
    reader, writer = await asyncio.open_connection(sock=await server.connect(80))
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    answer = await reader.read()
    writer.close()
    vm_network.partition(server, client)
    await server.link.down()

    assert answer.endswith(b"hello\n")
    assert (await client.run(["ping", "-c", "1", "-W", "1", server.ip])).returncode != 0


def test_when_the_switch_is_killed_it_is_said_and_those_that_come_have_another(
    worker: Worker,
) -> None:
    engine, spec = worker.engine, MachineSpec(network="lan")
    machines = engine.run(worker.make([spec, spec]))
    engine.run(worker.boot(machines))
    one = machines[0]
    engine.run(one.popen("nc -ll -p 7 -e sleep 1000"))
    engine.run(one.wait_for_port(7))
    clients = [
        engine.run(one.connect(7)),
        socket.create_connection(engine.run(one.forward(7))),
    ]
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(client.recv, 1) for client in clients]
        time.sleep(0.3)
        send_signal(_switch(worker).pid, signal.SIGKILL)

        for each in waiting:
            assert isinstance(each.exception(timeout=15), ConnectionError)
    for client in clients:
        client.close()
    for verb in (
        lambda: one.connect(7),
        lambda: worker.networks.partition([one.name], [machines[1].name], network=None),
        lambda: worker.networks.counts(network="lan"),
    ):
        with pytest.raises(SwitchDied, match="the switch has ended"):
            engine.run(verb())
    # The machines themselves are well.
    assert engine.run(one.run("hostname")).returncode == 0
    engine.run(worker.end(machines))

    again = engine.run(worker.make([spec, spec]))
    engine.run(worker.boot(again))
    ping = ["ping", "-c", "1", "-W", "5", str(again[1].address().ip)]
    assert engine.run(again[0].run(ping)).returncode == 0
    engine.run(worker.end(again))
    (incident,) = worker.incidents
    assert incident.startswith("SwitchDied: the switch has ended")


def _switch(worker: Worker) -> ProcessIdentity:
    """The switch that runs, as the ledger knows it."""
    entries = read_ledger(worker.directory.path / LEDGER).entries.values()
    (switch,) = (e for e in entries if isinstance(e, ProcessEntry) and e.role is Role.SWITCH)
    assert switch.identity is not None
    assert switch.identity.is_alive()
    return switch.identity


def test_twins_are_machines_of_their_own_on_the_same_network(vm_factory: MachineFactory) -> None:
    first = vm_factory(network="lan", name="first")
    first.run("ip route add 192.0.2.0/24 via 10.76.0.77", check=True)

    twins = first.fork(2)

    addresses = {vm.ip for vm in (first, *twins)}
    assert addresses == {"10.76.0.2", "10.76.0.3", "10.76.0.4"}
    for vm in (first, *twins):
        assert vm.run("ip -o address").stdout.count("10.76.0.") == 1
        last = int(str(vm.ip).rpartition(".")[2])
        found = vm.run("ip -o -6 address show dev eth0 scope link").stdout
        assert re.findall(r"fe80:[0-9a-f:]+", found) == [f"fe80::76:6dff:fe00:{last:x}"]
        for other in (first, *twins):
            assert _reaches(vm, other.ip)
            assert _reaches(vm, other.name)
    twins[0].reboot()
    assert _reaches(twins[0], twins[1].ip6)


def test_a_machine_that_goes_back_has_its_addresses_and_routes_of_then(
    vm_factory: MachineFactory,
) -> None:
    one = vm_factory(network="lan", name="one")
    one.run("ip route add 192.0.2.0/24 via 10.76.0.77", check=True)
    snapshot = one.snapshot()
    later = vm_factory(network="lan", name="later")

    one.restore(snapshot)

    assert "192.0.2.0/24 via 10.76.0.77" in one.run("ip route").stdout
    assert _reaches(one, "later")
    assert _reaches(later, "one")


def test_a_template_with_a_network_gives_machines_on_it(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    template = vm_templates.build(setup=_note, network="lan")

    one, two = vm_factory(count=2, template=template)

    assert one.read_text("/root/note") == "prepared"
    assert _reaches(one, two.ip)
    assert {one.ip, two.ip} == {"10.76.0.2", "10.76.0.3"}


def _note(vm: Machine) -> None:
    vm.write_text("/root/note", "prepared")


@pytest.mark.parametrize(
    ("network", "cards"), [(None, []), ("dmz", ["eth0"]), (["lan", "dmz"], ["eth0", "eth1"])]
)
def test_a_machine_is_restored_however_many_networks_it_is_on(
    vm_factory: MachineFactory, network: str | list[str] | None, cards: list[str]
) -> None:
    vm = vm_factory(network=network)

    assert vm.facts.lifecycle == "restored"
    assert sorted(vm.run("ls /sys/class/net").stdout.split()) == [*cards, "lo"]


def test_a_template_is_for_at_most_as_many_networks_as_it_was_built_with(
    vm_factory: MachineFactory, vm_templates: TemplateBuilder
) -> None:
    template = vm_templates.build(setup=_note, network=["lan", "dmz"], name="of two")

    none, one = (vm_factory(template=template, network=network) for network in (None, "dmz"))

    assert one.ip_on("dmz") == "10.76.0.2"
    assert none.facts.wires == ""
    for vm, up in ((none, ["lo"]), (one, ["eth0", "lo"])):
        assert vm.read_text("/root/note") == "prepared"
        assert sorted(vm.run("ls /sys/class/net").stdout.split()) == ["eth0", "eth1", "lo"]
        links = vm.run("ip -o link").stdout.splitlines()
        assert sorted(line.split(": ")[1] for line in links if ",UP" in line) == up
    told = "another machine: of two, on mini, .*, 2 cards; asked for is mini, .*3 cards\n"
    with pytest.raises(RequestInvalid, match=told):
        vm_factory(template=template, network=["lan", "dmz", "db"])
    # Whoever is like one with a card that is no use is so as well.
    twin, other = one.fork(1)[0], vm_factory(template=template, network="dmz")
    assert _reaches(twin, one.ip)
    assert _reaches(twin, other.ip)
    twin.reboot()
    assert _reaches(twin, one.ip)
