"""The validators: what is accepted, what is refused, and that asking changes nothing."""

from __future__ import annotations

import os
import signal
import stat
import string
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.linux import OwnedFd, pidfd_open
from pytest_vmsandbox.machine import spec
from pytest_vmsandbox.warden import validation
from pytest_vmsandbox.warden.validation import (
    argument_list,
    device_path,
    interface_name,
    ipv4_address,
    machine_name,
    path_below,
    plain_text,
    request_peer,
    resolver_address,
    signal_target,
    trusted_program,
    whole_number,
)

NO_TEXTS: list[object] = [None, 0, 1.5, True, b"br0", ["br0"], {"br0": 1}]
ARABIC_THREE = "\N{ARABIC-INDIC DIGIT THREE}"
E_ACUTE = "\N{LATIN SMALL LETTER E WITH ACUTE}"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
# Texts that are almost right, which texts at random never are.
nearly = st.text("br0.:/-_ \n\t\0%1234569eth" + E_ACUTE + ARABIC_THREE, max_size=20)


def refuse(validator: Callable[[object], object], value: object) -> str:
    """What the validator says to a value that it must refuse."""
    with pytest.raises(RequestInvalid) as caught:
        validator(value)
    return str(caught.value)


# Interfaces, addresses, devices, names


@pytest.mark.parametrize("name", ["br0", "e", "eth0.10", "veth_a-b", "a" * 15, "...", "0"])
def test_an_interface_name_is_accepted(name: str) -> None:
    assert interface_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "a" * 16, "a b", "a\tb", "br0\n", "\nbr0", " br0", "br0 ", E_ACUTE * 8, E_ACUTE),
        *(".", "..", "a/b", "/", "a:b", "br0:1", "-br0", "-", "br%d", 'a"b', "a\0", "a\x7f"),
        *("a\N{NO-BREAK SPACE}b", f"br{ARABIC_THREE}", "a\udce9", "a\ud800"),
        *NO_TEXTS,
    ],
)
def test_what_is_no_interface_name_is_refused_by_name(name: object) -> None:
    assert f"interface={name!r}" in refuse(interface_name, name)


def test_a_prefix_must_be_there_and_be_followed_by_something() -> None:
    assert interface_name("vms-br0", prefix="vms-") == "vms-br0"
    for name in ("br0", "vms-", "vms", "VMS-br0", "xvms-br0", "vms-" + "a" * 12):
        said = refuse(lambda value: interface_name(value, prefix="vms-"), name)
        assert name in said


@given(nearly | anything)
def test_an_interface_name_fits_the_kernel_or_is_refused(name: object) -> None:
    with suppress(RequestInvalid):
        accepted = interface_name(name)
        assert accepted == name
        assert 1 <= len(accepted.encode()) <= 15
        assert set(accepted) <= set(string.ascii_letters + string.digits + "._-")
        assert accepted not in (".", "..")
        assert not accepted.startswith("-")


@pytest.mark.parametrize("address", ["172.16.0.2", "0.0.0.0", "255.255.255.255", "1.2.3.4"])
def test_an_ipv4_address_is_accepted(address: str) -> None:
    assert ipv4_address(address) == address
    assert resolver_address(address) == address


NO_IPV4 = [
    *("", "1.2.3", "1.2.3.4/24", "01.2.3.4", "1.2.3.04", "256.1.1.1", "1.2.3.4 ", " 1.2.3.4"),
    *("1.2.3.4\n", "1.2.3.4\0", "1.2.3.4.5", "1..2.3", ".1.2.3.4", "0x1.2.3.4", "1.2.3.-4"),
    *(f"1.2.{ARABIC_THREE}.4", "1.2.3.4:53", "localhost", "16909060", "+1.2.3.4"),
    *NO_TEXTS,
]


@pytest.mark.parametrize("address", [*NO_IPV4, "::1", "::ffff:1.2.3.4", IPv4Address("1.2.3.4")])
def test_what_is_no_ipv4_address_is_refused_by_name(address: object) -> None:
    assert f"address={address!r}" in refuse(ipv4_address, address)


@given(st.ip_addresses(v=4) | anything | st.text("0123456789.", max_size=16))
def test_an_ipv4_address_is_the_one_that_others_read(address: object) -> None:
    text = str(address) if isinstance(address, IPv4Address) else address
    try:
        expected = str(IPv4Address(text)) if isinstance(text, str) else None
    except ValueError:
        expected = None
    if expected is None:
        refuse(ipv4_address, text)
    else:
        assert ipv4_address(text) == expected


@pytest.mark.parametrize(
    ("address", "usual"),
    [("::1", "::1"), ("2001:DB8:0:0::35", "2001:db8::35"), ("fe80::1", "fe80::1"), ("::", "::")],
)
def test_a_resolver_may_be_had_over_ipv6(address: str, usual: str) -> None:
    assert resolver_address(address) == usual


@pytest.mark.parametrize(
    "address",
    [
        *NO_IPV4,
        *("[::1]", "[::1]:53", "::1%lo", "::ffff:1.2.3.4", "::ffff:102:304", "::1 ", "::1\n"),
        *("::1\0", ":::", "1::2::3", "12345::", f"::{ARABIC_THREE}", "::\ud800"),
    ],
)
def test_what_is_no_resolver_is_refused_by_name(address: object) -> None:
    assert f"resolver={address!r}" in refuse(resolver_address, address)


@given(st.ip_addresses(v=6) | anything | st.text("0123456789abcdef:.%", max_size=40))
def test_a_resolvers_address_is_the_one_that_others_read(address: object) -> None:
    text = str(address) if isinstance(address, IPv6Address) else address
    with suppress(RequestInvalid):
        accepted = resolver_address(text)
        assert isinstance(text, str)
        if ":" in text:
            assert IPv6Address(accepted) == IPv6Address(text)
            assert IPv6Address(text).ipv4_mapped is None
        else:
            assert accepted == str(IPv4Address(text))


@pytest.mark.parametrize(
    "path",
    [
        *("/dev/loop0", "/dev/loop7", "/dev/loop1048575"),
        *("/dev/mapper/vmsandbox-a", "/dev/mapper/vmsandbox-r0123abcd-gw0-m1"),
        f"/dev/mapper/vmsandbox-{'a' * 116}",
    ],
)
def test_a_device_that_may_be_ours_is_accepted(path: str) -> None:
    assert device_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("/dev/loop", "/dev/loop0p1", "/dev/loop0/../sda", f"/dev/loop{ARABIC_THREE}", "/dev/sda"),
        *("/dev/loop00", "/dev/loop01", "/dev/loop-1", "/dev/loop0\n", "/dev/loop0\0", "dev/loop0"),
        *("/dev//loop0", "//dev/loop0", "/dev/./loop0", "/dev/loop0/", "/dev/loop0 ", "/dev/LOOP0"),
        *("/dev/loop12345678", "/dev/loop-control", "/dev/loops0", "/dev/zloop0", "", "/", "/dev"),
        *("/dev/mapper/vmsandbox", "/dev/mapper/vmsandbox-", "/dev/mapper/vmsandboxes-a"),
        *("/dev/mapper/root", "/dev/mapper//vmsandbox-a", "/dev/mapper/vmsandbox-a/../control"),
        *("/dev/mapper/control", "/dev/mapper/vmsandbox-A", "/dev/mapper/vmsandbox--a"),
        *("/dev/mapper/vmsandbox-a\n", "/dev/mapper/vmsandbox-a-", "/dev/dm-0"),
        f"/dev/mapper/vmsandbox-{'a' * 117}",
        *NO_TEXTS,
    ],
)
def test_any_other_device_is_refused_by_name(path: object) -> None:
    assert f"device={path!r}" in refuse(device_path, path)


@given(st.text("/devlop0123apmsnbx-.\n" + ARABIC_THREE, max_size=30) | anything)
def test_an_accepted_device_names_itself_and_nothing_else(path: object) -> None:
    with suppress(RequestInvalid):
        accepted = device_path(path)
        assert os.path.normpath(accepted) == accepted
        assert accepted.startswith(("/dev/loop", "/dev/mapper/vmsandbox-"))
        assert accepted.isascii()


def test_a_machines_name_is_what_a_machines_spec_says() -> None:
    assert validation._MACHINE_NAME.pattern == spec._NAME.pattern


@pytest.mark.parametrize("name", ["m0", "a", "9", "a-b", "a--b", "a" * 32])
def test_a_machines_name_is_accepted(name: str) -> None:
    assert machine_name("name", name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "a" * 33, "-a", "a-", "A", "a_b", "a.b", "a/b", "..", "a\n", "a\0", "a b", E_ACUTE),
        f"m{ARABIC_THREE}",
        *NO_TEXTS,
    ],
)
def test_what_is_no_machines_name_is_refused_by_name(name: object) -> None:
    assert f"name={name!r}" in refuse(lambda value: machine_name("name", value), name)


# Texts, lists, numbers


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_a_text_without_nul_is_accepted(text: str) -> None:
    assert plain_text("cwd", text) == text


@pytest.mark.parametrize(
    "text", ["\0", "a\0", "\0a", "a\ud800", "\udfff", None, 1, True, b"a", ["a"], {}]
)
def test_a_text_that_the_kernel_could_not_be_handed_is_refused(text: object) -> None:
    assert f"cwd={text!r}" in refuse(lambda value: plain_text("cwd", value), text)


def test_a_file_name_that_is_no_text_survives_as_python_spells_it() -> None:
    name = os.fsdecode(b"a\xff")

    assert os.fsencode(plain_text("path", name)) == b"a\xff"


def test_an_argv_becomes_a_tuple() -> None:
    assert argument_list("argv", ["true", "", "-x"]) == ("true", "", "-x")


@pytest.mark.parametrize(
    "argv",
    [
        *([], [""], ["", "a"], ["a", None], ["a", 1], ["a", "b\0"], ["\0"], [["a"]], ["a", b"b"]),
        *("true", {"true": 1}, None, 5, {"a"}),
    ],
)
def test_what_is_no_argv_is_refused(argv: object) -> None:
    assert "argv=" in refuse(lambda value: argument_list("argv", value), argv)


@pytest.mark.parametrize("number", [1, 2, 9])
def test_a_number_within_bounds_is_accepted(number: int) -> None:
    assert whole_number("cpus", number, range(1, 10)) == number


@pytest.mark.parametrize(
    "number", [0, 10, -1, 2**64 + 1, 1.0, 1.5, float("nan"), True, "1", None, [1], b"1"]
)
def test_a_number_out_of_bounds_and_what_is_none_are_refused(number: object) -> None:
    said = refuse(lambda value: whole_number("cpus", value, range(1, 10)), number)

    assert said == f"cpus={number!r} must be a whole number, 1 to 9"


def test_a_value_that_can_not_be_shown_is_refused_as_well() -> None:
    deep: list[object] = []
    for _level in range(100_000):
        deep = [deep]

    assert refuse(lambda value: whole_number("cpus", value, range(9)), 10**5000).startswith(
        "cpus=<int> must be"
    )
    assert refuse(lambda value: plain_text("cwd", value), deep).startswith("cwd=")
    assert len(refuse(lambda value: plain_text("cwd", value), ["x" * 10**6])) < 300


@given(anything)
def test_every_validator_accepts_or_refuses_and_does_nothing_else(value: object) -> None:
    for validator in (
        interface_name,
        ipv4_address,
        resolver_address,
        device_path,
        lambda it: machine_name("name", it),
        lambda it: plain_text("text", it),
        lambda it: argument_list("argv", it),
        lambda it: whole_number("number", it, range(9)),
        lambda it: path_below(None, it),
        lambda it: path_below("/no such base", it),
        lambda it: signal_target(it, {}),
        lambda it: request_peer(it, None),
    ):
        with suppress(RequestInvalid):
            validator(value)


# Paths


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with ways out of it, and a sibling that begins with its name."""
    base = tmp_path / "base"
    (base / "vms/a").mkdir(parents=True)
    (base / "vms/a/x").touch()
    (base / "file").touch()
    (base / "out").symlink_to(tmp_path)
    (base / "inside").symlink_to("vms")
    (base / "vms/leaf").symlink_to(tmp_path / "base-evil/x")
    (base / "dangling").symlink_to("nowhere")
    (base / "itself").symlink_to("itself")
    (base / "magic").symlink_to("/proc/self/root")
    (tmp_path / "base-evil").mkdir()
    (tmp_path / "base-evil/x").touch()
    return base


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    """All below `root`, and what a visit that changes something would change."""
    return {
        str(path): (path.lstat().st_ino, path.lstat().st_mode, path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("inner", ["vms/a/x", "vms", "file", "new", "vms/a/new/and/more"])
def test_a_path_below_its_base_is_accepted_be_it_there_or_not(base: Path, inner: str) -> None:
    before = tree(base.parent)

    assert path_below(base, f"{base}/{inner}") == base / inner
    assert path_below(str(base), f"{base}/{inner}") == base / inner
    assert tree(base.parent) == before


@pytest.mark.parametrize(
    "path",
    [
        *("{base}-evil/x", "{base}/../x", "{base}/../base-evil/x", "{base}/vms/../file", "vms/a/x"),
        *("", "/", "{base}", "{base}/", "{base}/.", "{base}//vms", "/{base}/vms", "{base}/./vms"),
        *("{base}/vms/", "{base}/vms\0", "{base}/vms/a\0/../..", "\0", "{base}/\ud800"),
        *("{base}/out", "{base}/out/x", "{base}/out/base-evil/x", "{base}/vms/leaf"),
        *("{base}/vms/leaf/x", "{base}/inside", "{base}/inside/a/x", "{base}/dangling"),
        *("{base}/dangling/x", "{base}/itself", "{base}/itself/x", "{base}/magic/etc/shadow"),
        *("{base}/file/x", "{base}/file/..", "/etc/shadow", "{parent}/x", "~/x", "{base}\n/vms"),
        *("{base}/" + "a" * 256, "{base}/" + "a/" * 3000 + "a"),
    ],
)
def test_a_path_that_is_not_below_its_base_is_refused(base: Path, path: str) -> None:
    asked = path.format(base=base, parent=base.parent)
    before = tree(base.parent)

    said = refuse(lambda value: path_below(base, value), asked)

    assert said.startswith(f"path={asked!r:.200} ")
    assert tree(base.parent) == before


@pytest.mark.parametrize("value", [None, 0, True, b"/run", ["/run"], Path("/run/x")])
def test_what_is_no_text_is_no_path(base: Path, value: object) -> None:
    assert "path=" in refuse(lambda it: path_below(base, it), value)


@pytest.mark.parametrize("unset", [None, "", "/", ".", "relative", "//run", "/run/..", "/run//x"])
def test_without_a_base_every_path_is_refused(base: Path, unset: str | None) -> None:
    for path in (f"{base}/file", "/", "/etc/passwd", "/run/x", "", "relative/x", "./x"):
        refuse(lambda value: path_below(unset, value), path)


def test_below_a_base_that_is_not_there_or_no_directory_nothing_lies(base: Path) -> None:
    for none in (base / "nothing", base / "file"):
        refuse(partial(path_below, none), f"{none}/x")


@given(inner=st.text("abvms/.\0\n-" + E_ACUTE, max_size=30))
def test_an_accepted_path_is_written_plainly(inner: str) -> None:
    with suppress(RequestInvalid):
        accepted = path_below("/proc", f"/proc/{inner}")
        assert os.path.normpath(accepted) == f"/proc/{inner}"
        assert accepted.is_relative_to("/proc")


# Processes and peers


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_process_that_was_launched_here_may_be_signalled(
    sleeper: subprocess.Popen[bytes],
) -> None:
    with pidfd_open(sleeper.pid) as pidfd:
        assert signal_target(sleeper.pid, {sleeper.pid: pidfd}) == sleeper.pid
        assert sleeper.poll() is None


def test_a_process_that_somebody_else_started_may_not(sleeper: subprocess.Popen[bytes]) -> None:
    with pidfd_open(os.getppid()) as pidfd:
        launched = {os.getppid(): pidfd}
        said = refuse(lambda pid: signal_target(pid, launched), sleeper.pid)
        refuse(lambda pid: signal_target(pid, {}), sleeper.pid)

    assert f"process={sleeper.pid} " in said
    assert sleeper.poll() is None


@pytest.mark.parametrize(
    "pid", [0, 1, -1, 2, -2, 2**22 + 1, 2**31, 2**64, True, None, "7", 7.0, [7], b"7"]
)
def test_a_pid_that_names_no_process_of_ours_is_refused(pid: object) -> None:
    # 2 is a kernel thread, or nobody in a pid namespace of our own.
    with pidfd_open(os.getppid()) as pidfd:
        launched = {os.getppid(): pidfd}

        assert f"process={pid!r} " in refuse(lambda it: signal_target(it, launched), pid)


def test_what_stands_in_the_table_by_mistake_is_refused() -> None:
    with pidfd_open(os.getpid()) as ourselves, pidfd_open(1) as first:
        launched: dict[int, int] = {-1: first, 0: first, 1: first, os.getpid(): ourselves}

        for pid in launched:
            refuse(lambda it: signal_target(it, launched), pid)


def test_one_that_has_ended_is_refused_as_a_zombie_and_as_a_pid_of_anothers(
    sleeper: subprocess.Popen[bytes],
) -> None:
    with pidfd_open(sleeper.pid) as pidfd:
        sleeper.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        refuse(lambda pid: signal_target(pid, {pid: pidfd}), sleeper.pid)  # type: ignore[dict-item]  # it is an int
        sleeper.wait()
        # The pid of one that lives now, with the pidfd of the one that had it before.
        refuse(lambda pid: signal_target(pid, {os.getppid(): pidfd}), os.getppid())


def test_a_descriptor_that_is_closed_vouches_for_nobody(sleeper: subprocess.Popen[bytes]) -> None:
    pidfd = pidfd_open(sleeper.pid)
    pidfd.close()

    refuse(lambda _: signal_target(sleeper.pid, {sleeper.pid: int(pidfd)}), None)
    refuse(lambda _: signal_target(sleeper.pid, {sleeper.pid: -1}), None)


@pytest.mark.parametrize(("uid", "owner"), [(0, 1000), (1000, 1000), (0, 0)])
def test_root_and_the_owner_may_make_requests(uid: int, owner: int) -> None:
    assert request_peer(uid, owner) == uid
    assert request_peer(uid, owner=owner) == uid


@pytest.mark.parametrize(
    ("uid", "owner"),
    [
        *((1001, 1000), (1000, 0), (65534, 1000), (-1, 1000), (2**32, 1000), (2**32 - 1, 1000)),
        *((0, None), (1000, None), (False, 1000), (True, 1), ("1000", 1000), (1000.0, 1000)),
        *((None, 1000), (None, None)),
    ],
)
def test_nobody_else_may_and_without_an_owner_not_even_root(uid: object, owner: int | None) -> None:
    assert f"peer={uid!r} " in refuse(lambda it: request_peer(it, owner), uid)


# Programs


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("VMS-TEST-NOT-ROOT: only root can make programs of root's")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of root's: a copy of echo."""
    needs_root()
    program = tmp_path / "program"
    program.write_bytes(Path("/usr/bin/echo").read_bytes())
    program.chmod(0o755)
    return program


def run(program: OwnedFd) -> bytes:
    """What the program behind that descriptor prints when it is executed through it."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(theirs, 1)
        os.execve(program, ["echo", "it", "runs"], {})
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours, "rb") as output:
        return output.read()


def test_a_program_of_roots_is_opened_and_runs_through_its_descriptor() -> None:
    with trusted_program("/usr/bin/echo") as program:
        assert not os.get_inheritable(program)
        assert run(program) == b"it runs\n"


def test_what_takes_its_place_later_is_not_run(program: Path, tmp_path: Path) -> None:
    with trusted_program(str(program)) as opened:
        other = tmp_path / "other"
        other.write_bytes(Path("/usr/bin/false").read_bytes())
        other.chmod(0o755)
        other.rename(program)

        assert run(opened) == b"it runs\n"


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        (0o775, "writable by others"),
        (0o757, "writable by others"),
        (0o777, "writable by others"),
        (0o722, "writable by others"),
        (0o644, "executable"),
        (0o600, "executable"),
    ],
)
def test_a_program_that_others_can_change_is_refused(
    program: Path, mode: int, sentence: str
) -> None:
    program.chmod(mode)
    before, held = program.stat(), descriptors()

    assert sentence in refuse(trusted_program, str(program))
    assert program.stat().st_mode == before.st_mode
    assert descriptors() == held


def test_a_program_that_an_acl_lets_somebody_write_is_refused(program: Path) -> None:
    try:
        subprocess.run(["setfacl", "-m", "u:65533:rwx", program], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("VMS-TEST-NO-ACL: setfacl does not work here; apt install acl")

    assert "writable by others" in refuse(trusted_program, str(program))


def test_another_users_program_is_refused(program: Path) -> None:
    os.chown(program, 65533, 0)

    assert "must be root's, and is uid 65533's" in refuse(trusted_program, str(program))


def test_links_directories_devices_and_sockets_are_no_programs(
    program: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(program)
    os.mkfifo(tmp_path / "fifo", 0o755)
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o755)
    for path in (
        *(str(tmp_path / name) for name in ("link", "fifo", "socket", "nothing", "")),
        *("/dev/null", "/", "", "echo", "./echo", "usr/bin/echo", "/usr/bin/echo/x"),
        *("/usr/bin/echo\0", "\0", "/proc/self/exe", f"/proc/self/root{program}"),
    ):
        held = descriptors()
        assert f"program={path!r}" in refuse(trusted_program, path)
        assert descriptors() == held
    for value in NO_TEXTS:
        refuse(trusted_program, value)
