"""The ledger: written before anything is acquired, and never believed when it is damaged."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import (
    CgroupEntry,
    Entry,
    ProcessEntry,
    Role,
    entry_to_json,
    parse_entry,
)
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.ledger import (
    Account,
    Ledger,
    own_pid_namespace,
    parse_ledger,
    read_ledger,
)
from pytest_vmsandbox.linux import ProcessIdentity
from tests.dead_runs import leave_dead_run
from tests.precious import ODD_NAMES

WARDEN = ProcessEntry(role=Role.WARDEN, tier=Tier.SUDO, since=1.5)
VMM = ProcessEntry(
    role=Role.VMM, tier=Tier.BARE, machine_id="r0-gw0-m1", machine_name="vm1", since=2.0
)
CGROUP = CgroupEntry(path=Path("/sys/fs/cgroup/memory/vmsandbox-r0"))
PIDS = CgroupEntry(path=Path("/sys/fs/cgroup/pids/vmsandbox-r0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger.create(path, worker="gw0")
    yield ledger
    ledger.close()


def _entries(path: Path) -> list[Entry]:
    account = read_ledger(path)
    assert account.damage == ""
    return list(account.entries.values())


def test_it_says_whose_it_is(ledger: Ledger, path: Path) -> None:
    head = read_ledger(path).head

    assert head is not None
    assert head.owner == ProcessIdentity.current()
    assert head.pid_namespace == own_pid_namespace()
    assert head.worker == "gw0"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_entry_is_there_when_record_returns_and_gone_when_it_is_struck_out(
    ledger: Ledger, path: Path
) -> None:
    numbers = []
    entries: list[Entry] = [WARDEN, CGROUP, PIDS, VMM]
    for count, entry in enumerate(entries, start=1):
        numbers.append(ledger.record(entry))
        assert len(_entries(path)) == count
    assert _entries(path) == [WARDEN, CGROUP, PIDS, VMM]

    ledger.strike(numbers[1])
    assert _entries(path) == [WARDEN, PIDS, VMM]
    for number in (numbers[3], numbers[0], numbers[2]):
        ledger.strike(number)
    assert _entries(path) == []


def test_an_intent_becomes_a_process(ledger: Ledger, path: Path) -> None:
    number = ledger.record(VMM)
    ledger.identify(number, ProcessIdentity.current())

    (entry,) = _entries(path)
    assert isinstance(entry, ProcessEntry)
    assert entry.identity == ProcessIdentity.current()
    assert (entry.machine_name, entry.tier) == ("vm1", Tier.BARE)


def test_a_block_strikes_out_what_it_recorded(ledger: Ledger, path: Path) -> None:
    with ledger.recorded(CGROUP):
        assert _entries(path) == [CGROUP]

    assert _entries(path) == []


def test_a_block_that_raises_leaves_its_entry_to_the_end_of_the_run(
    ledger: Ledger, path: Path
) -> None:
    with pytest.raises(KeyError), ledger.recorded(CGROUP):
        raise KeyError

    assert _entries(path) == [CGROUP]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_paths_come_back_as_they_were(ledger: Ledger, path: Path, name: str) -> None:
    entry = CgroupEntry(path=Path("/sys/fs/cgroup", f"vmsandbox-{name}"))

    ledger.record(entry)

    assert _entries(path) == [entry]


def test_threads_do_not_mix_their_lines(ledger: Ledger, path: Path) -> None:
    def work() -> None:
        for _ in range(30):
            with ledger.recorded(VMM):
                ledger.record(CGROUP)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert _entries(path) == [CGROUP] * 120


def test_there_is_no_second_ledger_in_place_of_the_first(ledger: Ledger, path: Path) -> None:
    with pytest.raises(FileExistsError):
        Ledger.create(path, worker="gw1")


def test_what_could_not_be_written_is_not_half_there(ledger: Ledger, path: Path) -> None:
    ledger.record(CGROUP)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match="20 of"):
            ledger.record(VMM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    ledger.record(PIDS)
    assert _entries(path) == [CGROUP, PIDS]


def test_only_the_head_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda _file: synced.append(path.read_bytes()))

    ledger = Ledger.create(path, worker="gw0")
    head = path.read_bytes()
    ledger.identify(ledger.record(VMM), ProcessIdentity.current())
    ledger.strike(ledger.record(CGROUP))
    ledger.close()

    assert synced == [head]


def test_what_was_recorded_outlives_a_killed_process(base: Path) -> None:
    path = leave_dead_run(base, "ledger.record(vmm()); ledger.record(vmm('vm2'))") / LEDGER

    names = [entry.machine_name for entry in _entries(path) if isinstance(entry, ProcessEntry)]

    assert names == ["vm1", "vm2"]


# Reading what a crash, a disk or a stranger made of it


def _full(path: Path) -> bytes:
    ledger = Ledger.create(path, worker="gw0")
    ledger.record(CGROUP)
    number = ledger.record(VMM)
    ledger.identify(number, ProcessIdentity.current())
    ledger.record(PIDS)
    ledger.strike(number)
    ledger.close()
    return path.read_bytes()


def _parse(data: bytes) -> Account:
    return parse_ledger(iter(data.splitlines(keepends=True)))


def test_a_line_that_was_cut_off_counts_for_nothing(path: Path) -> None:
    data = _full(path)
    head = data.index(b"\n") + 1

    for length in range(len(data)):
        path.write_bytes(data[:length])
        account = read_ledger(path)
        whole = _parse(data[: data.rindex(b"\n", 0, length) + 1]) if length >= head else None
        assert account == whole if whole else account.damage == "it has no head"


def _lines_with(*lines: object) -> list[bytes]:
    return [json.dumps(line).encode() + b"\n" for line in lines]


RECORD = {"record": 1, "entry": entry_to_json(CGROUP)}
PROCESS = {"record": 1, "entry": entry_to_json(VMM)}
IDENTITY = {"boot_id": "b", "pid": 2, "start_ticks": 3}


@pytest.mark.parametrize(
    "lines",
    [
        [b"\n"],
        [b"nonsense\n"],
        [b"\xff\xfe\n"],
        [b"\0\0\0\n"],
        [b"NaN\n"],
        [b"[" * 60000 + b"\n"],
        [b"1" * 60000 + b"\n"],
        [b"x" * 70000],
        _lines_with({}),
        _lines_with({"record": 2, "entry": entry_to_json(CGROUP)}),
        _lines_with({"record": True, "entry": entry_to_json(CGROUP)}),
        _lines_with({"record": 1}),
        _lines_with({**RECORD, "more": 1}),
        _lines_with({"record": 1, "entry": {"kind": "house", "path": "/"}}),
        _lines_with({"record": 1, "entry": {"kind": ["process"]}}),
        _lines_with({"record": 1, "entry": {"kind": "directory", "path": "/a"}}),
        _lines_with({"record": 1, "entry": {"kind": "cgroup", "path": "/sys/fs/cgroup/system"}}),
        _lines_with({"record": 1, "entry": {"kind": "cgroup", "path": "/a/../vmsandbox-1"}}),
        _lines_with({"record": 1, "entry": {"kind": "cgroup", "path": "vmsandbox-1"}}),
        _lines_with({"record": 1, "entry": {"kind": "cgroup", "path": ""}}),
        _lines_with({"record": 1, "entry": {"kind": "cgroup", "path": "/vmsandbox-a\0b"}}),
        _lines_with(
            {"record": 1, "entry": {"kind": "cgroup", "path": "/vmsandbox-a", "force": True}}
        ),
        _lines_with({"record": 1, "entry": {**entry_to_json(VMM), "tier": "moon"}}),
        _lines_with({"record": 1, "entry": {**entry_to_json(VMM), "role": "init"}}),
        _lines_with({"record": 1, "entry": {**entry_to_json(VMM), "since": "now"}}),
        _lines_with(RECORD, RECORD),
        _lines_with(RECORD, {"strike": 2}),
        _lines_with(RECORD, {"strike": 1}, {"strike": 1}),
        _lines_with(RECORD, {"strike": 1, "why": "so"}),
        _lines_with(RECORD, {"identify": 1, "identity": IDENTITY}),
        _lines_with(PROCESS, *[{"identify": 1, "identity": IDENTITY}] * 2),
        *(
            _lines_with(PROCESS, {"identify": 1, "identity": {**IDENTITY, **wrong}})
            for wrong in (
                {"pid": 0},
                {"pid": -1},
                {"pid": 1.0},
                {"pid": True},
                {"pid": 1 << 31},
                {"pid": "2"},
                {"start_ticks": -1},
                {"boot_id": ""},
                {"boot_id": None},
            )
        ),
    ],
    ids=lambda lines: ascii(lines[-1][:40]),
)
def test_what_is_not_understood_is_damage(path: Path, lines: list[bytes]) -> None:
    Ledger.create(path, worker="gw0").close()
    with path.open("ab") as file:
        file.writelines(lines)

    assert read_ledger(path).damage


@pytest.mark.parametrize(
    "changes",
    [{"ledger": 2}, {"ledger": None}, {"more": 1}, {"owner": None}, {"worker": 1}, {"since": True}],
    ids=str,
)
def test_a_head_of_another_kind_is_damage(path: Path, changes: dict[str, object]) -> None:
    head = json.loads(_full(path).splitlines()[0])
    path.write_bytes(b"".join(_lines_with({**head, **changes}, RECORD)))

    account = read_ledger(path)
    assert account.damage
    assert account.entries == {}


@given(st.binary(max_size=400))
def test_any_bytes_can_be_read(data: bytes) -> None:
    account = _parse(data)

    assert account.damage
    assert account.entries == {}


HEAD = {
    "ledger": 1,
    "owner": IDENTITY,
    "pid_namespace": 4026531836,
    "worker": "gw0",
    "since": 1.0,
}
WHOLE = b"".join(
    _lines_with(
        HEAD,
        RECORD,
        {**PROCESS, "record": 2},
        {"identify": 2, "identity": IDENTITY},
        {"record": 3, "entry": entry_to_json(PIDS)},
        {"strike": 3},
    )
)


@given(place=st.integers(0, len(WHOLE) - 1), change=st.binary(max_size=4), cut=st.integers(0, 3))
def test_a_ledger_with_changed_bytes_can_be_read(place: int, change: bytes, cut: int) -> None:
    account = _parse(WHOLE[:place] + change + WHOLE[place + cut :])

    for entry in account.entries.values():
        assert parse_entry(json.loads(json.dumps(entry_to_json(entry)))) == entry
        if isinstance(entry, CgroupEntry):
            assert entry.path.name.startswith("vmsandbox-")


def test_the_one_that_is_changed_there_is_sound() -> None:
    account = _parse(WHOLE)

    assert account.damage == ""
    assert len(account.entries) == 2


@pytest.mark.parametrize("make", ["link", "fifo", "directory", "written by others"])
def test_what_is_not_a_file_that_only_we_write_is_never_believed(path: Path, make: str) -> None:
    _full(path)
    match make:
        case "link":
            path.rename(path.with_name("real"))
            path.symlink_to("real")
        case "fifo":
            path.unlink()
            os.mkfifo(path, 0o600)
        case "directory":
            path.unlink()
            path.mkdir()
        case _:
            path.chmod(0o620)

    with suppress(OSError):  # there is none to be read
        assert read_ledger(path).damage


@pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
def test_what_belongs_to_somebody_else_is_never_believed(path: Path) -> None:
    _full(path)
    os.chown(path, 12345, 12345)

    assert read_ledger(path).damage
