"""Access control lists, set and read back on real file systems."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmsandbox.host import permissions
from pytest_vmsandbox.host.permissions import (
    get_acl,
    parse_acl,
    probe_acl_support,
    remove_acl_user,
    set_acl_user,
    verify_user_access,
)

if TYPE_CHECKING:
    from tests.host.conftest import Stubs

NOT_A_USER = [
    "",
    "root,u:daemon:rwx",
    "root:rwx,u:daemon",
    "daemon:",
    ",",
    "-x",
    "a b",
    "daemon\n",
    "dæmon",
    "٣",
    "../x",
]

NOT_PERMS = ["", "rwz", "rw,u:root:rwx", "7", "rwxr", "rw\n", "RW", "r w", "X"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


@pytest.fixture(params=["tmpfs", "ext4"])
def folder(request: pytest.FixtureRequest) -> Path:
    """The root of a file system of each kind."""
    found: Path = request.getfixturevalue(request.param)
    return found


async def test_an_entry_that_was_set_is_read_back(file: Path) -> None:
    assert await set_acl_user(file, "daemon", "rw")

    assert await get_acl(file) == {
        "user::": "rw-",
        "user:daemon": "rw-",
        "group::": "---",
        "mask::": "rw-",
        "other::": "---",
    }


async def test_access_is_verified_letter_by_letter(file: Path) -> None:
    await set_acl_user(file, "daemon", "r")

    assert await verify_user_access(file, "daemon", "r")
    assert not await verify_user_access(file, "daemon", "w")
    assert not await verify_user_access(file, "daemon", "rw")
    assert not await verify_user_access(file, "daemon", "rx")
    assert not await verify_user_access(file, "nobody", "r")


async def test_read_and_write_are_what_is_meant_when_nothing_is_said(file: Path) -> None:
    await set_acl_user(file, "daemon")

    acl = await get_acl(file)

    assert acl is not None
    assert acl["user:daemon"] == "rw-"
    assert await verify_user_access(file, "daemon")
    await set_acl_user(file, "daemon", "r")
    assert not await verify_user_access(file, "daemon")


async def test_letters_may_be_written_as_getfacl_prints_them(file: Path) -> None:
    assert await set_acl_user(file, "daemon", "r--")

    assert await verify_user_access(file, "daemon", "r--")
    assert not await verify_user_access(file, "daemon", "rw-")


async def test_a_chmod_afterwards_leaves_nothing_of_the_entry(file: Path) -> None:
    await set_acl_user(file, "daemon", "rw")
    file.chmod(0o600)

    acl = await get_acl(file)

    assert acl is not None
    assert (acl["user:daemon"], acl["mask::"]) == ("rw-", "---")
    assert not await verify_user_access(file, "daemon", "r")


async def test_a_chmod_afterwards_may_leave_half_of_the_entry(file: Path) -> None:
    await set_acl_user(file, "daemon", "rw")
    file.chmod(0o640)

    assert await verify_user_access(file, "daemon", "r")
    assert not await verify_user_access(file, "daemon", "rw")


async def test_default_entries_keep_their_prefix_and_grant_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    subprocess.run(["setfacl", "-d", "-m", "u:daemon:rwx", tmp_path], check=True)

    acl = await get_acl(tmp_path)

    assert acl == {
        "user::": "rwx",
        "group::": "r-x",
        "other::": "---",
        "default:user::": "rwx",
        "default:user:daemon": "rwx",
        "default:group::": "r-x",
        "default:mask::": "rwx",
        "default:other::": "---",
    }
    assert not await verify_user_access(tmp_path, "daemon", "r")


async def test_the_mask_of_the_default_entries_does_not_limit(tmp_path: Path) -> None:
    subprocess.run(["setfacl", "-m", "u:daemon:rwx,d:u:daemon:rwx,d:m::---", tmp_path], check=True)

    assert await verify_user_access(tmp_path, "daemon", "rwx")


async def test_an_entry_can_be_taken_off_again_and_again(file: Path) -> None:
    await set_acl_user(file, "daemon", "rw")

    assert await remove_acl_user(file, "daemon")
    assert await remove_acl_user(file, "daemon")

    acl = await get_acl(file)
    assert acl is not None
    assert "user:daemon" not in acl


async def test_a_file_that_is_not_there_has_no_acl(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"

    assert not await set_acl_user(nothing, "daemon", "rw")
    assert not await remove_acl_user(nothing, "daemon")
    assert await get_acl(nothing) is None
    assert not await verify_user_access(nothing, "daemon", "r")


async def test_a_user_that_is_not_there_gets_no_entry(file: Path) -> None:
    assert not await set_acl_user(file, "no-such-user", "rw")
    assert not await verify_user_access(file, "no-such-user", "rw")


async def test_a_number_without_a_name_is_a_user(file: Path) -> None:
    assert await set_acl_user(file, "54321", "rw")
    assert await verify_user_access(file, "54321", "rw")


@pytest.mark.parametrize("user", NOT_A_USER)
async def test_what_is_no_user_name_is_refused_before_anything_runs(
    file: Path, stubs: Stubs, user: str
) -> None:
    stubs.put("setfacl")
    stubs.put("getfacl", f"echo 'user:{user}:rwx'; echo mask::rwx")

    assert not await set_acl_user(file, user, "rw")
    assert not await remove_acl_user(file, user)
    assert not await verify_user_access(file, user, "rw")
    assert stubs.calls("setfacl") == []
    assert stubs.calls("getfacl") == []


@pytest.mark.parametrize("perms", NOT_PERMS)
async def test_what_is_no_permission_is_refused_before_anything_runs(
    file: Path, stubs: Stubs, perms: str
) -> None:
    stubs.put("setfacl")
    stubs.put("getfacl", "echo user:daemon:rwx; echo mask::rwx")

    assert not await set_acl_user(file, "daemon", perms)
    assert not await verify_user_access(file, "daemon", perms)
    assert stubs.calls("setfacl") == []
    assert stubs.calls("getfacl") == []


async def test_asking_for_no_letter_is_refused_though_setting_none_is_not(file: Path) -> None:
    assert await set_acl_user(file, "daemon", "---")
    assert not await verify_user_access(file, "daemon", "---")


@pytest.mark.parametrize("user", ["daemon", "www-data", "a.b", "_x", "machine$", "0"])
async def test_ordinary_names_reach_setfacl(file: Path, stubs: Stubs, user: str) -> None:
    stubs.put("setfacl")

    assert await set_acl_user(file, user, "rx")
    assert await remove_acl_user(file, user)
    assert stubs.calls("setfacl") == [
        ["-m", f"u:{user}:rx", "--", str(file)],
        ["-x", f"u:{user}", "--", str(file)],
    ]


@pytest.mark.parametrize(
    "name", ["-rf", "--help", "-", "a b", "nl\nuser:daemon:rwx", "'; touch x", "ü", "a:b,c"]
)
async def test_awkward_file_names_are_only_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch(mode=0o600)
    (tmp_path / "bystander").touch(mode=0o600)

    assert not await verify_user_access(name, "daemon", "r")
    assert await set_acl_user(name, "daemon", "rw")
    assert await verify_user_access(name, "daemon", "rw")
    assert await permissions.chmod_async(name, "a+r")
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o664
    assert await remove_acl_user(name, "daemon")
    assert not await verify_user_access(name, "daemon", "r")
    assert not await verify_user_access("bystander", "daemon", "r")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "bystander"])


async def test_folders_and_files_take_acls_on_each_file_system(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir(mode=0o700)
    for path in (inside, inside / "file"):
        if path != inside:
            path.touch(mode=0o600)

        assert await set_acl_user(path, "daemon", "rwx")
        assert await verify_user_access(path, "daemon", "rwx")
        path.chmod(0o700)
        assert not await verify_user_access(path, "daemon", "r")
        assert await remove_acl_user(path, "daemon")
    assert await probe_acl_support(inside)
    assert list(inside.iterdir()) == [inside / "file"]


async def test_a_file_system_without_acls_is_found_out(without_acls: Path) -> None:
    file = without_acls / "file"
    file.touch()

    assert not await set_acl_user(file, "daemon", "rw")
    assert not await verify_user_access(file, "daemon", "rw")
    assert not await probe_acl_support(without_acls)
    assert list(without_acls.iterdir()) == [file]


async def test_acl_support_is_not_believed_without_reading_it_back(
    tmp_path: Path, stubs: Stubs
) -> None:
    stubs.put("setfacl")

    assert not await probe_acl_support(tmp_path)
    assert len(stubs.calls("setfacl")) == 1
    assert list(tmp_path.iterdir()) == [stubs.directory]


async def test_acl_support_is_not_believed_when_setting_failed(
    tmp_path: Path, stubs: Stubs
) -> None:
    stubs.put("setfacl", "exit 1")
    owner = await permissions.get_owner(tmp_path)
    assert owner is not None
    stubs.put("getfacl", f"echo user:{owner[0]}:rw-; echo mask::rwx")

    assert not await probe_acl_support(tmp_path)


@pytest.mark.parametrize("where", ["missing", "a\0b"])
async def test_a_folder_that_is_not_there_has_no_acl_support(tmp_path: Path, where: str) -> None:
    assert not await probe_acl_support(tmp_path / where)


# Reading what getfacl prints

KEYS = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "default:"]),
        st.sampled_from(["user:", "group:", "mask:", "other:"]),
        st.sampled_from([":", "daemon", "www-data", "1000", "with\\040blank", "a#b"]),
    ),
)
LETTERS = st.builds("".join, st.tuples(*(st.sampled_from([letter, "-"]) for letter in "rwx")))


@settings(database=None)  # nothing is written into the checkout
@given(
    acl=st.dictionaries(KEYS, LETTERS),
    noise=st.sampled_from(["", "# file: x", "#user:daemon:rwx", "user:rwx", "  ", "user:a:rw"]),
    ending=st.sampled_from(["", "\t#effective:---", "\t\t\t#effective:r--", " "]),
)
def test_entries_are_read_whatever_stands_around_them(
    acl: dict[str, str], noise: str, ending: str
) -> None:
    lines = [f"{key}:{perms}{ending}".replace(":::", "::") for key, perms in acl.items()]
    text = "".join(f"{noise}\n{line}\n" for line in lines)

    assert parse_acl(text) == acl


@pytest.mark.parametrize(
    "line",
    [
        "# user:daemon:rwx",
        "user:daemon",
        "daemon:rwx",
        "user:daemon:rwxx",
        "user:daemon:wrx",
        "user:daemon:7",
        "user:da:emon:rwx",
        "nonsense:daemon:rwx",
        "default:nonsense:daemon:rwx",
        " user:daemon:rwx",
        "user:daemon:rwx,user:root:rwx",
        "user:daemon:rwx#effective:rwx",
    ],
)
def test_lines_that_are_no_entries_are_skipped(line: str) -> None:
    assert parse_acl(f"{line}\n") == {}


async def test_a_named_entry_without_a_mask_counts_as_nothing(file: Path, stubs: Stubs) -> None:
    stubs.put("getfacl", "echo user:daemon:rw-")

    assert not await verify_user_access(file, "daemon", "r")
