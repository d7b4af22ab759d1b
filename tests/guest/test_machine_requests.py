"""What changes the machine: only in namespaces of our own, or refused."""

# The real thing is looked at with plain calls: a test's loop has nothing else to do meanwhile.
from __future__ import annotations

import asyncio
import errno
import os
import platform
import socket
import sys
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
from pytest_vmsandbox.guest.frames import HEADER_SIZE, TRAILER_SIZE, FrameType, encode_frame
from pytest_vmsandbox.guest.furnishing import Furnishing, Interface, Lines, encode_furnishing
from pytest_vmsandbox.guest.messages import ExecRequest, Identity, encode_hello
from tests.people import CHECKOUT

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
        channel.set_addresses(Interface(name="lo")),
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
    former = (ip_interface("10.9.8.7/24"), ip_interface("10.9.8.8/24"))
    await own_machine.set_addresses(Interface(name="eth0", addresses=former))
    wanted = [ip_interface("10.1.2.3/16"), ip_interface("fd00::5/64")]
    ways = [ip_address("10.1.0.1"), ip_address("fd00::1")]
    await own_machine.set_addresses(Interface(name="eth0", addresses=wanted, gateways=ways))
    shown = await output_of(
        own_machine, "ip", "-brief", "address", "show", "eth0", "scope", "global"
    )

    assert shown.split()[2:] == ["10.1.2.3/16", "fd00::5/64"]
    assert "default via 10.1.0.1 dev eth0" in await output_of(own_machine, "ip", "route")
    assert "default via fd00::1 dev eth0" in await output_of(own_machine, "ip", "-6", "route")
    with pytest.raises(OSError, match="no-such"):
        await own_machine.set_addresses(Interface(name="no-such", addresses=wanted))


async def test_an_interface_is_up_with_addresses_and_down_without_any(
    own_machine: Channel,
) -> None:
    made = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    assert await output_of(own_machine, *made) == ""
    assert await output_of(own_machine, "ip", "link", "set", "eth1", "up") == ""
    address = [ip_interface("10.1.2.3/16")]

    await own_machine.set_addresses(Interface(name="eth0", addresses=address))
    up = await output_of(own_machine, "ip", "-brief", "address", "show", "eth0")
    await own_machine.set_addresses(Interface(name="eth0"))
    down = await output_of(own_machine, "ip", "-brief", "address", "show", "eth0")

    assert up.split()[1:3] == ["UP", "10.1.2.3/16"]
    assert down.split()[1] == "DOWN"
    assert "10.1.2.3" not in down


async def test_what_addresses_leave_in_the_kernel_goes_with_the_last_of_them(
    own_machine: Channel,
) -> None:
    made = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    for argv in (made, *(("ip", "link", "set", name, "up") for name in ("lo", "eth1"))):
        assert await output_of(own_machine, *argv) == ""
    addresses = [ip_interface("10.1.2.3/16"), ip_interface("fd00::5/64")]
    await own_machine.set_addresses(Interface(name="eth0", addresses=addresses))
    env = {"PYTHONPATH": os.pathsep.join((str(CHECKOUT), *filter(None, sys.path)))}
    making = [sys.executable, "-m", "tests.guest.connections"]
    process = await own_machine.spawn(ExecRequest(argv=making, env=env, stdin=True))
    assert process.stdin is not None
    assert await process.stdout.readline() == b"over: \n"

    await own_machine.set_addresses(Interface(name="eth0", addresses=addresses))
    await process.stdin.write(b"\n")
    replaced = await process.stdout.readline()
    learned = await output_of(own_machine, "ip", "tcp_metrics")
    waiting = await output_of(own_machine, "ss", "--no-header", "-tan", "state", "time-wait")
    await own_machine.set_addresses(Interface(name="eth0"))
    await process.stdin.write(b"\n")
    gone = await process.stdout.readline()
    left = await output_of(own_machine, "ss", "--no-header", "-tuan")

    assert replaced == b"over: \n"
    assert "10.1.2.3" in learned
    assert len(waiting.splitlines()) == 2
    assert gone == b"over: v4, v6, mapped, datagrams v4, datagrams v6\n"
    assert left
    assert all("127.0.0.1" in line for line in left.splitlines())
    assert await output_of(own_machine, "ip", "tcp_metrics") == ""
    await process.stdin.close()
    assert await process.wait() == 0


async def test_a_card_is_found_by_its_ethernet_address_and_given_another(
    own_machine: Channel,
) -> None:
    old, new, other = (f"02:00:00:00:00:0{number}" for number in (1, 2, 3))
    for name, mac in (("eth0", other), ("eth1", old)):
        made = ("ip", "link", "add", name, "address", mac, "type", "bridge")
        assert await output_of(own_machine, *made) == ""
    address = [ip_interface("10.1.2.3/16")]

    for card in (f"{old},{new}", f"{old},{new}", new):
        await own_machine.set_addresses(Interface(name=card, addresses=address))
        shown = await output_of(own_machine, "ip", "-brief", "link", "show", "eth1")
        assert shown.split()[2] == new
    assert "10.1.2.3/16" in await output_of(own_machine, "ip", "address", "show", "eth1")
    assert other in await output_of(own_machine, "ip", "link", "show", "eth0")
    for nobody in (old, f"{old},02:00:00:00:00:09", f"{old},", "02:zz:00:00:00:01"):
        with pytest.raises(OSError, match=nobody[:5]) as caught:
            await own_machine.set_addresses(Interface(name=nobody, addresses=address))
        assert caught.value.errno == errno.ENODEV


async def test_a_card_that_is_up_has_its_link_local_address_by_its_ethernet_address(
    own_machine: Channel,
) -> None:
    old, new = "02:00:00:00:00:01", "02:00:00:00:00:02"
    for made in (
        f"ip link add eth0 address {old} type veth peer name eth1",
        "ip link set eth1 up",
        "ip link set eth0 up",
        "ip address add fe80::7/64 dev eth0",
    ):
        assert await output_of(own_machine, *made.split()) == ""

    card = Interface(name=f"{old},{new}", addresses=(ip_interface("fd00::5/64"),))
    await own_machine.set_addresses(card)

    shown = await output_of(own_machine, *["ip", "-brief", "-6", "address", "show", "eth0"])
    wanted = {"fd00::5/64", "fe80::ff:fe00:2/64", "fe80::7/64"}
    assert set(shown.split()[2:]) == wanted


async def test_a_card_far_behind_others_is_found(own_machine: Channel) -> None:
    made = "for n in $(seq 40); do ip link add br$n type bridge; done"
    assert await output_of(own_machine, "sh", "-c", made) == ""
    old, new = "02:00:00:00:00:01", "02:00:00:00:00:02"
    await output_of(own_machine, "ip", "link", "set", "br40", "address", old)

    for card in (f"{old},{new}", f"{old},{new}", new):
        await own_machine.set_addresses(Interface(name=card))
        shown = await output_of(own_machine, "ip", "-brief", "link", "show", "br40")
        assert shown.split()[2] == new


ETH0 = Interface(
    name="02:00:00:00:00:01,02:00:00:00:00:02",
    addresses=(ip_interface("10.1.2.3/16"), ip_interface("fd00::5/64")),
    gateways=(ip_address("10.1.0.1"),),
)
NAMES = Lines(path="/etc/hosts", text="# ours\n10.1.2.3 a\n# end\n")


async def make_card(machine: Channel) -> None:
    made = ("ip", "link", "add", "eth0", "address", "02:00:00:00:00:01", "type", "bridge")
    assert await output_of(machine, *made) == ""


async def test_what_comes_with_the_identity_is_there_once_it_is_answered(
    own_machine: Channel, tmp_path: Path
) -> None:
    await make_card(own_machine)
    resolvers = Lines(path="/etc/resolv.conf", text="nameserver 10.1.0.1\n", are_all=True)
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1 localhost")
    (tmp_path / "etc" / "resolv.conf").write_text("nameserver 127.0.0.1\n" * 5)

    furnishing = Furnishing(interfaces=(ETH0,), files=(resolvers, NAMES))
    await become(own_machine, Identity(hostname="one", furnishing=furnishing))

    assert own_machine.hello.furnished
    assert (tmp_path / "etc" / "hosts").read_text() == f"127.0.0.1 localhost\n{NAMES.text}"
    assert (tmp_path / "etc" / "resolv.conf").read_text() == resolvers.text
    show = "ip -brief address show eth0 scope global"
    shown = await output_of(own_machine, *show.split())
    assert shown.split()[2:] == ["10.1.2.3/16", "fd00::5/64"]
    assert "02:00:00:00:00:02" in await output_of(own_machine, "ip", "link", "show", "eth0")
    assert "default via 10.1.0.1" in await output_of(own_machine, "ip", "route")
    await become(own_machine, Identity(hostname="one"))
    assert not own_machine.hello.furnished


@pytest.mark.parametrize(
    ("there", "becomes"),
    [
        ("", NAMES.text),
        ("mine\n", "mine\n" + NAMES.text),
        ("mine\n# ours\n10.9.9.9 somebody\n# end\nmine too\n", f"mine\n{NAMES.text}mine too\n"),
        ("mine\n# ours\ncut off", "mine\n" + NAMES.text),
        (NAMES.text + "x" * 30_000, NAMES.text + "x" * 30_000),
    ],
)
async def test_a_block_of_lines_replaces_the_former_one_alone(
    own_machine: Channel, tmp_path: Path, there: str, becomes: str
) -> None:
    hosts = tmp_path / "etc" / "hosts"
    hosts.write_text(there)
    hosts.chmod(0o600)

    await become(own_machine, Identity(furnishing=Furnishing(files=(NAMES,))))

    assert own_machine.hello.furnished
    assert hosts.read_text() == becomes
    assert hosts.stat().st_mode & 0o7777 == 0o644


async def test_a_file_that_was_not_there_is_made(own_machine: Channel, tmp_path: Path) -> None:
    await become(own_machine, Identity(furnishing=Furnishing(files=(NAMES,))))

    assert own_machine.hello.furnished
    assert (tmp_path / "etc" / "hosts").read_text() == NAMES.text


async def test_what_can_not_be_had_leaves_the_identity_as_it_was_asked_for(
    own_machine: Channel, tmp_path: Path
) -> None:
    await make_card(own_machine)
    nobody = Interface(name="02:00:00:00:00:08,02:00:00:00:00:09")
    other = Lines(path="/etc/other", text=NAMES.text)
    for number, furnishing in enumerate(
        (
            Furnishing(interfaces=(nobody, ETH0)),
            Furnishing(files=(Lines(path="/dev/zero", text=NAMES.text), other)),
            Furnishing(files=(Lines(path="/etc", text=NAMES.text), other)),
            Furnishing(files=(Lines(path="/no/such/file", text=NAMES.text), other)),
            Furnishing(files=(Lines(path="/etc/hosts", text=""), other)),
        )
    ):
        await become(own_machine, Identity(hostname=f"name-{number}", furnishing=furnishing))

        assert not own_machine.hello.furnished
        assert own_machine.hello.hostname == f"name-{number}"
    assert not (tmp_path / "etc" / "other").exists()
    assert "10.1.2.3" not in await output_of(own_machine, "ip", "address", "show", "eth0")


async def test_what_is_cut_off_anywhere_is_not_had(own_machine: Channel, tmp_path: Path) -> None:
    await make_card(own_machine)
    furnishing = Furnishing(interfaces=(ETH0,), files=(NAMES,))
    rest = len(encode_furnishing(furnishing))
    for left in range(rest):
        token = os.urandom(16)
        whole = encode_hello(token, keep_processes=True, identity=Identity(furnishing=furnishing))
        payload = whole[HEADER_SIZE : -rest - TRAILER_SIZE + left]
        own_machine._token, own_machine._welcome = token, None
        own_machine._line.send(encode_frame(FrameType.HELLO, id_=0, payload=payload))
        async with asyncio.timeout(20):
            answer = await own_machine._wait_welcome()

        assert not answer.furnished, left
    assert not (tmp_path / "etc" / "hosts").exists()


async def test_an_agent_that_does_not_own_its_machine_furnishes_nothing(
    channel: Channel, tmp_path: Path
) -> None:
    path = tmp_path / "hosts"
    lines = Lines(path=str(path), text=NAMES.text)
    await become(channel, Identity(furnishing=Furnishing(files=(lines,))))

    assert not channel.hello.furnished
    assert not path.exists()


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
