"""A launched process: what it is given, what it is, and what it can't be any more."""

from __future__ import annotations

import errno
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import Capabilities, OwnedFd
from pytest_vmsandbox.warden.client import Warden, open_warden
from pytest_vmsandbox.warden.requests import Limits, Network, Who
from pytest_vmsandbox.warden.steps import Bind, Proc, Step, Symlink, Tmpfs
from tests.warden.conftest import (
    GROUP,
    PYTHON,
    SLEEP,
    TRUE,
    Streams,
    children_of,
    inner_of,
    order,
    python,
    run,
    see,
    until,
)

# What a process looks like from within.
LOOK = """
import ctypes, json, os, socket
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
descriptors = [number for number in range(1024) if is_open(number)]
libc = ctypes.CDLL(None)
print(json.dumps({
    "status": {name: value.strip() for name, value in status.items()},
    "descriptors": descriptors,
    "environment": dict(os.environ),
    "uid_map": open("/proc/self/uid_map").read().split(),
    "gid_map": open("/proc/self/gid_map").read().split(),
    "namespaces": {
        name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")
    },
    "securebits": libc.prctl(27, 0, 0, 0, 0),
    "ids": [*os.getresuid(), *os.getresgid()],
    "pid": os.getpid(), "session": os.getsid(0), "umask": os.umask(0), "cwd": os.getcwd(),
    "name": socket.gethostname(),
}))
"""

# SECBIT_* of <linux/securebits.h>, all but KEEP_CAPS, all locked.
SECUREBITS = 0b11101111

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


def namespace_of(process: object, name: str) -> str:
    return str(Path(f"/proc/{process}/ns/{name}").readlink())


WHO = pytest.mark.parametrize("who", Who)


@WHO
async def test_it_has_no_privilege_and_no_way_back_to_one(warden: Warden, who: Who) -> None:
    seen = await see(warden, python(LOOK, who=who))

    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(seen["status"][kind], 16) == 0
    assert seen["status"]["NoNewPrivs"] == "1"
    assert seen["status"]["Seccomp"] == ("2" if who is Who.VMM else "0")
    assert seen["securebits"] == SECUREBITS


@WHO
async def test_it_is_one_user_and_knows_no_other(warden: Warden, tier: Tier, who: Who) -> None:
    uid = warden.greeting.uid if who is Who.VMM else warden.greeting.owner_uid

    seen = await see(warden, python(LOOK, who=who))

    assert seen["uid_map"] == [str(uid), str(uid), "1"]
    gid = seen["gid_map"][0]
    assert seen["gid_map"] == [gid, gid, "1"]
    assert seen["ids"] == [uid] * 3 + [int(gid)] * 3
    if who is Who.OWNER and tier is not Tier.QEMU_VM:  # whose warden can't become somebody else
        assert (uid, int(gid)) == (os.getuid(), os.getgid())


@WHO
async def test_all_its_namespaces_are_its_own(warden: Warden, who: Who) -> None:
    seen = (await see(warden, python(LOOK, who=who)))["namespaces"]

    for name in NAMESPACES:
        assert seen[name] != namespace_of("self", name)


async def test_two_processes_share_no_namespace(warden: Warden) -> None:
    with Streams() as first, Streams() as second:
        async with (
            warden.launch(order(SLEEP, "60"), first.descriptors) as one,
            warden.launch(order(SLEEP, "60"), second.descriptors) as two,
        ):
            try:
                seen = [
                    {name: namespace_of(process.pid, name) for name in NAMESPACES}
                    for process in (one, two)
                ]
            except PermissionError:
                pytest.skip("takes a user who may look into VMMs")
    for name in NAMESPACES:
        assert seen[0][name] != seen[1][name]


async def test_the_network_is_the_host_s_where_that_is_asked_for(warden: Warden) -> None:
    seen = await see(warden, python(LOOK, who=Who.OWNER, network=Network.HOST))

    assert seen["namespaces"]["net"] == namespace_of("self", "net")


async def test_who_is_to_make_wires_may_do_so_in_a_network_of_its_own_and_nothing_else(
    warden: Warden,
) -> None:
    script = LOOK.replace(
        "print(",
        """
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind(("lo", 3))
try:
    os.mknod("/machine/node", 0o20600, os.makedev(1, 3))
    made = True
except OSError:
    made = False
print(""",
    ).replace('"pid": os.getpid()', '"made": made, "links": socket.if_nameindex(), "pid": 0')

    seen = await see(warden, python(script, who=Who.OWNER, network=Network.WIRES))

    wanted = int(Capabilities.CAP_NET_ADMIN | Capabilities.CAP_NET_RAW)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(seen["status"][kind], 16) == wanted
    assert int(seen["status"]["CapBnd"], 16) == 0
    assert seen["status"]["NoNewPrivs"] == "1"
    assert seen["securebits"] == SECUREBITS
    for name in NAMESPACES:
        assert seen["namespaces"][name] != namespace_of("self", name)
    assert seen["links"] == [[1, "lo"]]
    assert seen["made"] is False


@pytest.mark.parametrize("network", [Network.WIRES, Network.HOST])
async def test_a_vmm_makes_no_wires_and_never_sees_the_host_s(
    warden: Warden, network: Network
) -> None:
    with pytest.raises(RequestInvalid, match="can't be a VMM's"):
        await run(warden, order(TRUE, who=Who.VMM, network=network))


async def test_its_network_is_a_loopback_that_is_down(warden: Warden) -> None:
    script = """
import json, socket
with socket.socket() as sock:
    sock.settimeout(5)
    try:
        sock.connect(("127.0.0.1", 9))
    except OSError as error:
        said = error.errno
print(json.dumps([said, socket.if_nameindex()]))
"""

    said, interfaces = await see(warden, python(script))

    assert said == errno.ENETUNREACH
    assert [name for _, name in interfaces] == ["lo"]


async def test_it_gets_the_environment_it_is_given_and_no_word_more(warden: Warden) -> None:
    given = {"LANG": "C.UTF-8", "WITH BLANK": "a=b\n", "E\N{LATIN SMALL LETTER E WITH ACUTE}": ""}

    assert (await see(warden, python(LOOK, env=given)))["environment"] == given


@pytest.mark.parametrize("who", Who)
@pytest.mark.parametrize("files", [0, 1, 5, 61])
async def test_it_holds_the_descriptors_it_is_given_and_no_other(
    warden: Warden, who: Who, files: int
) -> None:
    with OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as null:
        seen = await see(warden, python(LOOK, who=who, files=(None,) * files), [null] * files)

    assert seen["descriptors"] == list(range(3 + files))


async def test_descriptors_come_in_the_order_in_which_they_were_given(
    warden: Warden, tmp_path: Path
) -> None:
    script = "import json, os; print(json.dumps([os.pread(n, 9, 0).decode() for n in (3, 4, 5)]))"
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    with paths[0].open() as a, paths[1].open() as b, paths[2].open() as c:
        files = [c.fileno(), a.fileno(), b.fileno()]
        said = await see(warden, python(script, files=(None,) * 3), files)

    assert said == ["c", "a", "b"]


async def test_it_begins_as_the_head_of_a_new_session(warden: Warden) -> None:
    seen = await see(warden, python(LOOK, name="some-name", cwd="/usr/bin"))

    assert seen["pid"] == seen["session"] == 1
    assert seen["name"] == "some-name"
    assert seen["cwd"] == "/usr/bin"
    assert seen["umask"] == 0o077


async def test_a_command_is_not_pid_1_of_its_namespace(warden: Warden) -> None:
    seen = await see(warden, python(LOOK, who=Who.OWNER))

    assert seen["pid"] == 2
    assert seen["umask"] == 0o022


async def test_it_ignores_no_signal_and_blocks_none(warden: Warden) -> None:
    # Python itself ignores some: the shell says what it was given.
    words = (Path("/usr/bin/cat"), "/proc/self/status")

    _, out, _ = await run(warden, order(*words))

    status = dict(line.split(":", 1) for line in out.splitlines())
    for kind in ("SigBlk", "SigIgn", "SigCgt"):
        # But the two signals that the C library keeps for itself, which nobody can set by it.
        assert int(status[kind], 16) & ~(0b11 << 31) == 0


async def test_nobody_in_it_makes_user_namespaces(warden: Warden) -> None:
    script = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
made = libc.unshare(0x10000000)
print(json.dumps([made, ctypes.get_errno(), open("/proc/sys/user/max_user_namespaces").read()]))
"""
    whole_proc = Proc(target="/proc", only_pids=False)
    steps = with_step(order(PYTHON).steps, whole_proc)

    seen = await see(warden, python(script, who=Who.OWNER, steps=steps))

    assert seen == [-1, errno.ENOSPC, "0\n"]


def with_step(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """The steps, with this one in the place of the one of its kind."""
    return tuple(step if type(other) is type(step) else other for other in steps)


async def test_its_session_keyring_is_its_own(warden: Warden) -> None:
    script = """
import ctypes, json, platform
number = {"x86_64": 250, "aarch64": 219}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
print(json.dumps(libc.syscall(number, 0, -3, 0)))
"""
    one = await see(warden, python(script, who=Who.OWNER))
    two = await see(warden, python(script, who=Who.OWNER))

    if one < 0:
        pytest.skip("this kernel has no keys")
    assert one != two


async def test_its_limits_are_those_that_were_asked_for(warden: Warden, tier: Tier) -> None:
    script = """
import json, resource
print(json.dumps([resource.getrlimit(getattr(resource, "RLIMIT_" + name))
    for name in ("CORE", "AS", "NPROC", "FSIZE", "NOFILE")]))
"""
    limits = Limits(address_bytes=1 << 30, processes=50, file_bytes=1 << 20, open_files=100)

    seen = await see(warden, python(script, limits=limits))

    # 1 byte of core, not 0: to the kernel that means "and hand it to nobody" (fs/coredump.c)
    # sudo leaves 0 (sudoers(5), "rlimit_core"), which not even root in a container need raise.
    core = seen[0][0] if tier in (Tier.SUDO, Tier.QEMU_VM) else 1
    assert seen == [[most, most] for most in (core, 1 << 30, 50, 1 << 20, 100)]


async def test_a_vmm_uses_up_little_of_what_its_user_has_elsewhere_too(warden: Warden) -> None:
    script = """
import ctypes, json, resource
libc = ctypes.CDLL(None)
watchers = 0
while watchers < 100 and libc.inotify_init() >= 0:
    watchers += 1
limits = [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_SIGPENDING, 12)]
print(json.dumps([watchers, *limits]))
"""
    assert await see(warden, python(script)) == [8, 1024, 0]
    watchers, *_ = await see(warden, python(script, who=Who.OWNER))

    assert watchers > 8


async def test_a_vmm_watches_few_files_of_those_that_its_user_may_watch(warden: Warden) -> None:
    script = """
import ctypes, json, os
libc = ctypes.CDLL(None)
instance = libc.inotify_init()
names = [f"/usr/bin/{name}" for name in os.listdir("/usr/bin")]
watched = [libc.inotify_add_watch(instance, name.encode(), 2) for name in names]
print(json.dumps(len({watch for watch in watched if watch >= 0})))
"""
    assert await see(warden, python(script)) == 64


async def test_no_command_sees_our_environment(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_SECRET", "hush")
    script = """
import json, os
seen = {}
for name in ("environ", "mem", "root"):
    try:
        seen[name] = open(f"/proc/1/{name}", "rb").read(65536).decode(errors="replace")
    except OSError as error:
        seen[name] = None
print(json.dumps([dict(os.environ), seen]))
"""
    async with open_warden(tier, log=tmp_path / "log") as warden:
        own, seen = await see(warden, python(script, who=Who.OWNER))

    assert "VMSANDBOX_SECRET" not in own
    assert seen == {"environ": None, "mem": None, "root": None}


async def test_blocked_signals_are_not_handed_on(tier: Tier, tmp_path: Path) -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        async with open_warden(tier, log=tmp_path / "log") as warden:
            script = "import json, signal; print(json.dumps(len(signal.pthread_sigmask(0, ()))))"
            blocked = await see(warden, python(script))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)

    assert blocked == 0


async def test_what_is_not_limited_is_as_it_was(warden: Warden) -> None:
    script = "import json, resource; print(json.dumps(resource.getrlimit(resource.RLIMIT_FSIZE)))"

    assert await see(warden, python(script)) == list(resource.getrlimit(resource.RLIMIT_FSIZE))


# How it ends


@WHO
@pytest.mark.parametrize("code", [0, 1, 77, 255])
async def test_its_exit_status_is_told(warden: Warden, who: Who, code: int) -> None:
    assert await run(warden, python(f"raise SystemExit({code})", who=who)) == (code, "", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
async def test_the_signal_that_ended_a_command_is_told_as_a_shell_does(
    warden: Warden, number: signal.Signals
) -> None:
    script = f"import os; os.kill(os.getpid(), {int(number)})"

    assert await run(warden, python(script, who=Who.OWNER)) == (128 + number, "", "")


async def test_a_killed_vmm_ended_by_that_signal(warden: Warden) -> None:
    with Streams() as streams:
        async with warden.launch(order(SLEEP, "60"), streams.descriptors) as process:
            process.kill()

            assert await process.wait() == -signal.SIGKILL


async def test_all_that_it_started_ends_with_it(warden: Warden) -> None:
    script = (
        "import os; os.fork() or os.execv('/usr/bin/sleep', ['sleep', '60']); print(1, flush=True)"
    )
    with Streams() as streams:
        async with warden.launch(python(script), streams.descriptors) as process:
            await process.wait()

            # Both had our end of the pipe: were it open still, this would wait for a minute.
            assert streams.text() == ("1\n", "")


# What can't be started


NOT_STARTED = {
    "a program that is not there": (order("/usr/bin/no-such-program"), errno.ENOENT),
    "a program that is none": (order("/usr/share/zoneinfo/UTC"), errno.EACCES),
    "a directory": (order("/usr/bin"), errno.EACCES),
    "a folder to begin in that is not there": (order(TRUE, cwd="/no/folder"), errno.ENOENT),
    "a source that is not there": (
        order(TRUE, steps=(*order(TRUE).steps, Bind(source="/no/source", target="/x"))),
        errno.ENOENT,
    ),
    "a place that would have to be made on the host": (
        order(TRUE, steps=(*order(TRUE).steps, Tmpfs(target="/usr/x/y", size_mib=1))),
        errno.EROFS,
    ),
    "a symbolic link where there is something": (
        order(TRUE, steps=(*order(TRUE).steps[:-1], Symlink(target="/usr", text="/"))),
        errno.EEXIST,
    ),
    "a room that is not there": (order(TRUE, room="/no/room"), errno.ENOENT),
}


@pytest.mark.parametrize("what", NOT_STARTED)
async def test_what_can_not_be_started_is_an_error_and_leaves_nothing(
    warden: Warden, what: str
) -> None:
    impossible, code = NOT_STARTED[what]
    inner = inner_of(warden)
    await run(warden, order(TRUE))
    held = _descriptors_of(inner)
    with Streams() as streams, pytest.raises(OSError, match=r"\w") as caught:
        async with warden.launch(replace(impossible, group=GROUP), streams.descriptors):
            pass

    assert caught.value.errno == code
    assert "[Errno" not in str(caught.value.strerror)
    await until(lambda: children_of(inner) == [])
    assert _descriptors_of(inner) == held
    assert not any(
        (Path(parent) / f"vmsandbox-{GROUP}").exists() for parent in warden.greeting.groups
    )
    assert await run(warden, order(TRUE)) == (0, "", "")


def _descriptors_of(pid: int) -> int | None:
    """How many descriptors it has; None where we may not look."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except PermissionError:
        return None
