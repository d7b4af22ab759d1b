"""What changes the machine: only in namespaces of our own, or refused."""

# The real thing is looked at with plain calls: a test's loop has nothing else to do meanwhile.
from __future__ import annotations

import errno
import os
import platform
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest
import pytest_asyncio

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.messages import ExecRequest, Identity, encode_hello

pytestmark = pytest.mark.asyncio

NAMESPACES = ("unshare", "--uts", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")


@pytest_asyncio.fixture
async def own_machine(
    start_agent: Callable[..., socket.socket],
    reach: Callable[[socket.socket], Awaitable[Channel]],
    tmp_path: Path,
) -> Channel:
    """An agent that is pid 1 of namespaces of its own, and owns what is in them."""
    if os.getuid() != 0:
        pytest.skip("namespaces like these need root")
    channel = await reach(start_agent("--own-machine", before=NAMESPACES))
    (tmp_path / "etc").mkdir()
    assert await output_of(channel, "mount", "-t", "proc", "proc", "/proc") == ""
    assert await output_of(channel, "mount", "--bind", str(tmp_path / "etc"), "/etc") == ""
    return channel


async def output_of(channel: Channel, *argv: str) -> str:
    process = await channel.spawn(ExecRequest(argv=argv, merge_stderr=True))
    return (await process.communicate())[0].decode()


async def test_an_agent_that_does_not_own_its_machine_changes_nothing_of_it(
    channel: Channel,
) -> None:
    before = platform.node(), Path("/etc/machine-id").exists()
    for change in (
        channel.set_addresses("lo", []),
        channel.poweroff(),
        channel.reboot(),
    ):
        with pytest.raises(PermissionError, match="own its machine"):
            await change

    assert (platform.node(), Path("/etc/machine-id").exists()) == before


async def become(channel: Channel, identity: Identity) -> None:
    deadline = Deadline.after(seconds=20)
    await channel.handshake(nonce="c0ffee", identity=identity, deadline=deadline)


async def test_an_agent_that_does_not_own_its_machine_becomes_nobody_else(channel: Channel) -> None:
    before = platform.node(), Path("/etc/machine-id").exists()
    for identity in (
        Identity(hostname="other"),
        Identity(machine_id="0" * 32),
        Identity(unix_ns=1),
        Identity(entropy=b"x" * 32),
    ):
        with pytest.raises(PermissionError, match="own its machine"):
            await become(channel, identity)
    await become(channel, Identity(restore_id="only-said"))

    assert (platform.node(), Path("/etc/machine-id").exists()) == before
    assert channel.hello.restore_id == "only-said"


async def test_the_hostname_is_set(own_machine: Channel) -> None:
    await become(own_machine, Identity(hostname="twin-7"))

    assert await output_of(own_machine, "uname", "-n") == "twin-7\n"
    with pytest.raises(OSError, match=r"Invalid argument.*hostname"):
        await become(own_machine, Identity(hostname="x" * 65))


async def test_the_machine_id_is_replaced(own_machine: Channel, tmp_path: Path) -> None:
    machine_id = tmp_path / "etc" / "machine-id"
    machine_id.write_text("uninitialized, or longer than one can be\n" * 2)
    for digits in ("ab", "cd"):
        await become(own_machine, Identity(machine_id=digits * 16))

        assert machine_id.read_text() == digits * 16 + "\n"


async def test_a_machine_id_that_can_not_be_written_is_covered(
    own_machine: Channel, tmp_path: Path
) -> None:
    (tmp_path / "etc" / "machine-id").write_text("the image's own\n")
    for command in ("mount -t tmpfs tmpfs /run", "mount -o remount,bind,ro /etc"):
        assert await output_of(own_machine, *command.split()) == ""
    for digits in ("ab", "cd"):
        await become(own_machine, Identity(machine_id=digits * 16))

        assert await output_of(own_machine, "cat", "/etc/machine-id") == digits * 16 + "\n"
    assert (tmp_path / "etc" / "machine-id").read_text() == "the image's own\n"


async def test_a_machine_id_of_an_impossible_length_is_refused(own_machine: Channel) -> None:
    with pytest.raises(OSError, match=r"Invalid argument.*/etc/machine-id"):
        await become(own_machine, Identity(machine_id="ab" * 40))


async def test_entropy_is_taken_and_too_much_is_refused(own_machine: Channel) -> None:
    await become(own_machine, Identity(entropy=os.urandom(512)))
    with pytest.raises(OSError, match=r"Invalid argument.*entropy"):
        await become(own_machine, Identity(entropy=bytes(513)))


async def test_the_same_host_asking_again_changes_nothing_again(
    own_machine: Channel, tmp_path: Path
) -> None:
    await become(own_machine, Identity(machine_id="ab" * 16))
    (tmp_path / "etc" / "machine-id").write_text("changed since\n")
    assert own_machine._token is not None
    hello = encode_hello(
        own_machine._token, keep_processes=True, identity=Identity(machine_id="ab" * 16)
    )
    own_machine._line.send(hello)
    await own_machine.ping(deadline=Deadline.after(seconds=20))

    assert (tmp_path / "etc" / "machine-id").read_text() == "changed since\n"


async def test_addresses_replace_those_that_were_there(own_machine: Channel) -> None:
    await output_of(own_machine, "ip", "link", "add", "eth0", "type", "bridge")
    await own_machine.set_addresses(
        "eth0", [ip_interface("10.9.8.7/24"), ip_interface("10.9.8.8/24")]
    )
    wanted = [ip_interface("10.1.2.3/16"), ip_interface("fd00::5/64")]
    ways = [ip_address("10.1.0.1"), ip_address("fd00::1")]
    await own_machine.set_addresses("eth0", wanted, gateways=ways)
    shown = await output_of(
        own_machine, "ip", "-brief", "address", "show", "eth0", "scope", "global"
    )

    assert shown.split()[2:] == ["10.1.2.3/16", "fd00::5/64"]
    assert "default via 10.1.0.1 dev eth0" in await output_of(own_machine, "ip", "route")
    assert "default via fd00::1 dev eth0" in await output_of(own_machine, "ip", "-6", "route")
    with pytest.raises(OSError, match="no-such"):
        await own_machine.set_addresses("no-such", wanted)


async def test_an_interface_is_up_with_addresses_and_down_without_any(
    own_machine: Channel,
) -> None:
    made = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    assert await output_of(own_machine, *made) == ""
    assert await output_of(own_machine, "ip", "link", "set", "eth1", "up") == ""

    await own_machine.set_addresses("eth0", [ip_interface("10.1.2.3/16")])
    up = await output_of(own_machine, "ip", "-brief", "address", "show", "eth0")
    await own_machine.set_addresses("eth0", [])
    down = await output_of(own_machine, "ip", "-brief", "address", "show", "eth0")

    assert up.split()[1:3] == ["UP", "10.1.2.3/16"]
    assert down.split()[1] == "DOWN"
    assert "10.1.2.3" not in down


async def test_a_card_is_found_by_its_ethernet_address_and_given_another(
    own_machine: Channel,
) -> None:
    old, new, other = (f"02:00:00:00:00:0{number}" for number in (1, 2, 3))
    for name, mac in (("eth0", other), ("eth1", old)):
        made = ("ip", "link", "add", name, "address", mac, "type", "bridge")
        assert await output_of(own_machine, *made) == ""
    address = [ip_interface("10.1.2.3/16")]

    for card in (f"{old},{new}", f"{old},{new}", new):
        await own_machine.set_addresses(card, address)
        shown = await output_of(own_machine, "ip", "-brief", "link", "show", "eth1")
        assert shown.split()[2] == new
    assert "10.1.2.3/16" in await output_of(own_machine, "ip", "address", "show", "eth1")
    assert other in await output_of(own_machine, "ip", "link", "show", "eth0")
    for nobody in (old, f"{old},02:00:00:00:00:09", f"{old},", "02:zz:00:00:00:01"):
        with pytest.raises(OSError, match=nobody[:5]) as caught:
            await own_machine.set_addresses(nobody, address)
        assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("how", ["poweroff", "reboot"])
async def test_an_orderly_end_gives_processes_their_time(
    own_machine: Channel, tmp_path: Path, how: str
) -> None:
    mark = tmp_path / "said-goodbye"
    script = f"trap 'echo bye > {mark}; exit' TERM; echo ready; while :; do sleep 0.1; done"
    process = await own_machine.spawn(ExecRequest(argv=["sh", "-c", script]))
    await process.stdout.readline()
    began = time.monotonic()
    await (own_machine.poweroff() if how == "poweroff" else own_machine.reboot())
    await process.wait()
    while own_machine.lost is None:
        with suppress(ChannelLost):
            await own_machine.ping(deadline=Deadline.after(seconds=20))

    assert mark.read_text() == "bye\n"
    assert time.monotonic() - began < 20


async def test_orphans_are_reaped(own_machine: Channel) -> None:
    await output_of(own_machine, "sh", "-c", "for i in 1 2 3; do (sleep 0.05 &) ; done; sleep 0.3")

    assert await output_of(own_machine, "sh", "-c", "ps ax -o stat= | grep -c Z") == "0\n"
