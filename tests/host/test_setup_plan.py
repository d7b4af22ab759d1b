"""The plan of a setup: which steps follow from how a host stands; none is performed here."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from pathlib import Path

import pytest

from pytest_vmsandbox.host import setup_plan
from pytest_vmsandbox.host.setup_plan import (
    SUDOERS_FILE,
    UDEV_FILE,
    UNDOINGS,
    Standing,
    command_to_record,
    plan_setup,
    plan_undo,
    record_after_failure,
    render_sudoers,
    render_udev_rule,
)
from pytest_vmsandbox.host.setup_record import (
    SetupRecord,
    parse_setup_record,
    read_setup_record,
)

FIELDS = [field.name for field in dataclasses.fields(SetupRecord)]
RAW = Standing(missing_packages=("acl",), installing=("acl", "libacl1"), has_kvm=True)


def stand_after(standing: Standing, *, user: str | None) -> Standing:
    """How the host stands when the plan has been performed."""
    record = [standing.record, *(step.record for step in plan_setup(standing, user=user))][-1]
    return Standing(
        has_user=True, has_kvm=standing.has_kvm, record=record, ours_in_place=list(record.files)
    )


def test_a_raw_host_gets_every_step_in_order() -> None:
    plan = plan_setup(RAW, user="alice")

    assert [str(step) for step in plan] == [
        "install the packages acl",
        "make the system user qemu-vm, without shell or home",
        f"let alice run commands as qemu-vm: {SUDOERS_FILE}",
        f"let qemu-vm and alice open /dev/kvm: {UDEV_FILE}",
    ]
    assert plan[-1].record.packages == ("acl", "libacl1")
    assert plan[0].record.made_user is False
    assert plan[1].record.made_user is True


@pytest.mark.parametrize("user", ["alice", None])
def test_a_host_that_was_set_up_gets_no_step(user: str | None) -> None:
    assert plan_setup(stand_after(RAW, user=user), user=user) == ()


def test_a_second_user_is_added_to_the_first() -> None:
    standing = stand_after(RAW, user="alice")

    plan = plan_setup(standing, user="bob")

    assert plan[-1].record.sudo_users == ("alice", "bob")
    assert render_sudoers(("alice", "bob")) == plan[0].commands[0].stdin
    known = standing.record.files[SUDOERS_FILE]
    assert known in plan[0].commands[0].argv  # what may be overwritten is what we wrote


def test_a_file_that_was_removed_is_written_again() -> None:
    standing = dataclasses.replace(stand_after(RAW, user="alice"), ours_in_place=[UDEV_FILE])

    assert [str(step) for step in plan_setup(standing, user="alice")] == [
        f"let alice run commands as qemu-vm: {SUDOERS_FILE}"
    ]


def test_what_was_there_before_is_not_recorded_as_ours() -> None:
    plan = plan_setup(Standing(has_user=True, has_kvm=False), user=None)

    assert plan == ()


def test_without_apt_no_package_is_installed() -> None:
    standing = dataclasses.replace(RAW, has_apt=False)

    assert "install" not in str(plan_setup(standing, user="alice")[0])


def test_an_undo_takes_back_what_is_on_record_last_first() -> None:
    record = stand_after(RAW, user="alice").record

    plan = plan_undo(record)

    assert [str(step).split()[1] for step in plan] == [f"{UDEV_FILE},", SUDOERS_FILE, "the", "the"]
    assert [step.record.empty for step in plan] == [False, False, False, True]
    assert plan_undo(SetupRecord()) == ()


def test_an_undoing_takes_back_one_thing_of_the_record_and_no_more() -> None:
    record = stand_after(RAW, user="alice").record

    steps = [step for undoing in UNDOINGS if (step := undoing(record))]

    assert len(steps) == len(UNDOINGS)
    for step in steps:
        kept = [name for name in FIELDS if getattr(step.record, name) == getattr(record, name)]
        lost = set(FIELDS) - set(kept)
        assert lost in (
            {"files", "kvm_users"},
            {"files", "sudo_users"},
            {"made_user"},
            {"packages"},
        )
    assert all(undoing(SetupRecord()) is None for undoing in UNDOINGS)


@pytest.mark.parametrize("on_host", [(), ("libacl1",), ("acl", "libacl1")])
def test_after_a_failed_install_only_what_it_brought_is_on_record(on_host: tuple[str, ...]) -> None:
    before = SetupRecord(packages=("older",))
    (install, *_) = plan_setup(dataclasses.replace(RAW, record=before), user=None)

    kept = record_after_failure(before, install, left_alone=False, on_host=on_host.__contains__)

    assert kept == SetupRecord(packages=("older", *on_host))


def test_after_a_step_that_left_things_alone_the_record_is_as_before() -> None:
    before = SetupRecord()
    make_user = plan_setup(RAW, user=None)[1]

    def kept(*, left_alone: bool) -> SetupRecord:
        return record_after_failure(
            before, make_user, left_alone=left_alone, on_host=lambda _: False
        )

    assert kept(left_alone=True) == before
    assert kept(left_alone=False) == SetupRecord(made_user=True)


def test_the_sudoers_lines_let_users_become_qemu_vm_and_nobody_else() -> None:
    lines = render_sudoers(("alice", "bob")).splitlines()

    assert [line for line in lines if not line.startswith("#")] == [
        "alice ALL=(qemu-vm) NOPASSWD: ALL",
        "bob ALL=(qemu-vm) NOPASSWD: ALL",
    ]


def test_the_udev_rule_opens_kvm_to_named_users_only() -> None:
    rule = render_udev_rule(("qemu-vm", "alice"))

    assert "setfacl -m u:qemu-vm:rw,u:alice:rw /dev/kvm" in rule
    assert "MODE" not in rule


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = stand_after(RAW, user="alice").record
    file = tmp_path / "record"
    file.write_text(record.to_json())

    assert read_setup_record(file) == record
    assert read_setup_record(tmp_path / "none").empty
    assert command_to_record(record).stdin == record.to_json()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"packages": 1}'])
def test_a_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- json's own is one too
        parse_setup_record(text)


def write(
    target: Path, known: str, content: str, *accepted_by: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", setup_plan._WRITE, "sh", target, known, "0640", *accepted_by],
        input=content,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_new_file_is_written_whole_with_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file"

    done = write(target, "", "content\n")

    assert done.returncode == 0, done.stderr
    assert target.read_text() == "content\n"
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_a_file_of_ours_is_replaced_and_somebody_elses_is_not(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    refused = write(target, sha("other"), "new")
    unknown = write(target, "", "new")

    assert (refused.returncode, unknown.returncode) == (3, 3)
    assert "left as it is" in refused.stderr
    assert target.read_text() == "old"
    assert write(target, sha("old"), "new").returncode == 0
    assert target.read_text() == "new"


def test_a_draft_that_is_not_accepted_never_gets_into_place(tmp_path: Path) -> None:
    target = tmp_path / "file"

    done = write(target, "", "no sudoers", "grep", "-q", "something else")

    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["ours", "changed since"])
def test_only_a_file_that_is_still_ours_is_removed(tmp_path: Path, content: str) -> None:
    target = tmp_path / "file"
    target.write_text(content)

    done = subprocess.run(
        ["sh", "-c", setup_plan._REMOVE, "sh", target, sha("ours")],
        capture_output=True,
        timeout=10,
        check=False,
    )

    assert target.exists() == (content != "ours")
    assert (done.returncode == 0) == (content == "ours")


def test_removing_what_is_gone_succeeds(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", setup_plan._REMOVE, "sh", tmp_path / "gone", sha("x")],
        timeout=10,
        check=False,
    )

    assert done.returncode == 0


def test_a_user_that_somebody_else_made_is_not_removed() -> None:
    done = subprocess.run(
        ["sh", "-c", setup_plan._REMOVE_USER, "sh", "daemon", "made by vmsandbox setup"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )

    assert done.returncode == 3
    assert "not made by vmsandbox setup" in done.stderr
