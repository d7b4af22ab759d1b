"""`vmsandbox setup`, for real, on a copy of this host: its own apt, users, sudo and /dev/kvm."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import pytest_vmsandbox
from pytest_vmsandbox.cli import setup
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.host.setup_plan import PACKAGES, SUDOERS_FILE, UDEV_FILE, Command, Step
from pytest_vmsandbox.host.setup_record import RECORD, SetupRecord

ALL_PACKAGES = (*current_platform().qemu_packages[-1:], *PACKAGES)
CHECKOUT = Path(pytest_vmsandbox.__file__).parents[1]
SCRIPT = (
    "import argparse, sys; from pytest_vmsandbox.cli import setup; p = argparse.ArgumentParser(); "
    "setup.add_arguments(p); sys.exit(setup.run(p.parse_args()))"
)

takes_root = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, ("apt-get", "visudo", "nsenter", "setpriv"))),
    reason="takes root, apt, sudo, nsenter and setpriv",
)

# In a mount namespace of its own whatever is written to these folders lands in a tmpfs, and is
# gone with it; of the host nothing is changed.
COPY_OF_THIS_HOST = """
set -e
mount -t tmpfs none /mnt
flock /etc/sudoers.d cp -a /etc /mnt/etc  # the lock of the tests that make users
mount --bind /mnt/etc /etc
for folder in var usr; do
  mkdir -p /mnt/$folder/upper /mnt/$folder/work
  mount -t overlay overlay /$folder \\
    -o lowerdir=/$folder,upperdir=/mnt/$folder/upper,workdir=/mnt/$folder/work
done
for package in $PACKAGES_THERE; do
  printf 'Package: %s\\nStatus: install ok installed\\nVersion: 1\\nArchitecture: all\\n' $package
  printf 'Maintainer: nobody\\nDescription: as if it were\\n\\n'
done >>/var/lib/dpkg/status
mknod -m 0600 /mnt/kvm c 10 232
[ ! -e /dev/kvm ] || mount --bind /mnt/kvm /dev/kvm
rm -rf /var/lib/vmsandbox /etc/sudoers.d/vmsandbox /etc/udev/rules.d/65-vmsandbox-kvm.rules
! id qemu-vm >/dev/null 2>&1 || userdel qemu-vm
useradd --user-group --no-create-home --shell /bin/sh vmst-alice
echo ready
exec sleep 280
"""
USER = "vmst-alice"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--")

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy of this host, which a process holds."""

    holder: int

    def path(self, path: str | Path) -> Path:
        """The copy's file of that name."""
        return Path(f"/proc/{self.holder}/root{path}")

    def run(self, *argv: str) -> Done:
        return subprocess.run(
            ["nsenter", f"--mount=/proc/{self.holder}/ns/mnt", "--", *argv],
            env={
                **{name: text for name, text in os.environ.items() if name != "SUDO_USER"},
                "PYTHONPATH": str(CHECKOUT),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    def setup(self, *words: str) -> Done:
        return self.run(sys.executable, "-c", SCRIPT, *words)

    def record(self) -> dict[str, object]:
        form: dict[str, object] = json.loads(self.path(RECORD).read_bytes())
        return form

    def has_user(self, name: str) -> bool:
        return self.run("getent", "passwd", name).returncode == 0

    def state(self) -> dict[str, object]:
        """All that a setup may change."""
        sudoers, rules = self.path("/etc/sudoers.d"), self.path("/etc/udev/rules.d")
        return {
            "packages": self.run("dpkg-query", "-W").stdout,
            "users": self.run("getent", "passwd").stdout,
            "groups": self.run("getent", "group").stdout,
            "sudoers": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sudoers.iterdir()
            },
            "rules": sorted(path.name for path in rules.iterdir()) if rules.exists() else [],
            "kvm": self.run("getfacl", "-cp", "/dev/kvm").stdout,
            "record": self.path(RECORD).exists(),
        }


@pytest.fixture
def raw_copy() -> Iterator[Copy]:
    """A copy of this host that nobody has set up, with an ordinary user."""
    with held_copy(packages_there=()) as copy:
        yield copy


@pytest.fixture
def copy() -> Iterator[Copy]:
    """The same where dpkg believes that all packages are there, which saves their installing."""
    missing = [name for name in ALL_PACKAGES if not setup._has_package(name)]
    with held_copy(packages_there=missing) as copy:
        yield copy


@contextmanager
def held_copy(*, packages_there: Sequence[str]) -> Iterator[Copy]:
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", COPY_OF_THIS_HOST],
        env={**os.environ, "PACKAGES_THERE": " ".join(packages_there)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline() != "ready\n":
                pytest.skip(f"takes overlayfs and useradd: {holder.stderr.read()[-300:]}")
            yield Copy(holder=holder.pid)
        finally:
            holder.send_signal(signal.SIGKILL)


@takes_root
def test_a_setup_is_said_done_repeated_and_taken_back_without_a_trace(raw_copy: Copy) -> None:
    before = raw_copy.state()

    dry = raw_copy.setup("--dry-run", "--user", USER)
    untouched = raw_copy.state()
    done = raw_copy.setup("--user", USER)
    if "failed: install the packages" in done.stderr:
        pytest.skip(f"takes a reachable apt source: {done.stderr[-300:]}")
    changed = raw_copy.state()
    repeated = raw_copy.setup("--user", USER)
    after_repeat = raw_copy.state()
    as_qemu_vm = raw_copy.run(*AS_USER, "sudo", "-n", "-u", "qemu-vm", "--", "id", "-un")
    as_root = raw_copy.run(*AS_USER, "sudo", "-n", "true")
    made = raw_copy.run("getent", "passwd", "qemu-vm").stdout.strip().split(":")
    mode = raw_copy.path(SUDOERS_FILE).stat().st_mode & 0o777
    installed = raw_copy.run(
        "dpkg-query", "-W", "-f", "${Status}\n", *ALL_PACKAGES
    ).stdout.splitlines()
    undone = raw_copy.setup("--undo")
    undone_again = raw_copy.setup("--undo")

    assert dry.returncode == 0
    assert "would make the system user qemu-vm" in dry.stdout
    assert untouched == before
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.removesuffix(" ...") for line in done.stdout.splitlines()]
    assert steps == [line.removeprefix("would ") for line in dry.stdout.splitlines()]
    assert changed != before
    assert installed == ["install ok installed"] * len(ALL_PACKAGES)
    assert made[5:] == ["/nonexistent", "/usr/sbin/nologin"]
    assert mode == 0o440
    assert as_qemu_vm.stdout == "qemu-vm\n"
    assert as_root.returncode != 0
    assert repeated.stdout == "nothing to do: every step is done\n"
    assert after_repeat == changed
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert raw_copy.state() == before
    assert undone_again.stdout == "nothing to undo\n"


@takes_root
def test_what_was_there_before_stays_after_an_undo(copy: Copy) -> None:
    copy.run("useradd", "--system", "--shell", "/usr/sbin/nologin", "qemu-vm")
    before = copy.state()

    done = copy.setup("--user", USER)
    undone = copy.setup("--undo")

    assert done.returncode == 0, done.stderr
    assert "make the system user" not in done.stdout
    assert undone.returncode == 0, undone.stderr
    assert copy.state() == before


@takes_root
def test_a_sudoers_file_of_somebody_elses_is_left_alone(copy: Copy) -> None:
    copy.path(SUDOERS_FILE).write_text("# theirs\n")
    before = copy.state()

    done = copy.setup("--user", USER)
    recorded = copy.path(RECORD).read_text()
    undone = copy.setup("--undo")

    assert done.returncode == 1
    assert "left as it is" in done.stderr
    assert SUDOERS_FILE not in recorded
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert copy.state() == before


@takes_root
def test_a_file_that_was_changed_since_stays_and_the_rest_is_undone(copy: Copy) -> None:
    done = copy.setup("--user", USER)
    with copy.path(SUDOERS_FILE).open("a") as file:
        file.write("# and a line of theirs\n")

    dry = copy.setup("--undo", "--dry-run")
    undone = copy.setup("--undo")

    assert done.returncode == 0
    assert dry.returncode == 1
    assert f"would fail: {SUDOERS_FILE} is not what" in dry.stderr
    assert undone.returncode == 1
    assert "left as it is" in undone.stderr
    assert "theirs" in copy.path(SUDOERS_FILE).read_text()
    assert not copy.has_user("qemu-vm")
    assert not copy.path(UDEV_FILE).exists()
    kept = copy.record()
    assert isinstance(kept["files"], dict)
    assert list(kept["files"]) == [SUDOERS_FILE]
    assert kept["sudo_users"] == [USER]
    assert kept["made_user"] is False
    assert copy.setup("--undo").returncode == 1

    copy.path(SUDOERS_FILE).unlink()

    assert copy.setup("--undo").returncode == 0
    assert not copy.path(RECORD).exists()


@takes_root
def test_a_user_that_was_made_anew_since_stays_and_stays_on_record(copy: Copy) -> None:
    copy.setup("--user", USER)
    copy.run("usermod", "--comment", "made by somebody else", "qemu-vm")

    dry = copy.setup("--undo", "--dry-run")
    undone = copy.setup("--undo")

    assert (dry.returncode, undone.returncode) == (1, 1)
    assert "user qemu-vm was not made by vmsandbox setup" in dry.stderr
    assert copy.has_user("qemu-vm")
    assert copy.record() == json.loads(SetupRecord(made_user=True).to_json())


# A dpkg that misses one package, and an apt that installs what that takes and then fails.
STUBS = {
    "dpkg-query": """
for name; do :; done
case $name in
  uidmap|libsubid4) [ ! -e "${0%/*}/$name" ] || printf installed ;;
  *) printf installed ;;
esac
""",
    "apt-get": """
case "$*" in
  *--simulate*) printf 'Inst libsubid4 (1)\\nInst uidmap (1)\\nInst sudo [1] (2)\\n' ;;
  *) touch "${0%/*}/libsubid4"; echo "E: half-way" >&2; exit 100 ;;
esac
""",
}


def with_stubs(copy: Copy, stubs: dict[str, str], *words: str, path: str | None = None) -> Done:
    """A setup that finds these programs first, or with `path` these and what is there."""
    folder = copy.path("/var/stubs")
    folder.mkdir(exist_ok=True)
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/sh{text}")
        (folder / name).chmod(0o755)
    places = f"/var/stubs:{os.environ['PATH'] if path is None else path}"
    return copy.run("env", f"PATH={places}", sys.executable, "-c", SCRIPT, *words)


@takes_root
def test_of_an_install_that_failed_only_what_it_installed_is_on_record(copy: Copy) -> None:
    done = with_stubs(copy, STUBS, "--user", USER)

    assert done.returncode == 1
    assert "E: half-way" in done.stderr
    assert "failed: install the packages uidmap" in done.stderr
    assert copy.record()["packages"] == ["libsubid4"]
    assert not copy.has_user("qemu-vm")


@takes_root
def test_an_install_that_failed_at_once_leaves_no_record(copy: Copy) -> None:
    at_once = STUBS["apt-get"].replace('touch "${0%/*}/libsubid4"; ', "")

    done = with_stubs(copy, {**STUBS, "apt-get": at_once}, "--user", USER)

    assert done.returncode == 1
    assert not copy.path(RECORD).exists()


@takes_root
@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_packages_that_apt_does_not_know_are_told_in_its_words(
    copy: Copy, words: tuple[str, ...]
) -> None:
    unknowing = {**STUBS, "apt-get": "\necho 'E: Unable to locate package uidmap' >&2; exit 100\n"}

    done = with_stubs(copy, unknowing, "--user", USER, *words)

    assert done.returncode == 1
    assert "apt-get can't install uidmap: E: Unable to locate package uidmap" in done.stderr
    assert "Traceback" not in done.stderr
    assert not copy.path(RECORD).exists()


@takes_root
@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_a_host_without_a_program_that_a_step_takes_is_told(
    copy: Copy, words: tuple[str, ...]
) -> None:
    # useradd lies in /usr/sbin, where it is taken from this copy.
    copy.run("sh", "-c", 'rm "$(command -v useradd)"')

    done = copy.setup("--user", USER, *words)

    assert done.returncode == 1
    assert "useradd" in done.stderr
    assert "Traceback" not in done.stderr


@takes_root
@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_a_host_without_dpkg_that_lacks_packages_is_told_which(
    copy: Copy, words: tuple[str, ...]
) -> None:
    copy.run(
        "sh",
        "-c",
        'rm "$(command -v dpkg-query)" "$(command -v apt-get)" "$(command -v newuidmap)"',
    )

    done = copy.setup("--user", USER, *words)

    assert done.returncode == 1
    assert "install these yourself:" in done.stdout
    assert "uidmap" in done.stdout
    assert "Traceback" not in done.stderr


@takes_root
@pytest.mark.parametrize("words", [("--dry-run",), ("--undo", "--dry-run"), ("--undo",), ()])
@pytest.mark.parametrize("content", [None, "", "[" * 100_000, "1"])
def test_a_record_that_cannot_be_read_stops_a_setup_with_its_path(
    copy: Copy, words: tuple[str, ...], content: str | None
) -> None:
    record = copy.path(RECORD)
    if content is None:
        record.mkdir(parents=True)
    else:
        record.parent.mkdir(parents=True)
        record.write_text(content)

    done = copy.setup(*words)

    assert done.returncode == 1
    assert str(RECORD) in done.stderr
    assert "Traceback" not in done.stderr
    assert not copy.has_user("qemu-vm")


@takes_root
def test_a_dry_run_ends_as_the_real_one_would(copy: Copy) -> None:
    copy.path(SUDOERS_FILE).write_text("# theirs\n")

    dry = copy.setup("--dry-run", "--user", USER)
    as_user = copy.run(*AS_USER, sys.executable, "-c", SCRIPT, "--dry-run")

    assert dry.returncode == 1
    assert f"would fail: {SUDOERS_FILE} is not what vmsandbox setup wrote" in dry.stderr
    if "ModuleNotFoundError" in as_user.stderr or "Permission denied" in as_user.stderr:
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")
    assert as_user.returncode == 1
    assert "would fail: this takes root" in as_user.stderr


@takes_root
def test_a_uid_without_a_name_is_told_to_give_one(copy: Copy) -> None:
    done = copy.run("setpriv", "--reuid=54321", "--", sys.executable, "-c", SCRIPT, "--dry-run")

    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")
    assert done.returncode == 2
    assert "uid 54321 has no name on this host" in done.stderr


@takes_root
def test_who_may_not_is_given_the_commands(copy: Copy) -> None:
    before = copy.state()

    done = copy.run(*AS_USER, sys.executable, "-c", SCRIPT)

    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")
    assert done.returncode == 1
    assert "as root" in done.stdout
    assert "useradd --system" in done.stdout
    assert f"{USER} ALL=(qemu-vm) NOPASSWD: ALL" in done.stdout
    assert copy.state() == before


@takes_root
def test_the_administrators_commands_do_what_setup_does(copy: Copy) -> None:
    told = copy.run(*AS_USER, sys.executable, "-c", SCRIPT).stdout
    if "set -e" not in told:
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")
    script = copy.path("/var/script")
    script.write_text(told[told.index("set -e") :])

    done = copy.run("sh", "/var/script")

    assert done.returncode == 0, done.stderr
    assert copy.setup("--user", USER).stdout == "nothing to do: every step is done\n"


@pytest.mark.parametrize("user", ["no-such-user-here", "a b", "root,ALL", "-x"])
def test_a_user_that_is_none_is_refused(user: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    setup.add_arguments(parser)

    status = setup.run(parser.parse_args(["--dry-run", f"--user={user}"]))

    assert status == 2
    assert repr(user) in capsys.readouterr().err


def test_an_administrators_script_holds_the_record_before_each_step() -> None:
    record = SetupRecord(made_user=True)
    step = Step(sentence="make it", commands=(Command(argv=("true", "a b")),), record=record)

    script = setup.render_script([step], undo=False)

    assert script.index("# make it") < script.index("setup.json") < script.index("true 'a b'")
    assert json.loads(script[script.index("{") : script.rindex("}") + 1])["made_user"] is True
