"""The way out in runs of pytest, in a world that the test made itself."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import RunInWorld

pytestmark = [pytest.mark.machine, pytest.mark.vm_requires("nat")]

TESTS = """
    import socket
    import pytest

    GATEWAY, RESOLVER = "10.76.255.254", "10.76.255.253"

    def reaches_the_world(vm, where="world.test"):
        return vm.run(["wget", "-qO-", f"http://{where}/"], timeout=60).stdout == "the world\\n"

    def is_shut_in(vm):
        return vm.run(["nc", "-w", "2", "192.0.2.1", "80"], input="").returncode != 0

    def test_the_world_is_reached_by_name(vm_factory):
        vm = vm_factory(network="nat")
        assert vm.ip == "10.76.255.2"
        for where in ("world.test", "192.0.2.1", "[2001:db8::1]"):
            assert reaches_the_world(vm, where), where
        found = vm.run(["nslookup", "world.test"], check=True).stdout
        assert "192.0.2.1" in found and "2001:db8::1" in found
        assert RESOLVER in found
        missing = vm.run(["nslookup", "nowhere.test"])
        assert missing.returncode != 0
        assert "NXDOMAIN" in missing.stdout + missing.stderr
        # By TCP: its length, an id, one question for an A.
        question = "0011 1234 0100 0001 0000 0000 0000 05776f726c64 0474657374 00 0001 0001"
        data = bytes.fromhex(question)
        data = (len(data) - 2).to_bytes(2, "big") + data[2:]
        answer = vm.run(["nc", "-w", "5", RESOLVER, "53"], input=data, encoding=None).stdout
        assert answer.endswith(bytes((192, 0, 2, 1)))
        assert "nameserver 10.76.255.253\\n" in vm.read_text("/etc/resolv.conf")
        assert "nameserver fd76:6d73:6200:ff::fd\\n" in vm.read_text("/etc/resolv.conf")
        vm.reboot()
        assert reaches_the_world(vm)

    @pytest.mark.parametrize("lifecycle", ["booted", "restored"])
    def test_the_loopback_of_the_host_is_not(vm_factory, lifecycle):
        vm = vm_factory(network="nat", lifecycle=lifecycle)
        with socket.create_server(("127.0.0.1", 0)) as four:
            port = four.getsockname()[1]
            with socket.create_server(("::1", port), family=socket.AF_INET6) as six:
                vm.run("ip route add 127.9.9.9 dev eth0 via 10.76.255.254; ip route flush cache")
                for where in (GATEWAY, RESOLVER, "10.76.255.1", "10.76.255.77", "255.255.255.255",
                              "127.9.9.9", "fd76:6d73:6200:ff::fe", "fd76:6d73:6200:ff::77"):
                    tried = vm.run(["nc", "-w", "1", where, str(port)], input="")
                    assert tried.returncode != 0, where
                for server in (four, six):
                    server.settimeout(0)
                    with pytest.raises(BlockingIOError):
                        server.accept()

    def test_two_machines_are_apart_and_all_else_is_as_on_other_networks(vm_factory, vm_network):
        one, two = vm_factory(count=2, network="nat", name="node")
        assert (one.ip, two.ip) == ("10.76.255.2", "10.76.255.3")
        assert "node-2" not in one.read_text("/etc/hosts")
        for vm, other in ((one, two), (two, one)):
            for where in (other.ip, other.ip6):
                assert vm.run(["ping", "-c", "1", "-W", "1", where]).returncode != 0
            assert reaches_the_world(vm)
        with vm_network.capture() as capture:
            assert reaches_the_world(one)
        assert b"the world" in capture.path.read_bytes()
        one.run("httpd -p 80 -h /etc", check=True)
        one.wait_for_port(80)
        with one.connect(80):
            pass
        with socket.create_connection(one.forward(80)):
            pass
        one.link.down()
        assert is_shut_in(one)
        assert reaches_the_world(two)

    def test_who_did_not_ask_for_it_reaches_nothing(vm_factory):
        both = vm_factory(network=["lan", "nat"])
        lan, alone = vm_factory(network="lan"), vm_factory()
        lan.run(["ping", "-c", "1", "-W", "5", both.ip], check=True)
        lan.run(f"ip route add default via {both.ip}", check=True)
        for vm in (lan, alone):
            assert is_shut_in(vm)
            assert vm.run(["nslookup", "world.test", RESOLVER]).returncode != 0
            assert "vmsandbox" not in vm.run("cat /etc/resolv.conf").stdout
        assert both.ip == "10.76.0.2"
        assert reaches_the_world(both)
        # Unless the one in between hands it on, in its own name.
        both.run("sysctl -w net.ipv4.ip_forward=1", check=True)
        assert is_shut_in(lan)

    def test_a_twin_has_its_own_way(vm_factory):
        first = vm_factory(network="nat")
        (twin,) = first.fork(1)
        assert twin.ip != first.ip
        for vm in (first, twin):
            assert reaches_the_world(vm)
        snapshot = first.snapshot()
        first.restore(snapshot)
        assert reaches_the_world(first)
"""


@pytest.mark.parametrize("tier", ["auto", "bare"])
def test_the_world_and_nothing_of_the_host(run_in_world: RunInWorld, tier: str) -> None:
    result = run_in_world(TESTS, f"--vm-tier={tier}")

    result.assert_outcomes(passed=6)
