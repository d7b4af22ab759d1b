"""`vmsandbox setup`, for real: on this host, and taken back from it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pytest_vmsandbox
from pytest_vmsandbox.cli import setup
from pytest_vmsandbox.host.setup_plan import PACKAGES, SUDOERS_FILE, UDEV_FILE, Command, Step
from pytest_vmsandbox.host.setup_record import RECORD, SetupRecord

CHECKOUT = Path(pytest_vmsandbox.__file__).parents[1]
SCRIPT = (
    "import argparse, sys; from pytest_vmsandbox.cli import setup; p = argparse.ArgumentParser(); "
    "setup.add_arguments(p); sys.exit(setup.run(p.parse_args()))"
)

takes_root = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, ("apt-get", "sudo", "visudo", "setpriv"))),
    reason="takes root, apt, sudo and setpriv: it changes this host, and changes it back",
)


def run_setup(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SUDO_USER"}
    return subprocess.run(
        [*before, sys.executable, "-c", SCRIPT, *words],
        cwd=CHECKOUT,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def as_user(name: str) -> tuple[str, ...]:
    entry = pwd.getpwnam(name)
    return ("setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--init-groups", "--")


def run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout


def exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def state_of_host() -> dict[str, object]:
    """All that a setup may change."""
    sudoers = Path("/etc/sudoers.d")
    rules = Path("/etc/udev/rules.d")
    return {
        "packages": run("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"),
        "users": [line for line in run("getent", "passwd").splitlines() if "vmst" not in line],
        "groups": [line for line in run("getent", "group").splitlines() if "vmst" not in line],
        "sudoers": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sudoers.iterdir()
            if "vmst" not in path.name
        },
        "rules": sorted(rules.iterdir()) if rules.exists() else [],
        "kvm": run("getfacl", "-cp", "/dev/kvm") if Path("/dev/kvm").exists() else "",
        "record": RECORD.exists(),
    }


@contextmanager
def user_database() -> Iterator[None]:
    """The lock under which the tests of all rooms add and remove users."""
    descriptor = os.open("/etc/sudoers.d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@pytest.fixture
def host_to_change() -> Iterator[str]:
    """This host, for this test alone, with an ordinary user made for it; the user's name."""
    with user_database():
        if RECORD.exists() or Path(SUDOERS_FILE).exists() or Path(UDEV_FILE).exists():
            pytest.skip("takes a host that nobody has set up: this one is, and stays so")
        if exists("qemu-vm"):
            pytest.skip("takes a host without qemu-vm: this one has it, and it is left alone")
        name = f"vmst{os.getpid()}s"
        run("useradd", "--user-group", "--no-create-home", "--shell", "/bin/sh", name)
        try:
            yield name
        finally:
            run_setup("--undo")
            run("userdel", name)


@takes_root
def test_a_setup_is_said_done_repeated_and_taken_back_without_a_trace(host_to_change: str) -> None:
    user = host_to_change
    before = state_of_host()

    dry = run_setup("--dry-run", "--user", user)
    untouched = state_of_host()
    done = run_setup("--user", user)
    if "install the packages" in done.stdout and done.returncode:
        run_setup("--undo")
        pytest.skip(f"takes a reachable apt source: {done.stderr[-300:]}")
    changed = state_of_host()
    repeated = run_setup("--user", user)
    after_repeat = state_of_host()
    as_qemu_vm = run(*as_user(user), "sudo", "-n", "-u", "qemu-vm", "--", "id", "-un")
    as_root = subprocess.run(
        [*as_user(user), "sudo", "-n", "true"], capture_output=True, timeout=20, check=False
    )
    made = pwd.getpwnam("qemu-vm")
    mode = Path(SUDOERS_FILE).stat().st_mode & 0o777
    missing_packages = [name for name in PACKAGES if not setup._has_package(name)]
    undone = run_setup("--undo")
    undone_again = run_setup("--undo")

    assert dry.returncode == 0
    assert "would make the system user qemu-vm" in dry.stdout
    assert untouched == before
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.removesuffix(" ...") for line in done.stdout.splitlines()]
    assert steps == [line.removeprefix("would ") for line in dry.stdout.splitlines()]
    assert changed != before
    assert missing_packages == []
    assert (made.pw_shell, made.pw_dir) == ("/usr/sbin/nologin", "/nonexistent")
    assert mode == 0o440
    assert as_qemu_vm == "qemu-vm\n"
    assert as_root.returncode != 0
    assert repeated.stdout == "nothing to do: every step is done\n"
    assert after_repeat == changed
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert state_of_host() == before
    assert undone_again.stdout == "nothing to undo\n"


@takes_root
def test_what_was_there_before_stays_after_an_undo(host_to_change: str) -> None:
    user = host_to_change
    run("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "qemu-vm")
    try:
        before = state_of_host()

        done = run_setup("--user", user)
        undone = run_setup("--undo")

        assert done.returncode == 0 or "install the packages" in done.stdout
        assert "make the system user" not in done.stdout
        assert undone.returncode == 0, undone.stderr
        assert state_of_host() == before
    finally:
        run("userdel", "qemu-vm")


@takes_root
def test_a_sudoers_file_of_somebody_elses_is_left_alone(host_to_change: str) -> None:
    theirs = Path(SUDOERS_FILE)
    theirs.write_text("# theirs\n")
    theirs.chmod(0o440)
    try:
        done = run_setup("--user", host_to_change)

        assert done.returncode == 1
        if "packages" not in done.stderr:
            assert "left as it is" in done.stderr
        assert theirs.read_text() == "# theirs\n"
        undone = run_setup("--undo")
        assert theirs.read_text() == "# theirs\n"
        assert not exists("qemu-vm"), undone.stdout
    finally:
        theirs.unlink()
        RECORD.unlink(missing_ok=True)


@takes_root
def test_who_may_not_is_given_the_commands(host_to_change: str) -> None:
    before = state_of_host()

    done = run_setup(before=as_user(host_to_change))

    assert done.returncode == 1
    assert "as root" in done.stdout
    assert "useradd --system" in done.stdout
    assert f"{host_to_change} ALL=(qemu-vm) NOPASSWD: ALL" in done.stdout
    script = done.stdout[done.stdout.index("set -e") :]
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    assert state_of_host() == before


@pytest.mark.parametrize("user", ["no-such-user-here", "a b", "root,ALL", "-x"])
def test_a_user_that_is_none_is_refused(user: str) -> None:
    done = run_setup("--dry-run", f"--user={user}")

    assert done.returncode == 2
    assert repr(user) in done.stderr


def test_an_administrators_script_holds_the_record_before_each_step() -> None:
    record = SetupRecord(made_user=True)
    step = Step(sentence="make it", commands=(Command(argv=("true", "a b")),), record=record)

    script = setup.render_script([step], undo=False)

    assert script.index("# make it") < script.index("setup.json") < script.index("true 'a b'")
    assert json.loads(script[script.index("{") : script.rindex("}") + 1])["made_user"] is True
