"""A first machine: commands, files, users, time-outs.

`vm` is a fresh machine for one test; `vm_module` is one machine that all tests of a file share,
for tests that do not get in each other's way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox import CommandFailed, Machine, TimedOut


def test_a_kernel_of_its_own(vm: Machine) -> None:
    assert vm.run("uname -s").stdout == "Linux\n"


def test_a_command_is_answered_like_subprocess_run(vm_module: Machine) -> None:
    done = vm_module.run("ls /nope")

    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_check_raises(vm_module: Machine) -> None:
    with pytest.raises(CommandFailed, match="exited with 3"):
        vm_module.run("exit 3", check=True)


def test_input_environment_directory_and_user(vm_module: Machine) -> None:
    done = vm_module.run(
        ["sh", "-c", "cat; echo $GREETING; pwd; id -un"],
        input="hello\n",
        env={"GREETING": "bonjour"},
        cwd="/tmp",
        user="nobody",
    )

    assert done.stdout.splitlines() == ["hello", "bonjour", "/tmp", "nobody"]


def test_a_command_that_takes_too_long_is_ended(vm_module: Machine) -> None:
    with pytest.raises(TimedOut, match="sleep 60"):
        vm_module.run("sleep 60", timeout=0.5)


def test_files_go_in_and_out(vm_module: Machine, tmp_path: Path) -> None:
    script = tmp_path / "greet"
    script.write_text("#!/bin/sh\necho hello from $(hostname) > /root/greeting\n")
    script.chmod(0o755)

    vm_module.push(script, "/usr/bin/greet")
    vm_module.run(["greet"], check=True)
    vm_module.pull("/root/greeting", tmp_path / "greeting")

    assert (tmp_path / "greeting").read_text().startswith("hello from ")
