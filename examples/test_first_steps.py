"""A first machine: commands, files, users, time-outs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox import CommandFailed, Machine, TimedOut


def test_a_kernel_of_its_own(vm: Machine) -> None:
    assert vm.run("uname -s").stdout == "Linux\n"


def test_a_command_is_answered_like_subprocess_run(vm: Machine) -> None:
    done = vm.run("ls /nope")

    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_check_raises(vm: Machine) -> None:
    with pytest.raises(CommandFailed, match="exited with 3"):
        vm.run("exit 3", check=True)


def test_input_environment_directory_and_user(vm: Machine) -> None:
    done = vm.run(
        ["sh", "-c", "cat; echo $GREETING; pwd; id -un"],
        input="hello\n",
        env={"GREETING": "bonjour"},
        cwd="/tmp",
        user="nobody",
    )

    assert done.stdout.splitlines() == ["hello", "bonjour", "/tmp", "nobody"]


def test_a_command_that_takes_too_long_is_ended(vm: Machine) -> None:
    with pytest.raises(TimedOut, match="sleep 60"):
        vm.run("sleep 60", timeout=0.5)


def test_files_go_in_and_out(vm: Machine, tmp_path: Path) -> None:
    script = tmp_path / "greet"
    script.write_text("#!/bin/sh\necho hello from $(hostname) > /root/greeting\n")
    script.chmod(0o755)

    vm.push(script, "/usr/bin/greet")
    vm.run(["greet"], check=True)
    vm.pull("/root/greeting", tmp_path / "greeting")

    assert (tmp_path / "greeting").read_text().startswith("hello from ")
