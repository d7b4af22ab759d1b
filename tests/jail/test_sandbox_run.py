"""How a command behind walls ends, where its output goes, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

from pytest_vmsandbox.errors import HostUnfit, RequestInvalid
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.jail.sandbox import (
    CAPTURE,
    DISCARD,
    STDOUT,
    run_sandbox,
    run_sandbox_with_redirection,
)
from pytest_vmsandbox.jail.sandbox_apart import run_apart
from pytest_vmsandbox.jail.sandbox_config import parse_config
from pytest_vmsandbox.jail.sandbox_run import run_in
from pytest_vmsandbox.linux import read_mountinfo
from pytest_vmsandbox.warden.client import open_warden
from tests.children import no_child_is_left, remember_children
from tests.jail.conftest import USR, Runner
from tests.people import CHECKOUT

pytestmark = pytest.mark.usefixtures("_walls")

# A caller that runs a command for a long time, and says when it has begun.
CALLER = """
import sys
from pytest_vmsandbox.jail.sandbox import run_sandbox
run_sandbox(["sh", "-c", "sleep 1000 & echo; exec sleep " + sys.argv[1]], stdout=None,
            filesystem_root=sys.argv[2], extra_mounts=[("/usr", "/usr", None, "bind")])
"""


TIER = Tier.ROOT if os.getuid() == 0 else Tier.USERNS

# What a root directory has, with /usr mounted, for programs to run.
LINKS = ["bin", "lib", "lib64"]


@pytest.fixture(autouse=True)
def _nothing_is_left(
    request: pytest.FixtureRequest, open_descriptors: Callable[[], list[str]]
) -> Iterator[None]:
    if "somebody" in request.fixturenames and os.getuid() == 0:
        request.getfixturevalue("people")  # which hold a descriptor as long as they are there
    remember_children()
    before = open_descriptors(), set(read_mountinfo()), threading.active_count()
    yield
    assert (open_descriptors(), set(read_mountinfo()), threading.active_count()) == before
    assert no_child_is_left()


def sh(line: str, **options: Any) -> tuple[int, bytes | None, bytes | None]:
    return run_sandbox(["sh", "-c", line], **options)


def give_links(root: Path) -> None:
    for name in LINKS:
        (root / name).symlink_to(f"usr/{name}")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def running(word: str) -> list[int]:
    """The processes that were started with this word, zombies not."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words:
            found.append(int(process.name))
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.01)


# How it ends


@pytest.mark.parametrize("status", [0, 1, 127, 255])
def test_the_exit_status_is_the_commands(status: int) -> None:
    assert sh(f"exit {status}") == (status, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_is_128_and_its_number(somebody: Runner, number: int) -> None:
    assert somebody(f"kill -{number} $$")[0] == 128 + number


def test_a_program_that_is_not_there_is_said_as_subprocess_does(scratch: Path) -> None:
    script = scratch / "script"
    script.write_text("#!/nowhere\n")

    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_sandbox("no-such-program")
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all"):
        run_sandbox(["/nowhere/at/all"])
    with pytest.raises(PermissionError):
        run_sandbox([str(script)])
    with pytest.raises(PermissionError):
        run_sandbox("script", env={"PATH": str(scratch)})
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        run_sandbox("true", cwd="/nowhere")
    script.chmod(0o755)
    with pytest.raises(FileNotFoundError):
        run_sandbox("script", env={"PATH": str(scratch)})


def test_the_next_program_of_that_name_is_taken_where_the_first_can_not_be(scratch: Path) -> None:
    (scratch / "true").write_text("")

    assert run_sandbox("true", env={"PATH": f"/nowhere:{scratch}:/usr/bin"})[0] == 0


def test_a_command_ends_with_its_first_process_and_takes_the_others_along() -> None:
    word = f"1000.{os.getpid()}"

    began = time.monotonic()
    ended = sh(f"sleep {word} & setsid sleep {word} & echo done")

    assert ended == (0, b"done\n", b"")
    assert time.monotonic() - began < 60
    assert running(word) == []


def test_words_values_and_paths_are_handed_over_as_they_are(scratch: Path) -> None:
    odd = "a\n b\\040 é\udcff"  # the last one is a byte that is no character
    folder = scratch / odd
    folder.mkdir()

    _, out, _ = run_sandbox(
        ["sh", "-c", 'pwd; printf %s "$1$A"; touch x', "sh", odd],
        cwd=folder,
        env={"A": odd, "PATH": "/usr/bin:/bin"},
        filesystem_writable_paths=[folder],
        extra_mounts=[("/usr/lib", folder / "mount", None, "bind")],
    )

    assert out == os.fsencode(f"{folder}\n{odd}{odd}")
    assert names(folder) == ["x"]


def test_a_command_may_be_long_but_not_endless() -> None:
    assert run_sandbox(["true", "x" * 100_000])[0] == 0
    with pytest.raises(RequestInvalid, match="shorten"):
        run_sandbox(["true", *["x" * 1000] * 1000])


# Where its output goes


def test_much_output_on_both_streams_at_once_is_all_there() -> None:
    code, out, err = sh("head -c 100000000 /dev/zero & head -c 100000000 /dev/zero >&2; wait")

    assert code == 0
    assert out is not None
    assert err is not None
    assert (len(out), len(err)) == (100_000_000, 100_000_000)


def test_what_is_not_captured_comes_back_as_none() -> None:
    assert sh("echo out; echo err >&2", stdout=DISCARD) == (0, None, b"err\n")
    assert sh("echo out; echo err >&2", stderr=DISCARD) == (0, b"out\n", None)


def test_both_streams_in_one() -> None:
    assert sh("echo a; echo b >&2; echo c", stderr=STDOUT) == (0, b"a\nb\nc\n", None)


def test_output_goes_to_a_file_behind_what_was_written_before(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        log.write("first\n")
        ended = sh("echo out; echo err >&2", stdout=log, stderr=log.fileno())

    assert ended == (0, None, None)
    assert (tmp_path / "log").read_text() == "first\nout\nerr\n"


def test_with_redirection_the_streams_are_ours(capfd: pytest.CaptureFixture[str]) -> None:
    code = run_sandbox_with_redirection(["sh", "-c", "echo out; echo err >&2; exit 3"])

    assert code == 3
    assert capfd.readouterr() == ("out\n", "err\n")


def test_with_redirection_they_go_where_they_are_led() -> None:
    with tempfile.TemporaryFile() as file:
        code = run_sandbox_with_redirection(["echo", "x"], stdout=file, stderr=CAPTURE)
        file.seek(0)
        assert (code, file.read()) == (0, b"x\n")


def test_its_stdin_is_empty() -> None:
    assert run_sandbox("cat") == (0, b"", b"")


def test_it_holds_no_descriptor_of_ours(scratch: Path) -> None:
    with (scratch / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)  # noqa: FBT003 - it takes no name
        _, out, _ = run_sandbox(["ls", "/proc/self/fd"])

    assert out == b"0\n1\n2\n3\n"  # 3 is the directory that ls reads


# From where it is called


async def test_it_can_be_called_inside_a_running_loop() -> None:
    assert sh("echo x") == (0, b"x\n", b"")


async def test_a_warden_that_runs_can_be_used_again(tmp_path: Path) -> None:
    async with open_warden(TIER, log=tmp_path / "log") as warden:
        ended = await asyncio.gather(
            *(run_in(warden, parse_config(["sh", "-c", f"echo {n}; exit {n}"])) for n in range(9))
        )

    assert [(each.exit_code, each.out) for each in ended] == [
        (n, f"{n}\n".encode()) for n in range(9)
    ]


async def test_cancelling_ends_the_command(tmp_path: Path, scratch: Path) -> None:
    word = f"1001.{os.getpid()}"
    give_links(scratch)
    config = parse_config(["sleep", word], filesystem_root=scratch, extra_mounts=[USR])
    async with open_warden(TIER, log=tmp_path / "log") as warden:
        task = asyncio.create_task(run_in(warden, config))
        await asyncio.to_thread(wait_until, lambda: bool(running(word)))
        meanwhile = names(scratch)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running(word) == []

    assert meanwhile == [*LINKS, "usr"]
    assert names(scratch) == LINKS


async def test_cancelled_at_any_moment_nothing_is_left(tmp_path: Path, scratch: Path) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    word = f"1004.{os.getpid()}"
    give_links(scratch)
    mounts = [USR, (None, "/a/b", "tmpfs")]
    config = parse_config(["sleep", word], filesystem_root=scratch, extra_mounts=mounts)
    async with open_warden(TIER, log=tmp_path / "log") as warden:
        for _ in range(40):
            task = asyncio.create_task(run_in(warden, config))
            await asyncio.sleep(moments.uniform(0, 0.05))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert running(word) == [], f"seed {seed}"
            assert names(scratch) == LINKS, f"seed {seed}"


def test_an_interrupted_caller_leaves_nothing() -> None:
    word = f"1002.{os.getpid()}"
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: bool(running(word)))
        signal.pthread_kill(main, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        run_sandbox(["sleep", word])
    helper.join()

    assert running(word) == []


def test_what_work_apart_raises_is_raised_where_it_is_waited_for() -> None:
    async def fail() -> None:
        raise LookupError("this")

    with pytest.raises(LookupError, match="this"):
        run_apart(fail)


def test_twenty_at_a_time_share_a_mount_point(ourselves: Runner, scratch: Path) -> None:
    give_links(scratch)
    mounts = [USR, (None, "/a/b", "tmpfs")]

    def run(number: int) -> str:
        return ourselves.says(
            f"ls -A /a/b; touch /a/b/x; echo {number}", filesystem_root=scratch, extra_mounts=mounts
        )

    with ThreadPoolExecutor(20) as pool:
        seen = list(pool.map(run, range(20)))

    assert seen == [f"{number}\n" for number in range(20)]
    assert names(scratch) == LINKS


@pytest.mark.usefixtures("orphans")
def test_a_killed_caller_leaves_no_process(scratch: Path) -> None:
    word = f"1003.{os.getpid()}"
    give_links(scratch)

    with subprocess.Popen(
        [sys.executable, "-c", CALLER, word, scratch], cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as caller:
        output: IO[bytes] | None = caller.stdout
        assert output is not None
        output.readline()
        wait_until(lambda: bool(running(word)))
        caller.kill()
    wait_until(lambda: not running(word) and not running("1000"))
    wait_until(reap_orphans)

    # what it had made is taken up by the next one that needs it
    run_sandbox("true", filesystem_root=scratch, extra_mounts=[USR])
    assert names(scratch) == LINKS


def reap_orphans() -> bool:
    """Reap what has ended; whether nothing is left that could."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False


def test_a_host_without_walls_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(HostUnfit, match="VMS-JAIL-UNSUPPORTED"):
        run_sandbox("true")


def test_a_parameter_that_can_not_be_starts_nothing() -> None:
    with pytest.raises(RequestInvalid, match="network='none'"):
        run_sandbox("true", network="none")
