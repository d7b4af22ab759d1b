"""`vmsandbox run` and `vmsandbox shell`, as one types them."""

from __future__ import annotations

import argparse
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox.cli.arguments import cache_of, run_dir_of, tier_of
from pytest_vmsandbox.plugin.options import OPTIONS

VMSANDBOX = [sys.executable, "-m", "pytest_vmsandbox.cli"]


def _run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*VMSANDBOX, *words], input=stdin, capture_output=True, timeout=240, check=False
    )


@pytest.mark.machine
def test_a_command_has_our_streams_and_gives_us_its_status() -> None:
    done = _run("run", "--", "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in\xff\n")

    assert (done.returncode, done.stdout) == (7, b"in\xff\n")
    assert done.stderr.endswith(b"err\n")


@pytest.mark.machine
def test_a_signal_is_128_and_its_number_and_the_shape_is_ours_to_choose() -> None:
    done = _run(
        "run", "--cpus=2", "--memory-mib=200", "mini", "--", "sh", "-c", "nproc; kill -9 $$"
    )

    assert (done.returncode, done.stdout) == (137, b"2\n")


@pytest.mark.machine
def test_a_machine_is_restored_unless_a_boot_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    boot_id = ("--", "cat", "/proc/sys/kernel/random/boot_id")
    restored = {_run("run", *boot_id).stdout for _ in range(2)}
    booted = {_run("run", "--lifecycle=booted", *boot_id).stdout}
    monkeypatch.setenv("VMSANDBOX_LIFECYCLE", "booted")
    booted.add(_run("run", *boot_id).stdout)

    assert len(restored) == 1
    assert len(booted) == 2
    assert restored.isdisjoint(booted)


@pytest.mark.machine
def test_a_machine_that_can_not_be_restored_is_said_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"qemu-system-{os.uname().machine}"
    disk = "-drive if=none,id=n,file=null-co://,format=raw -device nvme,drive=n,serial=n"
    real = shutil.which(name)
    (tmp_path / name).write_text(
        f'#!/bin/sh\ncase "$*" in *virtserialport*) exec {real} "$@" {disk};; esac\n'
        f'exec {real} "$@"\n'
    )
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    done = _run("run", "--tier=bare", "--", "echo", "answered")

    assert (done.returncode, done.stdout) == (0, b"answered\n")
    assert b"vmsandbox: booted each time, not restored: mini, " in done.stderr
    assert b"nvme" in done.stderr


@pytest.mark.machine
@pytest.mark.parametrize(
    ("command", "status"), [("/no/such/command", 127), ("/etc/passwd", 126), ("/", 126)]
)
def test_a_command_that_can_not_be_started_is_127_or_126(command: str, status: int) -> None:
    done = _run("run", "--", command)

    assert (done.returncode, done.stdout) == (status, b"")
    assert command.encode() in done.stderr


@pytest.mark.machine
def test_a_reader_that_has_enough_ends_us_quietly_with_141() -> None:
    run = subprocess.Popen(
        [*VMSANDBOX, "run", "--", "sh", "-c", "yes; echo unreached >&2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"y\n"
    run.stdout.close()
    run.stdout = None  # communicate() would read it
    _, complaints = run.communicate(timeout=120)

    assert run.returncode == 141
    assert b"ipe" not in complaints
    assert b"Traceback" not in complaints


@pytest.mark.machine
def test_a_closed_stdin_is_an_empty_one_and_other_closed_streams_are_nowhere() -> None:
    words = " ".join([*VMSANDBOX, "run", "--", "sh", "-c", "'cat; echo over; exit 3'"])
    without_stdin = subprocess.run(
        ["sh", "-c", f"exec {words} 0<&-"], capture_output=True, timeout=240, check=False
    )
    without_any = subprocess.run(
        ["sh", "-c", f"exec {words} 0<&- 1>&- 2>&-"], timeout=240, check=False
    )

    assert (without_stdin.returncode, without_stdin.stdout) == (3, b"over\n")
    assert b"Traceback" not in without_stdin.stderr
    assert without_any.returncode == 3


def test_a_stdin_that_can_not_be_read_is_refused_before_anything_boots(tmp_path: Path) -> None:
    write_only = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    try:
        done = subprocess.run(
            [*VMSANDBOX, "run", "--", "cat"],
            stdin=write_only,
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write_only)

    assert done.returncode == 125
    assert b"Bad file descriptor" in done.stderr


@pytest.mark.parametrize("argument", [None, "sudo"])
@pytest.mark.parametrize("variable", ["", "bare"])
@pytest.mark.parametrize(
    ("name", "read", "default"),
    [
        ("cache_dir", cache_of, user_cache_path("vmsandbox")),
        ("run_dir", run_dir_of, None),
        ("tier", tier_of, None),
    ],
)
def test_the_environment_is_read_as_pytest_reads_it(
    name: str,
    read: Callable[[argparse.Namespace], object],
    default: Path | None,
    argument: str | None,
    variable: str,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"VMSANDBOX_{name.upper()}", variable)
    monkeypatch.setattr(pytestconfig.option, f"vm_{name}", argument)
    (option,) = (option for option in OPTIONS if option.name == f"vm_{name}")
    given = argument if name == "tier" or argument is None else Path(argument)

    assert read(argparse.Namespace(**{name: given})) == (option.read(pytestconfig) or default)


@pytest.mark.machine
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_machine_lies_where_it_is_told(scratch: Path, by: str) -> None:
    base = scratch / "b"
    words, environment = (["--run-dir", str(base)], {}) if by == "argument" else ([], _at(base))
    with subprocess.Popen(
        [*VMSANDBOX, "run", *words, "--", "cat"],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write(b"up\n")
        run.stdin.flush()
        assert run.stdout.readline() == b"up\n"
        seen = [path.name for path in base.iterdir() if path.name.endswith("-cli")]
    assert run.returncode == 0
    assert len(seen) == 1


def _at(base: Path) -> dict[str, str]:
    return {"VMSANDBOX_RUN_DIR": str(base)}


def test_a_tier_of_the_environment_is_demanded() -> None:
    done = subprocess.run(
        [*VMSANDBOX, "run", "--", "true"],
        env={**os.environ, "VMSANDBOX_TIER": "moon"},
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 125
    assert b"tier='moon'" in done.stderr


def test_an_error_of_the_host_is_125(tmp_path: Path) -> None:
    """No status of the guest's command, whatever errno it has."""
    (tmp_path / "file").touch()
    done = _run("image", "--cache-dir", str(tmp_path / "file" / "below"), "build")

    assert done.returncode == 125
    assert b"Not a directory" in done.stderr


@pytest.mark.machine
def test_a_shell_is_a_terminal_in_the_machine() -> None:
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        [*VMSANDBOX, "shell"], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    )
    os.close(theirs)
    try:
        seen = _read_until(ours, b"#")
        os.write(ours, b"tty; exit 5\n")
        seen += _read_until(ours, b"/dev/pts/0")
        assert shell.wait(timeout=60) == 5
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def _read_until(descriptor: int, wanted: bytes) -> bytes:
    seen = b""
    over = time.monotonic() + 120
    while wanted not in seen:
        assert time.monotonic() < over, seen
        seen += os.read(descriptor, 1000)
    return seen


def test_a_shell_without_a_terminal_is_refused_before_anything_boots() -> None:
    done = _run("shell")

    assert done.returncode == 125
    assert b"stdin is no terminal" in done.stderr


def test_run_without_a_command_is_refused_before_anything_boots() -> None:
    done = _run("run", "mini")

    assert done.returncode == 125
    assert b"there is no command" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--memory-mib=1", "--", "true"), b"memory_mib=1 must be a whole number"),
        (("run", "--accel=xen", "--", "true"), b"accel='xen' must be one of"),
        (("run", "--lifecycle=both", "--", "true"), b"lifecycle='both' must be one of"),
        (("run", "no-such-recipe", "--", "true"), b"no-such-recipe"),
        (("run", "/no/such/image", "--", "true"), b"/no/such/image"),
        (("image", "build", "no-such-recipe"), b"no-such-recipe"),
        (("image", "rm", "no-such-image"), b"no-such-image"),
    ],
)
def test_what_can_not_be_is_named_and_nothing_is_left(
    words: tuple[str, ...], message: bytes
) -> None:
    done = _run(*words)

    assert done.returncode == 125
    assert message in done.stderr


@pytest.mark.parametrize("words", [(), ("no-such-command",), ("run", "--no-such-option")])
def test_wrong_usage_is_status_2(words: tuple[str, ...]) -> None:
    assert _run(*words).returncode == 2


@pytest.mark.parametrize("command", ["doctor", "setup", "image", "run", "shell"])
def test_every_subcommand_has_help(command: str) -> None:
    done = _run(command, "--help")

    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: vmsandbox {command}".encode())


@pytest.mark.machine
def test_images_are_built_listed_and_verified() -> None:
    built = _run("image", "build")
    listed = _run("image", "list")
    verified = _run("image", "verify")

    assert built.returncode == listed.returncode == verified.returncode == 0
    assert b"mini" in built.stdout
    assert b"mini" in listed.stdout
    assert b"whole" in verified.stdout
