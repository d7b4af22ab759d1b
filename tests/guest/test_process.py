# The real thing is looked at with plain calls: a test's loop has nothing else to do meanwhile.
from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.messages import ExecRequest, WindowSize
from pytest_vmsandbox.guest.process import GuestProcess

pytestmark = pytest.mark.asyncio


def soon() -> Deadline:
    return Deadline.after(seconds=20)


def sh(script: str, **options: object) -> ExecRequest:
    return ExecRequest(argv=["sh", "-c", script], **options)  # type: ignore[arg-type]


async def output_of(channel: Channel, request: ExecRequest, data: bytes | None = None) -> bytes:
    process = await channel.spawn(request)
    out, err = await process.communicate(data)

    assert (process.returncode, err) == (0, b"")
    return out


@pytest.mark.parametrize("status", [0, 1, 127, 255])
async def test_the_exit_status_is_the_commands(channel: Channel, status: int) -> None:
    process = await channel.spawn(sh(f"exit {status}"))

    assert await process.wait() == status
    assert process.returncode == status


async def test_stdout_and_stderr_are_apart(channel: Channel) -> None:
    process = await channel.spawn(sh("echo out; echo err >&2"))

    assert await process.communicate() == (b"out\n", b"err\n")


async def test_stderr_can_be_merged_into_stdout_in_order(channel: Channel) -> None:
    out = await output_of(channel, sh("echo a; echo b >&2; echo c", merge_stderr=True))

    assert out == b"a\nb\nc\n"


async def test_without_a_stdin_the_command_reads_an_end_of_file(channel: Channel) -> None:
    assert await output_of(channel, ExecRequest(argv=["cat"])) == b""


async def test_ten_megabytes_of_binary_stdin_come_back_equal(channel: Channel) -> None:
    data = os.urandom(10 * 1024 * 1024)

    assert await output_of(channel, ExecRequest(argv=["cat"], stdin=True), data) == data


async def test_a_hundred_megabytes_of_stdout_arrive_without_loss(channel: Channel) -> None:
    process = await channel.spawn(sh("yes 0123456 | head -c 100000000"))
    total = 0
    while part := await process.stdout.read(1024 * 1024):
        assert part == (b"0123456\n" * (len(part) // 8 + 2))[total % 8 :][: len(part)]
        total += len(part)

    assert (await process.wait(), total) == (0, 100_000_000)


async def test_environment_is_added_or_is_all_there_is(channel: Channel) -> None:
    added = await output_of(channel, ExecRequest(argv=["env"], env={"A": "é ü", "PATH": "/bin"}))
    alone = await output_of(
        channel, ExecRequest(argv=["/usr/bin/env"], env={"A": "1"}, inherit_env=False)
    )

    assert "A=é ü\n" in added.decode()
    assert [line for line in added.splitlines() if line.startswith(b"PATH=")] == [b"PATH=/bin"]
    assert alone == b"A=1\n"


async def test_arguments_keep_every_byte(channel: Channel) -> None:
    arguments: list[str | bytes] = ["", " ", "ü\n", b"\xff\xfe", "'\"$(x)"]
    out = await output_of(channel, ExecRequest(argv=["printf", "%s\\0", *arguments]))

    assert out.split(b"\0")[:-1] == [os.fsencode(argument) for argument in arguments]


async def test_a_script_larger_than_a_frame_is_run(channel: Channel) -> None:
    script = "# " + "x" * 100_000 + "\necho ran"

    assert await output_of(channel, sh(script)) == b"ran\n"


async def test_arguments_beyond_the_kernels_limit_are_the_kernels_error(channel: Channel) -> None:
    with pytest.raises(OSError, match="Argument list too long"):
        await channel.spawn(ExecRequest(argv=["echo", "x" * 200_000]))
    with pytest.raises(OSError, match="Argument list too long"):
        await channel.spawn(ExecRequest(argv=["echo"] + ["x" * 100_000] * 30))

    await channel.ping(deadline=soon())


async def test_the_working_directory_is_the_one_asked_for(channel: Channel) -> None:
    assert await output_of(channel, ExecRequest(argv=["pwd"], cwd="/usr")) == b"/usr\n"
    assert await output_of(channel, ExecRequest(argv=["pwd"])) == b"/\n"


@pytest.mark.parametrize(
    ("request_", "error", "named"),
    [
        (ExecRequest(argv=["no-such-program"]), FileNotFoundError, "no-such-program"),
        (ExecRequest(argv=["/etc/passwd"]), PermissionError, "/etc/passwd"),
        (ExecRequest(argv=["true"], cwd="/no/such"), FileNotFoundError, "/no/such"),
        (ExecRequest(argv=["true"], cwd="/etc/passwd"), NotADirectoryError, "/etc/passwd"),
        (ExecRequest(argv=["true"], user="no-such-user"), ProcessLookupError, "no-such-user"),
        (ExecRequest(argv=[""]), FileNotFoundError, ""),
    ],
)
async def test_what_can_not_start_raises_the_guests_error(
    channel: Channel, request_: ExecRequest, error: type[OSError], named: str
) -> None:
    with pytest.raises(error) as caught:
        await channel.spawn(request_)

    assert caught.value.filename == named


async def test_an_empty_command_and_a_nul_are_refused(channel: Channel) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        await channel.spawn(ExecRequest(argv=[]))
    with pytest.raises(ValueError, match="null"):
        await channel.spawn(ExecRequest(argv=["a\0b"]))
    with pytest.raises(ValueError, match="environment"):
        await channel.spawn(ExecRequest(argv=["true"], env={"A=B": "c"}))

    await channel.ping(deadline=soon())


@pytest.mark.parametrize("user", ["nobody", 65534, "65534"])
async def test_a_command_runs_as_the_user_asked_for(root_channel: Channel, user: str | int) -> None:
    script = 'id -u; id -g; echo "$USER $HOME"'
    out = await output_of(root_channel, sh(script, user=user))

    assert out == b"65534\n65534\nnobody /nonexistent\n"


async def test_a_number_needs_no_user_of_that_name(root_channel: Channel) -> None:
    assert await output_of(root_channel, sh("id -u; id -G", user=54321)) == b"54321\n54321\n"


async def test_a_user_gets_the_groups_that_the_guest_gives_him(root_channel: Channel) -> None:
    by_us = await output_of(root_channel, sh("id -G", user="man"))
    by_setpriv = await output_of(
        root_channel, sh("setpriv --reuid=man --regid=man --init-groups id -G")
    )

    assert by_us == by_setpriv


async def test_an_ordinary_agent_may_not_become_somebody_else(channel: Channel) -> None:
    me = (await output_of(channel, sh("id -u"))).strip().decode()
    if me == "0":
        pytest.skip("this agent is root")

    assert await output_of(channel, sh("id -u", user=me)) == me.encode() + b"\n"
    with pytest.raises(PermissionError):
        await channel.spawn(sh("id -u", user=0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
async def test_a_signal_ends_the_command_with_its_number(channel: Channel, number: int) -> None:
    process = await channel.spawn(ExecRequest(argv=["sleep", "100"]))
    await process.send_signal(number)

    assert await process.wait() == -number


async def test_signals_are_not_blocked_or_ignored_in_the_command(channel: Channel) -> None:
    status = await output_of(channel, sh("grep -E 'Sig(Blk|Ign)' /proc/self/status"))

    # Signals from 32 on may be set by whatever started the tests; libc gives 32 and 33 to nobody.
    masks = [int(line.split()[1], 16) & 0x7FFFFFFF for line in status.splitlines()]
    assert masks == [0, 0]


async def test_no_descriptor_of_the_agent_reaches_the_command(channel: Channel) -> None:
    busy = await channel.spawn(ExecRequest(argv=["cat"], stdin=True))
    seen = await output_of(channel, sh("ls /proc/$$/fd"))
    await busy.kill()

    assert seen.split() == [b"0", b"1", b"2"]


async def test_a_signal_reaches_the_whole_process_group(channel: Channel) -> None:
    process = await channel.spawn(sh("sleep 100 & sleep 100 & echo ready; wait"))
    await process.stdout.readline()
    await process.send_signal(signal.SIGTERM)

    assert await process.wait() == -signal.SIGTERM
    assert await process.stdout.read() == b""  # nobody is left who holds it


async def test_signalling_what_has_gone_is_no_error(channel: Channel) -> None:
    process = await channel.spawn(ExecRequest(argv=["true"]))
    await process.wait()
    await process.send_signal(signal.SIGTERM)
    await process.kill()

    assert process.returncode == 0


async def test_kill_ends_the_streams_even_when_a_deserter_holds_them(channel: Channel) -> None:
    process = await channel.spawn(sh("setsid sleep 5 & echo said; sleep 100"))
    assert await process.stdout.readline() == b"said\n"
    await process.kill()

    assert await process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGKILL


async def test_kill_keeps_what_was_written_before(channel: Channel) -> None:
    process = await channel.spawn(sh("head -c 3000000 /dev/zero; echo done >&2; sleep 100"))
    assert process.stderr is not None
    reading = asyncio.create_task(process.stdout.read())
    assert await process.stderr.readline() == b"done\n"
    await process.kill()

    assert len(await reading) == 3_000_000


async def test_after_the_leader_has_gone_its_group_can_still_be_killed(channel: Channel) -> None:
    process = await channel.spawn(sh("sleep 100 & echo started"))
    assert await process.wait() == 0
    await process.kill()

    assert await process.stdout.read() == b"started\n"


async def test_one_unread_stream_does_not_hold_up_nineteen_others(channel: Channel) -> None:
    unread = await channel.spawn(ExecRequest(argv=["yes"]))

    async def echo(number: int) -> bool:
        data = os.urandom(300_000) + bytes([number])
        return await output_of(channel, ExecRequest(argv=["cat"], stdin=True), data) == data

    assert all(await asyncio.gather(*(echo(number) for number in range(19))))
    await channel.ping(deadline=soon())
    assert (await unread.stdout.read(2)) == b"y\n"
    await unread.kill()


async def test_a_stdin_that_is_not_read_holds_up_only_its_writer(channel: Channel) -> None:
    deaf = await channel.spawn(ExecRequest(argv=["sleep", "100"], stdin=True))
    assert deaf.stdin is not None
    writing = asyncio.create_task(deaf.stdin.write(bytes(5_000_000)))
    assert await output_of(channel, sh("echo free")) == b"free\n"

    assert not writing.done()
    await deaf.kill()
    with pytest.raises(BrokenPipeError):
        await writing


async def test_writing_to_a_process_that_reads_no_more_is_a_broken_pipe(channel: Channel) -> None:
    process = await channel.spawn(sh("exec <&-; echo closed; sleep 100", stdin=True))
    assert process.stdin is not None
    await process.stdout.readline()
    with pytest.raises(BrokenPipeError):
        await process.stdin.write(bytes(1_000_000))
    await process.kill()


async def test_closing_stdout_gives_the_command_a_sigpipe(channel: Channel) -> None:
    process = await channel.spawn(ExecRequest(argv=["yes"]))
    await process.stdout.read(10)
    process.stdout.close()

    assert await process.wait() == -signal.SIGPIPE


async def test_a_terminal_is_a_terminal_of_the_size_asked_for(channel: Channel) -> None:
    size = WindowSize(rows=11, columns=77)
    process = await channel.spawn(sh("test -t 0 && stty size; read x; stty size", pty=size))
    assert await process.stdout.readline() == b"11 77\r\n"
    await process.resize(rows=30, columns=100)
    assert process.stdin is not None
    await process.stdin.write(b"go\n")

    assert await process.stdout.read() == b"go\r\n30 100\r\n"
    assert await process.wait() == 0
    assert process.stderr is None


async def test_control_c_on_a_terminal_interrupts(channel: Channel) -> None:
    process = await channel.spawn(sh("echo on; exec sleep 100", pty=WindowSize()))
    await process.stdout.readline()
    assert process.stdin is not None
    await process.stdin.write(b"\x03")

    assert await process.wait() == -signal.SIGINT


async def test_closing_a_terminals_stdin_is_an_end_of_file(channel: Channel) -> None:
    process = await channel.spawn(sh("cat; echo over", pty=WindowSize()))
    assert process.stdin is not None
    await process.stdin.close()

    assert (await process.stdout.read()).endswith(b"over\r\n")


async def test_resizing_without_a_terminal_is_refused(channel: Channel) -> None:
    process = await channel.spawn(ExecRequest(argv=["cat"], stdin=True))
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        await process.resize(rows=1, columns=1)
    await process.kill()


async def test_a_cancelled_spawn_leaves_no_process(channel: Channel, tmp_path: Path) -> None:
    mark = f"5{time.monotonic_ns()}"
    for delay in range(20):
        task = asyncio.create_task(channel.spawn(ExecRequest(argv=["sleep", mark])))
        for _ in range(delay % 5):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
        try:
            process: GuestProcess | None = await task
        except asyncio.CancelledError:
            process = None
        if process is not None:
            await process.kill()
    while channel._jobs:
        await asyncio.sleep(0.01)

    assert (await output_of(channel, sh(f"ps ax | grep '[s]leep {mark}' || true"))) == b""


async def test_a_cancelled_read_or_write_loses_nothing(channel: Channel) -> None:
    process = await channel.spawn(ExecRequest(argv=["cat"], stdin=True))
    assert process.stdin is not None
    for _ in range(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await process.stdout.readexactly(6)
    await process.stdin.write(b"whole\n")

    assert await process.stdout.readline() == b"whole\n"
    await process.kill()


async def test_readline_and_iteration_give_whole_lines(channel: Channel) -> None:
    process = await channel.spawn(sh("printf 'a\\nbb\\n\\nlast'"))

    assert [line async for line in process.stdout] == [b"a\n", b"bb\n", b"\n", b"last"]
    assert process.stdout.at_eof()


async def test_a_line_without_an_end_is_refused_not_collected(channel: Channel) -> None:
    process = await channel.spawn(sh("tr '\\0' x < /dev/zero"))
    with pytest.raises(ValueError, match="newline"):
        await process.stdout.readline()
    await process.kill()


async def test_too_many_commands_at_once_are_refused_and_harm_nobody(channel: Channel) -> None:
    async def hold() -> GuestProcess | OSError:
        try:
            return await channel.spawn(ExecRequest(argv=["cat"], stdin=True))
        except OSError as error:
            return error

    held = await asyncio.gather(*(hold() for _ in range(220)))
    running = [process for process in held if isinstance(process, GuestProcess)]
    await asyncio.gather(*(process.kill() for process in running))
    await asyncio.gather(*(process.wait() for process in running))

    assert len(running) == 200
    assert await output_of(channel, sh("echo fine")) == b"fine\n"


async def test_the_agent_keeps_no_zombie_and_no_descriptor(channel: Channel) -> None:
    agent = int(await output_of(channel, sh("echo $PPID")))
    before = await output_of(channel, sh(f"ls /proc/{agent}/fd | wc -l"))
    await asyncio.gather(*(output_of(channel, sh("true")) for _ in range(50)))
    after = await output_of(channel, sh(f"ls /proc/{agent}/fd | wc -l"))

    assert int(after) < int(before) + 10  # 50 commands would have left 50
    assert await output_of(channel, sh(f"ps --ppid {agent} -o stat= | grep -c Z || true")) == b"0\n"
