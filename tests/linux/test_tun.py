"""Taps, in network namespaces of children."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from pytest_vmsandbox.linux import CloneFlags, unshare
from pytest_vmsandbox.linux.rtnetlink import RouteSocket
from pytest_vmsandbox.linux.tun import DEVICE, open_tap

InChild = Callable[..., None]


@pytest.fixture
def in_network(in_room: InChild, user_id: int) -> InChild:
    """A child in a network namespace of its own, who may make taps there."""
    mode = os.stat(DEVICE).st_mode if os.path.exists(DEVICE) else 0  # noqa: PTH110, PTH116
    if not (mode and user_id == 0) and not mode & 0o002:
        pytest.skip(f"VMS-TEST-NO-TUN: uid {user_id} may not open {DEVICE}")
    return in_room


def test_what_one_writes_another_on_the_same_bridge_reads(in_network: InChild) -> None:
    def body() -> None:
        import time

        unshare(CloneFlags.NEWNET)
        with RouteSocket() as route, open_tap("one") as one, open_tap("two", offloads=True) as two:
            route.add_bridge("bridge", ageing_s=300, learned_at_most=10)
            for name in ("one", "two"):
                route.be_silent(name)
                route.set_mtu(name, 9000)
                route.set_master(name, "bridge")
                route.set_up(name)
            route.be_silent("bridge")
            route.set_up("bridge")
            frame = b"\xff" * 6 + b"\x02\x76\x6d\0\0\x02" + b"\x88\xb5" + b"x" * 8000
            os.write(one, frame)
            deadline = time.monotonic() + 10
            while True:
                try:
                    heard = os.read(two, 1 << 17)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
            assert heard == bytes(10) + frame
            assert route.stats("two").sent == 1
            assert route.stats("two").dropped == 0

            route.set_down("one")
            with pytest.raises(OSError, match="Input/output"):
                os.write(one, frame)
            route.delete("two")
            with pytest.raises(OSError, match="bad state"):
                os.read(two, 1)

    in_network(body)


def test_a_name_that_is_taken_or_impossible_is_refused_and_nothing_is_left(
    in_network: InChild,
) -> None:
    def body() -> None:
        import socket

        unshare(CloneFlags.NEWNET)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with open_tap("one"):
            for wrong, error in (("one", OSError), ("tap%d", ValueError), ("", ValueError)):
                with pytest.raises(error):
                    open_tap(wrong)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        assert [name for _, name in socket.if_nameindex()] == ["lo"]

    in_network(body)
