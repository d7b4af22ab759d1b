"""Interfaces and addresses, in network namespaces of children."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Callable
from ipaddress import ip_interface, ip_network

import pytest

from pytest_vmsandbox.linux import CloneFlags, unshare
from pytest_vmsandbox.linux.rtnetlink import RouteSocket, Rule

InChild = Callable[..., None]


def test_a_pair_of_interfaces_is_made_addressed_brought_up_and_removed(in_room: InChild) -> None:
    def body() -> None:
        def shown(*words: str) -> str:
            done = subprocess.run(["ip", "-o", *words], capture_output=True, check=True)
            return done.stdout.decode()

        unshare(CloneFlags.NEWNET)
        with RouteSocket() as route:
            route.add_veth("one", "other")
            route.set_mac("one", bytes.fromhex("02766d000001"))
            for name in ("one", "other"):
                route.set_up(name)
            for address in ("10.76.0.1/24", "fd76:6d73:6200::1/64"):
                route.add_address("one", ip_interface(address))
            route.forbid_forwarding("one")

            assert {name for _, name in socket.if_nameindex()} == {"lo", "one", "other"}
            assert "02:76:6d:00:00:01" in shown("link", "show", "one")
            assert "state UP" in shown("link", "show", "other")
            addresses = shown("address", "show", "one")
            assert "10.76.0.1/24" in addresses
            assert "fd76:6d73:6200::1/64" in addresses
            assert "tentative" not in addresses.split("fd76")[1].split("fe80")[0]
            settings = shown("netconf", "show", "dev", "one")
            assert "inet one forwarding off" in " ".join(settings.split())

            route.delete("one")
            assert {name for _, name in socket.if_nameindex()} == {"lo"}

    in_room(body)


def test_rules_decide_in_their_order_what_is_for_the_host_itself(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        own, everything = ip_network("10.76.0.1/32"), ip_network("::/0")
        rules = {
            "20: from all lookup local": Rule(priority=20, to=everything),
            "10: from all to 10.76.0.1 iif one lookup local": Rule(
                priority=10, to=own, interface="one"
            ),
            "11: from all iif one blackhole": Rule(
                priority=11, to=everything, interface="one", table=None
            ),
        }

        def shown() -> set[str]:
            said = b"".join(
                subprocess.run(["ip", version, "rule"], capture_output=True, check=True).stdout
                for version in ("-4", "-6")
            )
            lines = (" ".join(line.split()) for line in said.decode().splitlines())
            return {line.replace(" [detached]", "") for line in lines}

        before = shown()
        with RouteSocket() as route:
            for rule in rules.values():
                route.add_rule(rule)
            assert shown() - before == set(rules)
            with pytest.raises(FileExistsError, match="priority=20"):
                route.add_rule(rules["20: from all lookup local"])
            for rule in rules.values():
                route.delete_rule(rule)
            assert shown() == before
            with pytest.raises(FileNotFoundError, match="priority=20"):
                route.delete_rule(rules["20: from all lookup local"])

    in_room(body)


def test_a_bridge_takes_ports_in_and_lets_them_go_and_says_nothing_by_itself(
    in_room: InChild,
) -> None:
    def body() -> None:
        def shown(name: str) -> str:
            done = subprocess.run(
                ["ip", "-o", "-d", "address", "show", name], capture_output=True, check=True
            )
            return (
                done.stdout.decode()
                + subprocess.run(
                    ["ip", "-o", "-d", "link", "show", name], capture_output=True, check=True
                ).stdout.decode()
            )

        unshare(CloneFlags.NEWNET)
        with RouteSocket() as route:
            route.add_bridge("bridge", ageing_s=300, learned_at_most=4096)
            route.add_veth("one", "other")
            for name in ("bridge", "one"):
                route.be_silent(name)
            route.set_mtu("one", 9000)
            route.set_master("one", "bridge")
            for name in ("bridge", "one", "other"):
                route.set_up(name)

            bridge = shown("bridge")
            assert "forward_delay 0 " in bridge
            assert "stp_state 0 " in bridge
            assert "ageing_time 30000 " in bridge
            assert "mcast_snooping 0 " in bridge
            assert "group_fwd_mask 0xfff8 " in bridge
            assert "inet6" not in bridge
            assert "master bridge" in shown("one")
            assert "mtu 9000" in shown("one")
            assert "inet6" not in shown("one")
            route.set_down("one")
            route.set_master("one", None)
            assert "master" not in shown("one")
            assert "UP" not in shown("one").split(">")[0]

    in_room(body)


def test_errors_say_what_was_asked_for(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        with RouteSocket() as route:
            route.add_veth("one", "other")
            with pytest.raises(FileExistsError, match="make veth one"):
                route.add_veth("one", "third")
            with pytest.raises(OSError, match="no interface nobody"):
                route.set_up("nobody")
            with pytest.raises(OSError, match="no interface nobody"):
                route.set_master("one", "nobody")
            with pytest.raises(OSError, match="no interface nobody"):
                route.stats("nobody")
            with pytest.raises(ValueError, match="interface's name"):
                route.add_bridge("a b", ageing_s=0, learned_at_most=1)
            route.add_address("one", ip_interface("10.76.0.1/24"))
            with pytest.raises(FileExistsError, match=r"give one the address 10.76.0.1/24"):
                route.add_address("one", ip_interface("10.76.0.1/24"))

    in_room(body)


def test_without_the_right_nothing_is_made(in_child: InChild) -> None:
    def body() -> None:
        import os

        if os.geteuid() == 0:  # root may: in its own namespace, not in the host's
            return
        with RouteSocket() as route, pytest.raises(PermissionError) as caught:
            route.add_veth("one", "other")
        assert caught.value.errno == errno.EPERM

    in_child(body)
