"""Mode, owner, sudo, and the ways in which the programs behind them fail."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host import permissions
from pytest_vmsandbox.host.permissions import (
    can_access,
    chmod_async,
    chmod_executable,
    chown_async,
    chown_to_qemu_vm,
    ensure_traversable,
    get_acl,
    get_expected_socket_uid,
    get_mode,
    get_owner,
    get_qemu_vm_uid,
    grant_qemu_vm_access,
    grant_qemu_vm_file_access,
    probe_qemu_vm_user,
    probe_sudo_as_qemu_vm,
    remove_acl_user,
    set_acl_user,
    sudo_exec,
    sudo_rm,
    verify_user_access,
)
from pytest_vmsandbox.host.run_directory import mark_run_directory
from tests.children import no_child_is_left

if TYPE_CHECKING:
    from tests.host.conftest import Stubs

CACHED = ["qemu_vm_user", "sudo_as_qemu_vm", "setfacl_available", "getfacl_available"]

root_only = pytest.mark.skipif(os.getuid() != 0, reason="takes root: it gives files away")


@pytest.fixture(autouse=True)
def fresh_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that have answered nothing yet, and short deadlines for those that hang."""
    monkeypatch.setattr(permissions, "_probe_cache", type(permissions._probe_cache)())
    get_qemu_vm_uid.cache_clear()


@pytest.fixture
def existing_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a user that every host has for the VMMs' one."""
    monkeypatch.setattr(permissions, "QEMU_VM_USER", "daemon")


@pytest.fixture
def missing_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a user that no host has for the VMMs' one."""
    monkeypatch.setattr(permissions, "QEMU_VM_USER", "no-such-user")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of a fraction of a second, for programs that hang."""
    for name in ("_PROBE_DEADLINE_S", "_COMMAND_DEADLINE_S", "_REMOVAL_DEADLINE_S"):
        monkeypatch.setattr(permissions, name, 0.1)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that is not Linux."""
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.fixture
def run_directory(scratch: Path) -> Path:
    directory = scratch / "run"
    directory.mkdir()
    mark_run_directory(directory)
    return directory


def permission_bits(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The user that VMMs run as


def test_the_user_has_the_name_that_sudoers_lines_know() -> None:
    assert permissions.QEMU_VM_USER == "qemu-vm"


@pytest.mark.usefixtures("existing_user")
def test_the_uid_of_the_user_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_qemu_vm_uid()
    monkeypatch.setattr(permissions, "QEMU_VM_USER", "root")

    assert first == 1
    assert get_qemu_vm_uid() == 1
    assert get_qemu_vm_uid.cache_parameters()["maxsize"] == 1


@pytest.mark.usefixtures("missing_user")
def test_a_user_that_is_not_there_has_no_uid() -> None:
    assert get_qemu_vm_uid() is None


@pytest.mark.usefixtures("existing_user")
def test_the_uid_expected_of_a_socket_is_the_users_when_asked_for_and_else_ours() -> None:
    assert get_expected_socket_uid(use_qemu_vm_user=True) == 1
    assert get_expected_socket_uid(use_qemu_vm_user=False) == os.getuid()


@pytest.mark.usefixtures("missing_user")
def test_our_own_uid_is_no_substitute_for_a_user_that_is_not_there() -> None:
    with pytest.raises(HostUnfit) as caught:
        get_expected_socket_uid(use_qemu_vm_user=True)

    assert caught.value.code == "VMS-QEMU-VM-USER-MISSING"
    assert caught.value.need == "VMMs are to run as the user no-such-user"
    assert caught.value.evidence == "the user database has no such user"
    assert caught.value.remedy == "vmsandbox setup"
    assert get_expected_socket_uid(use_qemu_vm_user=False) == os.getuid()


@pytest.mark.usefixtures("existing_user")
async def test_the_probe_finds_a_user_that_is_there() -> None:
    assert await probe_qemu_vm_user() is True
    assert permissions._probe_cache.qemu_vm_user is True


@pytest.mark.usefixtures("missing_user")
async def test_the_probe_does_not_find_a_user_that_is_not_there() -> None:
    assert await probe_qemu_vm_user() is False
    assert permissions._probe_cache.qemu_vm_user is False


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: it replaces /usr/bin/id for a child")
@pytest.mark.parametrize(
    ("body", "mode"), [("exit 1", 0o755), ("exec sleep 1000", 0o755), ("exit 0", 0o644)]
)
def test_an_id_program_that_fails_hangs_or_cannot_run_finds_no_user(
    scratch: Path, body: str, mode: int
) -> None:
    stub = scratch / "id"
    stub.write_text(f"#!/bin/sh\n{body}\n")
    stub.chmod(mode)
    script = (
        "import asyncio, os\n"
        "from pytest_vmsandbox.host import permissions as p\n"
        "p.QEMU_VM_USER, p._PROBE_DEADLINE_S = 'root', 0.3\n"
        "print(asyncio.run(p.probe_qemu_vm_user()))\n"
        "try: os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError: print('no child')\n"
    )
    inside = 'mount --bind "$1" /usr/bin/id && exec "$2" -c "$3"'

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, "sh", stub, sys.executable, script],
        cwd=Path(permissions.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("False\nno child\n", "")


# Probes


def test_a_probe_has_five_seconds() -> None:
    assert permissions._PROBE_DEADLINE_S == 5


def test_commands_have_longer_and_removals_longer_still() -> None:
    assert 5 <= permissions._COMMAND_DEADLINE_S <= permissions._REMOVAL_DEADLINE_S <= 120


async def test_the_acl_programs_are_asked_for_their_version_once(stubs: Stubs) -> None:
    stubs.put("setfacl")
    stubs.put("getfacl")

    answers = [
        await probe()
        for probe in (permissions._probe_setfacl, permissions._probe_getfacl)
        for _ in range(2)
    ]

    assert answers == [True] * 4
    assert stubs.calls("setfacl") == stubs.calls("getfacl") == [["--version"]]


async def test_a_negative_answer_is_kept_too(only_stubs: Stubs) -> None:
    assert await permissions._probe_setfacl() is False
    assert await permissions._probe_getfacl() is False
    only_stubs.put("setfacl")
    only_stubs.put("getfacl")

    assert await permissions._probe_setfacl() is False
    assert await permissions._probe_getfacl() is False
    assert only_stubs.calls("setfacl") == only_stubs.calls("getfacl") == []


@pytest.mark.usefixtures("existing_user")
async def test_sudo_is_tried_as_the_user_without_a_prompt_once(stubs: Stubs) -> None:
    stubs.put("sudo")

    assert await probe_sudo_as_qemu_vm() is True
    assert await probe_sudo_as_qemu_vm() is True
    assert stubs.calls("sudo") == [["-n", "-u", "daemon", "/bin/true"]]


@pytest.mark.usefixtures("missing_user")
async def test_sudo_is_not_run_without_the_user(
    stubs: Stubs, caplog: pytest.LogCaptureFixture
) -> None:
    stubs.put("sudo")

    with caplog.at_level(logging.WARNING):
        assert await probe_sudo_as_qemu_vm() is False

    assert stubs.calls("sudo") == []
    assert caplog.messages == []


@pytest.mark.usefixtures("existing_user")
async def test_a_sudo_that_refuses_gives_a_warning_with_the_line_that_would_help(
    stubs: Stubs, caplog: pytest.LogCaptureFixture
) -> None:
    stubs.put("sudo", "echo 'sudo: a password is required' >&2; exit 1")
    owner = await get_owner(stubs.directory)
    assert owner is not None

    with caplog.at_level(logging.WARNING):
        assert await probe_sudo_as_qemu_vm() is False
        assert await probe_sudo_as_qemu_vm() is False

    assert len(stubs.calls("sudo")) == 1
    (message,) = caplog.messages
    assert message.endswith(f": {owner[0]} ALL=(daemon) NOPASSWD: ALL")


@pytest.mark.usefixtures("elsewhere", "existing_user")
@pytest.mark.parametrize("known", ["nothing", "yes", "no"])
async def test_on_another_platform_every_probe_is_false_without_running_anything(
    stubs: Stubs, known: str
) -> None:
    for name in CACHED:
        setattr(permissions._probe_cache, name, {"yes": True, "no": False}.get(known))
    for program in ("sudo", "setfacl", "getfacl"):
        stubs.put(program)
    probes = [
        probe_qemu_vm_user,
        probe_sudo_as_qemu_vm,
        permissions._probe_setfacl,
        permissions._probe_getfacl,
    ]

    first = [await probe() for probe in probes]
    again = [await probe() for probe in probes]

    assert first == again == [False] * 4
    assert [getattr(permissions._probe_cache, name) for name in CACHED] == [False] * 4
    for program in ("sudo", "setfacl", "getfacl"):
        assert stubs.calls(program) == []


# Programs that fail

ASKING: dict[str, Callable[[Path], Awaitable[object]]] = {
    "setfacl-probe": lambda _path: permissions._probe_setfacl(),
    "getfacl-probe": lambda _path: permissions._probe_getfacl(),
    "sudo-probe": lambda _path: probe_sudo_as_qemu_vm(),
    "set_acl_user": lambda path: set_acl_user(path, "daemon", "rw"),
    "remove_acl_user": lambda path: remove_acl_user(path, "daemon"),
    "get_acl": get_acl,
    "verify_user_access": lambda path: verify_user_access(path, "daemon", "r"),
    "probe_acl_support": lambda path: permissions.probe_acl_support(path.parent),
    "chmod_async": lambda path: chmod_async(path, "600"),
    "chown_async": lambda path: chown_async(path, "daemon", "daemon"),
    "chown_to_qemu_vm": chown_to_qemu_vm,
    "sudo_rm": sudo_rm,
    "ensure_traversable": lambda path: ensure_traversable([path.parent]),
    "grant_qemu_vm_access": grant_qemu_vm_access,
    "grant_qemu_vm_file_access": grant_qemu_vm_file_access,
}

FAILING = {
    "missing": None,
    "exits non-zero": "#!/bin/sh\nexit 1\n",
    "is killed": "#!/bin/sh\nkill -KILL $$\n",
    "hangs": "#!/bin/sh\nexec /bin/sleep 1000\n",
    "hangs with a child": "#!/bin/sh\n/bin/sleep 1000 &\nwait\n",
    "has no interpreter": "#!/no/such/interpreter\n",
    "is no program": "\0\0\0\0",
    "prints nonsense and fails": "#!/bin/sh\necho user:daemon:rwx\necho mask::rwx\nexit 2\n",
}


@pytest.mark.usefixtures("existing_user", "hurried")
@pytest.mark.parametrize("ask", ASKING)
@pytest.mark.parametrize("failing", FAILING)
async def test_a_program_that_fails_is_an_exact_no_and_leaves_no_child(
    only_stubs: Stubs, run_directory: Path, ask: str, failing: str
) -> None:
    file = run_directory / "folder" / "file"
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    text = FAILING[failing]
    for program in ("setfacl", "getfacl", "sudo", "chmod"):
        if text is not None:
            only_stubs.put_raw(program, text)
    began = time.monotonic()

    answer = await ASKING[ask](file)

    assert answer is (None if ask == "get_acl" else False)
    assert no_child_is_left()
    assert time.monotonic() - began < 10
    assert file.exists()


@pytest.mark.parametrize("nonsense", ["", "hello\n", "\0\xff\n" * 100, "::::\n", "user:daemon\n"])
async def test_nonsense_from_getfacl_grants_nothing(
    stubs: Stubs, tmp_path: Path, nonsense: str
) -> None:
    (stubs.directory / "nonsense").write_bytes(nonsense.encode("latin-1"))
    stubs.put("getfacl", f"cat {stubs.directory}/nonsense")

    assert await get_acl(tmp_path) == {}
    assert await verify_user_access(tmp_path, "daemon", "r") is False


async def test_failures_are_told_at_debug_level_only(
    only_stubs: Stubs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only_stubs.put("setfacl", "echo 'no such luck' >&2; exit 1")

    with caplog.at_level(logging.DEBUG):
        await set_acl_user(tmp_path, "daemon", "rw")

    ours = [record for record in caplog.records if record.name == permissions.__name__]
    assert [record.levelno for record in ours] == [logging.DEBUG]
    assert "no such luck" in ours[0].message


async def test_successes_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await chmod_async(tmp_path, "700")

    assert [record for record in caplog.records if record.name == permissions.__name__] == []


# Mode and owner


@pytest.mark.parametrize(
    ("mode", "becomes"),
    [("644", 0o644), ("0600", 0o600), ("a+r", 0o744), ("-x", 0o600), ("u=r,go=", 0o400)],
)
async def test_a_mode_is_octal_or_symbolic(tmp_path: Path, mode: str, becomes: int) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o700)

    assert await chmod_async(file, mode) is True
    assert permission_bits(file) == becomes


@pytest.mark.parametrize("mode", ["999", "nonsense", "", "--reference=/etc/passwd"])
async def test_a_mode_that_is_none_changes_nothing(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o700)

    assert await chmod_async(file, mode) is False
    assert permission_bits(file) == 0o700


@pytest.mark.parametrize("name", ["missing", "a\0b"])
async def test_a_path_that_is_not_there_gives_the_negative_answer_of_each(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name

    assert await chmod_async(path, "644") is False
    assert await get_mode(path) is None
    assert await get_owner(path) is None
    assert await can_access(path, os.F_OK) is False
    assert await ensure_traversable([path]) is False


@pytest.mark.parametrize("before", [0o000, 0o644, 0o4777])
async def test_an_executable_has_exactly_the_usual_mode(tmp_path: Path, before: int) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(before)

    await chmod_executable(file)

    assert permission_bits(file) == 0o755


async def test_making_something_executable_that_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await chmod_executable(tmp_path / "missing")


async def test_the_mode_is_the_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o4750)

    assert await get_mode(file) == stat.S_IFREG | 0o4750
    assert await get_mode(tmp_path) == tmp_path.stat().st_mode


@root_only
async def test_owners_have_names_or_numbers(tmp_path: Path) -> None:
    os.chown(tmp_path, 1, 54321)
    named_user = await get_owner(tmp_path)
    os.chown(tmp_path, 54321, 1)
    named_group = await get_owner(tmp_path)

    assert named_user == ("daemon", "54321")
    assert named_group == ("54321", "daemon")


async def test_access_is_that_of_access2(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(mode=0o600)

    assert await can_access(file) is True
    assert await can_access(file, os.R_OK) is True
    assert await can_access(file, os.X_OK) is False
    assert inspect.signature(can_access).parameters["mode"].default == os.R_OK | os.W_OK


async def test_chown_goes_through_sudo_that_cannot_prompt(stubs: Stubs, tmp_path: Path) -> None:
    stubs.put("sudo", f"cat > {tmp_path}/stdin; read -r s < /proc/$$/stat; echo $s > {tmp_path}/s")

    assert await chown_async(tmp_path, "daemon", "users") is True

    assert stubs.calls("sudo") == [["-n", "chown", "--", "daemon:users", str(tmp_path)]]
    pid, _, _, _, _, session, terminal = (tmp_path / "s").read_text().split()[:7]
    assert (pid, terminal) == (session, "0")
    assert (tmp_path / "stdin").read_text() == ""


async def test_chown_to_the_user_means_its_group_too(stubs: Stubs) -> None:
    stubs.put("sudo")

    assert await chown_to_qemu_vm("-x") is True
    assert stubs.calls("sudo") == [["-n", "chown", "--", "qemu-vm:qemu-vm", "-x"]]


@pytest.mark.parametrize(
    ("user", "group"),
    [("", "daemon"), ("daemon", ""), ("a:b", "daemon"), ("daemon", "a:b"), ("--from=root", "x")],
)
async def test_what_is_no_owner_is_refused_before_sudo_runs(
    stubs: Stubs, tmp_path: Path, user: str, group: str
) -> None:
    stubs.put("sudo")

    assert await chown_async(tmp_path, user, group) is False
    assert stubs.calls("sudo") == []


# Letting the VMM's user in


async def test_no_acl_is_set_without_the_user(stubs: Stubs, tmp_path: Path) -> None:
    permissions._probe_cache.qemu_vm_user = False
    stubs.put("setfacl")

    assert await grant_qemu_vm_access(tmp_path) is False
    assert stubs.calls("setfacl") == []


@pytest.mark.usefixtures("existing_user")
async def test_the_user_gets_an_entry_to_read_and_write(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(mode=0o600)

    assert await grant_qemu_vm_access(file) is True
    assert await verify_user_access(file, "daemon", "rw")
    assert not await verify_user_access(file, "daemon", "x")


@pytest.mark.usefixtures("existing_user")
async def test_nothing_is_granted_through_a_symbolic_link(stubs: Stubs, tmp_path: Path) -> None:
    stubs.put("setfacl")
    (tmp_path / "link").symlink_to("/etc/hostname")

    assert await grant_qemu_vm_access(tmp_path / "link") is False
    assert stubs.calls("setfacl") == []


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: it looks with another user's eyes")
@pytest.mark.usefixtures("existing_user")
async def test_a_file_deep_in_private_folders_becomes_readable(scratch: Path) -> None:
    file = scratch / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.write_text("seen")
    for private in (file, file.parent, file.parent.parent, scratch):
        private.chmod(0o600 if private == file else 0o700)

    assert await grant_qemu_vm_file_access(file) is True

    modes = [permission_bits(path) for path in (scratch, scratch / "a", scratch / "a/b", file)]
    assert modes == [0o711, 0o711, 0o711, 0o644]
    seen = subprocess.run(
        ["setpriv", "--reuid=daemon", "--regid=daemon", "--init-groups", "cat", file],
        capture_output=True,
        check=False,
    )
    assert (seen.stdout, seen.stderr) == (b"seen", b"")


async def test_the_way_is_opened_from_the_inside_out(stubs: Stubs, scratch: Path) -> None:
    stubs.put("chmod", 'PATH=/usr/bin:/bin; exec chmod "$@"')
    (scratch / "a" / "b").mkdir(parents=True)
    for folder in (scratch / "a" / "b", scratch / "a", scratch):
        folder.chmod(0o700)
    (scratch / "a" / "b" / "file").touch(mode=0o600)

    assert await grant_qemu_vm_file_access(scratch / "a" / "b" / "file") is True

    assert stubs.calls("chmod") == [
        ["--", "a+x", str(scratch / "a" / "b")],
        ["--", "a+x", str(scratch / "a")],
        ["--", "a+x", str(scratch)],
        ["--", "a+r", str(scratch / "a" / "b" / "file")],
    ]


async def test_the_root_folder_is_never_on_the_way(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.put("chmod")
    asked: list[object] = []

    async def listening(directory: object) -> bool:
        asked.append(directory)
        return True

    monkeypatch.setattr(permissions, "_make_traversable", listening)
    monkeypatch.chdir("/usr")

    assert await grant_qemu_vm_file_access("lib/x") is True
    assert asked[:2] == [Path("/usr/lib"), Path("/usr")]
    assert Path("/") not in asked


async def test_the_folders_behind_a_link_are_opened_too(scratch: Path) -> None:
    hidden = scratch / "hidden" / "images"
    hidden.mkdir(parents=True)
    (scratch / "shown").mkdir(mode=0o700)
    (hidden / "file").touch(mode=0o600)
    (scratch / "hidden").chmod(0o700)
    (scratch / "shown" / "link").symlink_to(hidden)

    assert await grant_qemu_vm_file_access(scratch / "shown" / "link" / "file") is True
    assert permission_bits(scratch / "hidden") == 0o711
    assert permission_bits(scratch / "shown") == 0o711


async def test_a_file_is_not_touched_when_the_way_to_it_stays_closed(
    stubs: Stubs, scratch: Path
) -> None:
    stubs.put("chmod", "exit 1")
    stubs.put("sudo")
    file = scratch / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.touch(mode=0o600)
    for folder in (file.parent, file.parent.parent):
        folder.chmod(0o700)

    assert await grant_qemu_vm_file_access(file) is False
    assert await grant_qemu_vm_file_access(file, writable=True) is False

    both = [["--", "a+x", str(file.parent)], ["--", "a+x", str(file.parent.parent)]]
    assert stubs.calls("chmod") == both * 2  # each was tried, and the file was not
    assert stubs.calls("sudo") == []


async def test_a_file_to_be_written_is_given_away_and_its_mode_left_alone(
    stubs: Stubs, scratch: Path
) -> None:
    stubs.put("sudo")
    stubs.put("chmod")
    file = scratch / "file"
    file.touch(mode=0o600)

    assert await grant_qemu_vm_file_access(file, writable=True) is True
    assert stubs.calls("sudo") == [["-n", "chown", "--", "qemu-vm:qemu-vm", str(file)]]
    assert stubs.calls("chmod") == []
    assert inspect.signature(grant_qemu_vm_file_access).parameters["writable"].default is False


async def test_no_folder_at_all_is_traversable() -> None:
    assert await ensure_traversable([]) is True


@pytest.mark.parametrize("mode", [0o711, 0o755, 0o1777])
async def test_a_folder_that_all_may_pass_is_not_touched(
    stubs: Stubs, tmp_path: Path, mode: int
) -> None:
    stubs.put("chmod", "exit 1")
    tmp_path.chmod(mode)

    assert await ensure_traversable([tmp_path, "/tmp", "/"]) is True
    assert stubs.calls("chmod") == []


@pytest.mark.parametrize("mode", [0o700, 0o710, 0o701, 0o744])
async def test_a_folder_that_somebody_may_not_pass_is_opened(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)

    assert await ensure_traversable([tmp_path]) is True
    assert permission_bits(tmp_path) == mode | 0o111


async def test_one_folder_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)

    assert await ensure_traversable([tmp_path / "missing", closed]) is False
    assert permission_bits(closed) == 0o711


async def test_a_file_among_the_folders_is_not_made_executable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(mode=0o600)

    assert await ensure_traversable([file]) is False
    assert permission_bits(file) == 0o600


# Through sudo


@pytest.fixture
def some_stdin(tmp_path: Path) -> Iterator[Path]:
    """Something to read on our own stdin, where pytest has nothing."""
    path = tmp_path / "our-stdin"
    path.write_text("ours")
    saved = os.dup(0)
    with path.open() as file:
        os.dup2(file.fileno(), 0)
    yield path
    os.dup2(saved, 0)
    os.close(saved)


@pytest.mark.usefixtures("some_stdin")
async def test_sudo_has_a_session_of_its_own_and_nobody_to_ask(
    stubs: Stubs, tmp_path: Path
) -> None:
    stubs.put(
        "sudo",
        f"cat > {tmp_path}/stdin; read -r s < /proc/$$/stat; echo $s\n"
        "echo $SUDO_ASKPASS >&2; exit 7",
    )

    process = await sudo_exec(["-x", "a b", ""])
    out, err = await process.communicate()

    assert process.returncode == 7
    assert stubs.calls("sudo") == [["-x", "a b", ""]]
    pid, _, _, _, _, session, terminal = out.decode().split()[:7]
    assert (int(pid), int(session), terminal) == (process.pid, process.pid, "0")
    assert err == b"/bin/false\n"
    assert (tmp_path / "stdin").read_text() == ""


async def test_sudo_shares_our_session_when_asked_to(
    stubs: Stubs, some_stdin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_ASKPASS", "/ours")
    stubs.put("sudo", "read -r s < /proc/$$/stat; echo $s $SUDO_ASKPASS; readlink /proc/$$/fd/0")

    process = await sudo_exec(["true"], start_new_session=False)
    out, _ = await process.communicate()

    stat_line, stdin = out.decode().splitlines()
    assert int(stat_line.split()[5]) == os.getsid(0)
    assert stat_line.endswith(" /ours")
    assert stdin == str(some_stdin)


async def test_the_streams_of_sudo_are_the_callers_to_choose(stubs: Stubs, tmp_path: Path) -> None:
    stubs.put("sudo", "echo out; echo err >&2")
    with (tmp_path / "log").open("wb") as log:
        process = await sudo_exec([], stdout=log.fileno(), stderr=asyncio.subprocess.STDOUT)
        await process.wait()

    assert (process.stdout, process.stderr) == (None, None)
    assert (tmp_path / "log").read_text() == "out\nerr\n"


async def test_sudo_that_is_not_there_raises(only_stubs: Stubs) -> None:
    with pytest.raises(FileNotFoundError):
        await sudo_exec(["true"])


async def test_sudo_removes_a_tree_below_a_run_directory(stubs: Stubs, run_directory: Path) -> None:
    stubs.put("sudo", 'exec "$@"')
    tree = run_directory / "-machine x"
    (tree / "deep").mkdir(parents=True)

    assert await sudo_rm(tree) is True
    assert not tree.exists()
    assert stubs.calls("sudo") == [["rm", "-rf", "--", str(tree)]]


async def test_a_trailing_slash_does_not_lead_through_a_link(
    stubs: Stubs, run_directory: Path, tmp_path: Path
) -> None:
    stubs.put("sudo", 'exec "$@"')
    (tmp_path / "precious").touch()
    link = run_directory / "link"
    link.symlink_to(tmp_path)

    assert await sudo_rm(f"{link}/") is True
    assert not link.is_symlink()
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("path", ["/", ".", "..", "", "//", "/tmp", "/nowhere", "/etc/..", "a\0b"])
async def test_what_is_not_below_a_run_directory_is_never_removed(
    stubs: Stubs, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    stubs.put("sudo")

    assert await sudo_rm(path) is False
    assert stubs.calls("sudo") == []
    assert len(caplog.messages) == 1
    assert "not removed" in caplog.messages[0]


async def test_a_cancelled_removal_leaves_no_child(stubs: Stubs, run_directory: Path) -> None:
    stubs.put("sudo", "exec sleep 1000")
    task = asyncio.create_task(sudo_rm(run_directory / "x"))
    for _ in range(1000):
        if stubs.calls("sudo"):
            break
        await asyncio.sleep(0.01)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert no_child_is_left()
