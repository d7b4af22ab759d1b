"""The arena: a host with victims, and a hostile program let loose in it as a VMM of some tier.

It is run as the user who has the tier, and prints what came of it, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import CloneFlags, MountFlags, mount, unshare
from pytest_vmsandbox.machine.frozen import state_of
from pytest_vmsandbox.machine.memory import new_memory
from pytest_vmsandbox.machine.warden_launcher import WardenLauncher
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.launch import Handed, Launcher, LaunchRequest, Memory, VmmProcess
from pytest_vmsandbox.warden.client import Warden, open_warden
from tests.escape import victims
from tests.escape.attempts.others import SECRET, TRAPS
from tests.escape.attempts.table import Targets

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
PYTHON = "/usr/bin/python3"
MEMORY_MIB = 1024

_MAIN = "from tests.escape.attempts.run import start\nstart()\n"
# The machines beside the hostile one, of the same worker and of another; their shared memory.
_KEYS = {"beside": 0x57000000 | os.getpid(), "elsewhere": 0x58000000 | os.getpid()}

_PACKAGES = ("tests/", "tests/escape/", "tests/escape/attempts/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The files of an arena, and its launchers: our own, and that of another worker."""

    directory: Path
    image: Path
    program: Path
    secret: Path
    launchers: tuple[Launcher, Launcher]
    warden: Warden | None

    def request(self, name: str, *words: str, memories: Sequence[Memory] = ()) -> LaunchRequest:
        """The hostile program in some role, as if it were a VMM called `name`.

        Where its `memories` are is said to it at the end.
        """
        directory = self.directory / "run" / name
        directory.mkdir(exist_ok=True)
        files: tuple[Handed, ...] = (self.image, self.program, *memories)
        seen = self.launchers[0].view(directory=directory, files=files)
        role, *rest = *words, *(str(seen.files[memory]) for memory in memories)
        room = () if role == "attempts" else (str(seen.directory),)
        return LaunchRequest(
            id=f"escape-{os.getpid()}-{name}",  # groups are named so, for the whole host
            argv=[PYTHON, "-I", "-S", str(seen.files[self.program]), role, *room, *rest],
            directory=directory,
            log=self.directory / "run" / f"{name}.log",
            files=files,
            memory_mib=MEMORY_MIB,
        )

    def path_of(self, name: str, file: str) -> str:
        """Where a machine's file lies, as somebody else would look for it."""
        directory = self.directory / "run" / name
        seen = self.launchers[0].view(directory=directory, files=()).directory
        return str(seen / file)


@asynccontextmanager
async def ground(tier: Tier) -> AsyncIterator[Ground]:
    """An arena for that tier."""
    with _files() as directory:
        async with AsyncExitStack() as stack:
            wardens = []
            if tier is not Tier.BARE:
                for name in ("ours", "theirs"):
                    log = directory / f"{name}.log"
                    wardens.append(await stack.enter_async_context(open_warden(tier, log=log)))
            launchers: list[Launcher] = [WardenLauncher.through(warden) for warden in wardens]
            first, second = launchers or (BareLauncher(), BareLauncher())
            yield Ground(
                directory=directory,
                image=directory / "image",
                program=directory / "program.zip",
                secret=directory / "secret",
                launchers=(first, second),
                warden=wardens[0] if wardens else None,
            )


@contextmanager
def _files() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmst-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)  # so that nothing but the view keeps anybody out
        (directory / "run").mkdir()
        (directory / "image").write_bytes(b"image" * 10_000)
        (directory / "secret").write_text("precious")
        with zipfile.ZipFile(directory / "program.zip", "w") as program:
            for package in _PACKAGES:
                program.mkdir(package)
            for module in sorted((HERE / "attempts").glob("*.py")):
                program.write(module, f"{_PACKAGES[-1]}{module.name}")
            program.writestr("__main__.py", _MAIN)
        for path in directory.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield directory


@asynccontextmanager
async def neighbours(place: Ground) -> AsyncIterator[dict[str, VmmProcess]]:
    """Another machine of the same worker, and one of another worker; both answer."""
    async with AsyncExitStack() as stack:
        found: dict[str, VmmProcess] = {}
        if place.warden is None:  # then nothing else takes their shared memory away
            stack.callback(victims.remove_shared_memory, _KEYS.values())
        for name, launcher in zip(_KEYS, place.launchers, strict=True):
            words = ("neighbour", _abstract_name(name), str(_KEYS[name]))
            request = place.request(name, *words)
            found[name] = await stack.enter_async_context(launcher.launch(request))
            assert await ask(found[name]) == SECRET
        yield found


def _abstract_name(name: str) -> str:
    return f"vmsandbox-escape-{os.getpid()}-{name}"


async def ask(process: VmmProcess) -> str:
    """What a neighbour answers; it starts a thread to do so."""
    sock = await process.connect("qmp.sock", deadline=Deadline.after(seconds=20))
    return await asyncio.to_thread(_read, sock)


def _read(sock: socket.socket) -> str:
    with sock:
        sock.settimeout(20)
        return b"".join(iter(lambda: sock.recv(1000), b"")).decode()


async def attempts(tier: Tier) -> dict[str, object]:
    """Make all attempts of the table; what came of each, and what the victims look like."""
    async with ground(tier) as place, neighbours(place) as beside:
        with ExitStack() as stack:
            listening = stack.enter_context(victims.listeners(place.directory))
            victim = stack.enter_context(victims.victim()).pid
            targets = Targets(
                room=place.path_of("hostile", "").rstrip("/"),
                image=_seen(place, place.image),
                image_on_host=str(place.image),
                log=str(place.directory / "run" / "hostile.log"),
                secret=str(place.secret),
                secret_handle=victims.file_handle(place.secret),
                planted="planted",
                checkout=str(CHECKOUT),
                run_directory=str(place.directory / "run"),
                neighbour_files=tuple(place.path_of(name, "secret") for name in beside),
                neighbour_sockets=tuple(place.path_of(name, "qmp.sock") for name in beside),
                neighbours=tuple(process.pid for process in beside.values()),
                neighbour_names=tuple(_abstract_name(name) for name in beside),
                neighbour_keys=tuple(_KEYS.values()),
                victim=victim,
                driver=os.getpid(),
                warden=place.warden.pid if place.warden else os.getppid(),
                tcp_port=listening.tcp.getsockname()[1],
                tcp6_port=listening.tcp6.getsockname()[1] if listening.tcp6 else 1,
                udp_port=listening.udp.getsockname()[1],
                abstract=listening.abstract_name,
                listener=str(place.directory / "listener.sock"),
                key=victims.session_key(),
                ipc_key=stack.enter_context(victims.ipc_objects()),
                queue=stack.enter_context(victims.message_queue()),
                shared_file=str(stack.enter_context(victims.shared_file())),
                memory_mib=MEMORY_MIB,
            )
            return await _attempted(place, targets, listening, beside)


def _seen(place: Ground, path: Path) -> str:
    files = (place.image, place.program)
    return str(place.launchers[0].view(directory=place.directory, files=files).files[path])


async def _attempted(
    place: Ground,
    targets: Targets,
    listening: victims.Listeners,
    beside: dict[str, VmmProcess],
) -> dict[str, object]:
    request = place.request("hostile", "attempts", targets.render())
    (request.directory / targets.planted).symlink_to(place.secret)

    def state() -> dict[str, object]:
        return {
            "victim": victims.state_of_process(targets.victim),
            "image": victims.state_of_file(place.image),
            "secret": victims.state_of_file(place.secret),
        }

    before = state()
    async with place.launchers[0].launch(request) as process:
        status = await process.wait()
    lines = request.log.read_text(errors="backslashreplace").splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"attempt"')]
    return {
        "status": status,
        "said": [line for line in lines if not line.startswith('{"attempt"')],
        "results": {result.pop("attempt"): result for result in results},
        "heard": listening.heard(),
        "harm": _differences(before, state()),
        "neighbours": [await ask(neighbour) for neighbour in beside.values()],
        "limits": list(place.warden.greeting.limits) if place.warden else [],
    }


def _differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [
        f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]
    ]


async def traps(tier: Tier) -> dict[str, object]:
    """Have the warden, or pytest, look at each trap in a hostile room; what it said."""
    async with ground(tier) as place, neighbours(place) as beside:
        with victims.listeners(place.directory) as listening:
            listener = place.directory / "listener.sock"
            request = place.request("hostile", "planter", str(listener), str(place.secret))
            async with place.launchers[0].launch(request) as process:
                await _said(process, "planted", request.log)
                connected = {name: await _outcome(_connect(process, name)) for name in TRAPS}
                # Without walls, nobody but its owner makes this directory; a fifo would hold us.
                read = {
                    name: await _outcome(_read_file(process, name))
                    for name in TRAPS
                    if place.warden is not None
                }
                gift = await _accepted_gift(process)
            heard = listening.heard()
        return {
            "connected": connected,
            "read": read,
            "gift": gift,
            "heard": heard,
            "neighbours": [await ask(neighbour) for neighbour in beside.values()],
        }


async def siege(tier: Tier) -> dict[str, object]:
    """Let a machine hold all that it can get; what others still can do."""
    async with ground(tier) as place, neighbours(place) as beside:
        request = place.request("hostile", "siege")
        async with place.launchers[0].launch(request) as process:
            held = await _said(process, "held", request.log)
            return {
                "held": json.loads(held),
                "neighbours": [await _outcome(ask(neighbour)) for neighbour in beside.values()],
                "another machine": await _outcome(_another(place, place.launchers[0])),
                "another worker's": await _outcome(_another(place, place.launchers[1])),
                "sending descriptors": await _outcome(_send_descriptor()),
                "log MiB": request.log.stat().st_size >> 20,
            }


async def _said(process: VmmProcess, name: str, log: Path) -> str:
    deadline = Deadline.after(seconds=60)
    while True:
        try:
            if text := await process.read_file(name):
                return text.decode()
        except FileNotFoundError:
            pass
        if deadline.passed:
            raise deadline.timed_out(name, log.read_text(errors="backslashreplace"))
        await asyncio.sleep(0.02)


async def _outcome(awaitable: Awaitable[str]) -> str:
    try:
        return await awaitable
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is asked for
        return f"{type(error).__name__}: {error}"[:500]


async def _connect(process: VmmProcess, name: str) -> str:
    (await process.connect(name, deadline=Deadline.after(seconds=0.3))).close()
    return "connected"


async def _accepted_gift(process: VmmProcess) -> str:
    before = sorted(Path("/proc/self/fd").iterdir())
    sock = await process.connect("gift-socket", deadline=Deadline.after(seconds=20))
    text = await asyncio.to_thread(_read, sock)
    after = sorted(Path("/proc/self/fd").iterdir())
    return text if after == before else "descriptors were taken"


async def _read_file(process: VmmProcess, name: str) -> str:
    return f"read {await process.read_file(name)!r}"


async def _another(place: Ground, launcher: Launcher) -> str:
    name = f"late{len(list((place.directory / 'run').iterdir()))}"
    request = place.request(name, "neighbour", _abstract_name(name), str(_KEYS["beside"]))
    async with launcher.launch(request) as process:
        return await ask(process)


async def _send_descriptor() -> str:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [0])
    return "sent"


async def memory(tier: Tier) -> dict[str, object]:
    """Hand over a template's memory and state, and memory that is open: what came of each."""
    with (
        new_memory("sealed", size=_MEMORY_BYTES) as sealed,
        state_of(os.urandom(_MEMORY_BYTES)) as state,
        new_memory("open", size=_MEMORY_BYTES) as unsealed,
    ):
        for each in (sealed, unsealed):
            os.pwrite(each, os.urandom(_MEMORY_BYTES), 0)
        sealed.seal()
        before = _content(sealed), _content(state)
        async with ground(tier) as place:
            handed = (Memory(sealed), Memory(state), Memory(unsealed))
            request = place.request("hostile", "vandal", memories=handed)
            async with place.launchers[0].launch(request) as process:
                tried = json.loads(await _said(process, "tried", request.log))
        first, second, third = request.argv[-3:]
        return {
            "memory": tried[first],
            "state": tried[second],
            "unsealed": tried[third],
            "untouched": (_content(sealed), _content(state)) == before,
        }


def _content(memory: int) -> bytes:
    return os.pread(memory, os.fstat(memory).st_size + 1, 0)


async def flight(tier: Tier) -> dict[str, object]:
    """Have more descriptors in flight than the warden may open: does it still start machines?"""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with ground(tier) as place:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for _ in range(_USUAL_OPEN_FILES // 250 + 2):
                socket.send_fds(ours, [b"x"], [0] * 250)
            return {"another machine": await _outcome(_another(place, place.launchers[0]))}


_PARTS = {"attempts": attempts, "traps": traps, "siege": siege, "flight": flight, "memory": memory}
_USUAL_OPEN_FILES = 1024
_MEMORY_BYTES = 64 << 10


def main(part: str, tier: Tier) -> None:
    """Do one part in one tier, and print what came of it."""
    if tier is Tier.BARE and os.getuid() == 0:
        # What root does without walls, it does to a world of the test's own.
        unshare(CloneFlags.CLONE_NEWNS | CloneFlags.CLONE_NEWUTS | CloneFlags.CLONE_NEWIPC)
        mount(None, "/", None, MountFlags.REC | MountFlags.PRIVATE)
    # As most hosts have it; some kernel-wide limits are compared with it.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_USUAL_OPEN_FILES, most))
    sys.stdout.write(json.dumps(asyncio.run(_PARTS[part](tier))))


if __name__ == "__main__":
    main(sys.argv[1], Tier(sys.argv[2]))
