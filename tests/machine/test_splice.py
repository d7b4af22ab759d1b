"""Splicing carries bytes as they come."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pytest_vmsandbox.machine.splice import SocketEnd, splice, tcp_pair


@pytest.mark.asyncio
async def test_what_comes_in_pieces_is_not_held_back_until_the_first_is_acknowledged() -> None:
    client, ours = tcp_pair()
    theirs, guest = tcp_pair()
    with client, ours, theirs, guest:
        carrying = asyncio.create_task(splice(SocketEnd(ours), SocketEnd(theirs)))
        client.sendall(b"question")
        guest.settimeout(10)

        came = await asyncio.to_thread(guest.recv, 100)

        assert came == b"question"
        # Whether it would have been held back depends on the other side's mood (tcp(7)).
        for carried in (ours, theirs):
            assert carried.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        client.shutdown(socket.SHUT_WR)
        guest.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(carrying, 10)
