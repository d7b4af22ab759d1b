"""`vm.run`, on one machine shared by the module."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Sequence

import pytest

from pytest_vmsandbox import CommandFailed, Machine, RequestInvalid, TimedOut
from pytest_vmsandbox.machine.face import StartOptions

MIB = 1024 * 1024


@pytest.mark.parametrize("status", [0, 1, 7, 126, 255])
def test_the_exit_status_is_that_of_the_command(vm_module: Machine, status: int) -> None:
    assert vm_module.run(["sh", "-c", f"exit {status}"]).returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_is_a_negative_status(vm_module: Machine, number: signal.Signals) -> None:
    assert vm_module.run(f"kill -{number.value} $$").returncode == -number


def test_stdout_and_stderr_come_apart(vm_module: Machine) -> None:
    done = vm_module.run("echo out; echo err >&2")

    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_a_list_is_argv_and_no_shell_reads_it(vm_module: Machine) -> None:
    assert vm_module.run(["echo", "$HOME", "a  b", "*"]).stdout == "$HOME a  b *\n"


def test_text_of_any_script_survives(vm_module: Machine) -> None:
    text = "žluťoučký 漢字 🐎 \u202e"

    done = vm_module.run(["echo", text], env={"WORD": text})

    assert done.stdout == f"{text}\n"
    assert (
        vm_module.run("cat; echo $WORD", input=text, env={"WORD": text}).stdout == text * 2 + "\n"
    )


def test_bytes_that_are_no_text_are_shown_or_given_as_bytes(vm_module: Machine) -> None:
    assert vm_module.run("printf '\\377ok'").stdout == "\\xffok"
    assert vm_module.run("printf '\\377ok'", encoding=None).stdout == b"\xffok"


def test_a_hundred_megabytes_of_output_arrive_whole(vm_module: Machine) -> None:
    done = vm_module.run(f"yes 0123456789abcde | head -c {100 * MIB}", encoding=None)

    assert len(done.stdout) == 100 * MIB
    assert (
        hashlib.sha256(done.stdout).digest()
        == hashlib.sha256(b"0123456789abcde\n" * (100 * MIB // 16)).digest()
    )


def test_ten_megabytes_of_input_come_back_equal(vm_module: Machine) -> None:
    data = os.urandom(10 * MIB)

    assert vm_module.run(["cat"], input=data, encoding=None).stdout == data


def test_a_command_may_leave_its_input_unread(vm_module: Machine) -> None:
    assert vm_module.run(["true"], input=b"x" * MIB).returncode == 0


def test_without_input_a_command_reads_nothing(vm_module: Machine) -> None:
    assert vm_module.run(["cat"]).stdout == ""


def test_variables_directory_and_user_are_as_asked(vm_module: Machine) -> None:
    done = vm_module.run("echo $A; pwd; id -u; id -g", env={"A": "1=2"}, cwd="/tmp", user="nobody")

    assert done.stdout == "1=2\n/tmp\n65534\n65534\n"


def test_the_guest_keeps_its_own_variables(vm_module: Machine) -> None:
    assert "/sbin" in vm_module.run("echo $PATH", env={"A": "1"}).stdout


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"cwd": "/nope"}, FileNotFoundError),
        ({"cwd": "/etc/passwd"}, NotADirectoryError),
        ({"user": "stranger"}, OSError),
    ],
)
def test_what_keeps_a_command_from_starting_is_an_oserror(
    vm_module: Machine, options: StartOptions, error: type[OSError]
) -> None:
    with pytest.raises(error):
        vm_module.run(["true"], **options)


def test_a_program_that_is_not_there_is_file_not_found(vm_module: Machine) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        vm_module.run(["no-such-program"])


def test_check_raises_with_status_and_output(vm_module: Machine) -> None:
    with pytest.raises(CommandFailed) as failed:
        vm_module.run("echo so far; echo why >&2; exit 3", check=True)

    assert failed.value.returncode == 3
    assert "why" in str(failed.value)
    assert "so far" in str(failed.value)


def test_a_timeout_kills_the_whole_process_group(vm_module: Machine) -> None:
    with pytest.raises(TimedOut) as late:
        vm_module.run("sleep 4242 & sleep 4243 & echo begun; wait", timeout=1)

    assert "begun" in str(late.value)
    assert "the guest's agent answers: yes" in str(late.value)
    assert "424" not in vm_module.run("ps").stdout


def test_a_timeout_names_the_command_and_the_seconds(vm_module: Machine) -> None:
    with pytest.raises(TimedOut, match=r"'sleep 30'.*not within \d+\.\d s"):
        vm_module.run(["sleep", "30"], timeout=0.3)


@pytest.mark.parametrize(
    "command", ["", "  ", [], ["", "x"], ["a\0b"], ["echo", 5], ["echo", b"bytes"]]
)
def test_what_is_no_command_is_refused(vm_module: Machine, command: Sequence[str]) -> None:
    with pytest.raises(RequestInvalid):
        vm_module.run(command)


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A": "x\0"}, {"A": 5}, {"A\0": "x"}])
def test_what_can_be_no_variable_is_refused(vm_module: Machine, env: dict[str, str]) -> None:
    with pytest.raises(RequestInvalid):
        vm_module.run(["true"], env=env)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_what_can_be_no_timeout_is_refused(vm_module: Machine, timeout: float) -> None:
    with pytest.raises(RequestInvalid, match="timeout="):
        vm_module.run(["true"], timeout=timeout)


def test_twenty_commands_run_side_by_side_while_one_is_not_read(vm_module: Machine) -> None:
    unread = vm_module.popen("yes", encoding=None)
    results: dict[int, str] = {}

    def ask(number: int) -> None:
        results[number] = vm_module.run(f"sleep 0.1; echo {number}").stdout

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(19)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    still_running = unread.poll() is None
    unread.kill()

    assert results == {number: f"{number}\n" for number in range(19)}
    assert still_running
    assert unread.wait(timeout=10) == -signal.SIGKILL


def test_wait_until_returns_once_the_condition_holds(vm_module: Machine) -> None:
    vm_module.popen("sleep 0.3; touch /run/ready")

    vm_module.wait_until("test -e /run/ready", timeout=20)


def test_wait_until_says_what_it_last_saw(vm_module: Machine) -> None:
    with pytest.raises(TimedOut, match="exit status 4: not yet"):
        vm_module.wait_until("echo not yet >&2; exit 4", timeout=0.5)


def test_a_port_is_awaited_inside_and_from_inside(vm_module: Machine) -> None:
    server = vm_module.popen("sleep 0.3; exec httpd -f -p 8080")

    vm_module.wait_for_port(8080, timeout=20)
    vm_module.wait_for_port("127.0.0.1", 8080, timeout=20)
    with pytest.raises(TimedOut):
        vm_module.wait_for_port(8081, timeout=0.3)
    server.kill()


@pytest.mark.parametrize("where", [(), (0,), (65536,), ("80",), (80, 81), ("", 80), ("h", 80, 1)])
def test_what_can_be_no_port_is_refused(vm_module: Machine, where: tuple[int | str, ...]) -> None:
    with pytest.raises(RequestInvalid, match="port"):
        vm_module.wait_for_port(*where)
