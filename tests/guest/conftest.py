"""A real agent on this host, over a socketpair, as root's child or an ordinary user's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import platformdirs
import pytest
import pytest_asyncio

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.guest.channel import Channel, open_channel
from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.guest.toolchain import host_architecture

NONCE = "c0ffee"
NOBODY = 65534
GUEST_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

StartAgent = Callable[..., socket.socket]
OpenChannel = Callable[..., Awaitable[Channel]]


@pytest.fixture(scope="session")
def agent_path() -> Iterator[Path]:
    """The agent, where every user may execute it."""
    cache = platformdirs.user_cache_path("pytest-vmsandbox") / "agent"
    built = agent_binary(architecture=host_architecture(), cache_dir=cache)
    folder = Path(tempfile.mkdtemp(prefix="vmsandbox-agent-"))
    folder.chmod(0o755)
    shutil.copy(built, folder / "agent")
    yield folder / "agent"
    shutil.rmtree(folder)


@pytest.fixture
def start_agent(agent_path: Path) -> Iterator[StartAgent]:
    """Starts agents, and gives the host's end of each one's line; all have ended afterwards."""
    with ExitStack() as undo:

        def start(
            *options: str, user: int | None = None, before: tuple[str, ...] = ()
        ) -> socket.socket:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            fd = str(theirs.fileno())
            command = [*before, str(agent_path), "--fd", fd, "--nonce", NONCE, *options]
            identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
            process = subprocess.Popen(  # type: ignore[call-overload] # identity is one of two shapes
                command, pass_fds=[theirs.fileno()], cwd="/", env=GUEST_ENV, **identity
            )
            theirs.close()
            undo.callback(_stop, process, ours)
            return ours

        yield start


def _stop(process: subprocess.Popen[bytes], line: socket.socket) -> None:
    line.close()
    try:
        process.wait(timeout=20)  # an agent on a socket ends with its line
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


@pytest_asyncio.fixture
async def reach() -> AsyncIterator[OpenChannel]:
    """Opens channels, and closes them afterwards."""
    opened: list[Channel] = []

    async def open_one(sock: socket.socket, **options: object) -> Channel:
        given = {"name": "vm", "nonce": NONCE, "deadline": Deadline.after(seconds=20), **options}
        channel = await open_channel(sock, **given)  # type: ignore[arg-type] # checked by open_channel
        opened.append(channel)
        return channel

    yield open_one
    for channel in opened:
        await channel.close()


@pytest_asyncio.fixture(params=["as we are", "as nobody"])
async def channel(
    request: pytest.FixtureRequest, start_agent: StartAgent, reach: OpenChannel
) -> Channel:
    """A channel to an agent of our own user, and once more to an ordinary user's."""
    if request.param == "as nobody" and os.getuid() != 0:
        pytest.skip("only root can start an agent as somebody else")
    return await reach(start_agent(user=NOBODY if request.param == "as nobody" else None))


@pytest_asyncio.fixture
async def root_channel(start_agent: StartAgent, reach: OpenChannel) -> Channel:
    """A channel to an agent that runs as root."""
    if os.getuid() != 0:
        pytest.skip("the agent must be root for this")
    return await reach(start_agent())
