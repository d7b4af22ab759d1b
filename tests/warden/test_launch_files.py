"""Files that are handed to a process: it can read what it is given, and never change it."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.warden.client import Warden
from tests.warden.conftest import TRUE, order, python, run, see

READ_AND_TRY_TO_WRITE = """
import errno, json, os
said = {"text": os.pread(3, 99, 0).decode()}
def attempt(name, action):
    try:
        action()
        said[name] = "done"
    except OSError as error:
        said[name] = errno.errorcode[error.errno]
attempt("write", lambda: os.write(3, b"x"))
attempt("open for writing", lambda: os.open("/proc/self/fd/3", os.O_RDWR))
attempt("truncate", lambda: os.truncate("/proc/self/fd/3", 0))
attempt("chmod", lambda: os.fchmod(3, 0o666))
attempt("chown", lambda: os.fchown(3, os.getuid(), os.getgid()))
attempt("touch", lambda: os.utime(3))
attempt("read", lambda: os.read(os.open("/proc/self/fd/3", os.O_RDONLY), 9))
print(json.dumps(said))
"""


async def test_a_file_that_is_handed_over_by_its_path_can_be_read_and_not_changed(
    warden: Warden, scratch: Path
) -> None:
    path = scratch / "file"
    path.write_text("precious")
    path.chmod(0o644)
    if os.getuid() == 0:
        # The worst case: a file of the VMM's own, which it may open anew as it likes.
        os.chown(path, warden.greeting.uid, -1)
    before = path.stat()
    with path.open() as file:
        said = await see(warden, python(READ_AND_TRY_TO_WRITE, files=(str(path),)), [file.fileno()])

    assert said.pop("text") == "precious"
    assert said.pop("read") == "done"
    assert "done" not in said.values(), said
    after = path.stat()
    assert path.read_text() == "precious"
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


async def test_a_file_without_a_path_is_handed_over_as_it_is_open(
    warden: Warden, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        await run(warden, python("import os; os.write(3, b'text')", files=(None,)), [file.fileno()])

    assert path.read_text() == "text"


async def test_a_file_of_its_own_user_s_that_has_left_its_path_is_refused(
    warden: Warden, scratch: Path
) -> None:
    path = scratch / "file"
    path.write_text("precious")
    path.chmod(0o444)  # which its owner can change
    if os.getuid() == 0:
        os.chown(path, warden.greeting.uid, -1)
    elif warden.greeting.uid != os.getuid():
        pytest.skip("takes a file of the user of VMMs")
    with path.open() as file:
        path.rename(scratch / "elsewhere")
        with pytest.raises(PermissionError, match=str(path)):
            await run(warden, order(TRUE, files=(str(path),)), [file.fileno()])


async def test_another_file_at_the_path_is_refused(warden: Warden, scratch: Path) -> None:
    path = scratch / "file"
    path.write_text("one")
    with path.open() as file:
        path.rename(scratch / "elsewhere")
        path.write_text("two")
        path.chmod(0o644)
        with pytest.raises(OSError, match=str(path)) as caught:
            await run(warden, order(TRUE, files=(str(path),)), [file.fileno()])

    assert caught.value.errno == errno.ESTALE


async def test_a_file_that_its_user_may_not_read_is_refused(warden: Warden, scratch: Path) -> None:
    if warden.greeting.uid == os.getuid():
        pytest.skip("the user of VMMs is ourselves")
    folder = scratch / "folder"
    folder.mkdir()
    path = folder / "secret"
    path.write_text("secret")
    path.chmod(0o600)
    for mode in (0o755, 0o700):
        folder.chmod(mode)
        with (
            path.open() as file,
            pytest.raises(PermissionError, match=str(path)),
        ):
            await run(warden, order(TRUE, files=(str(path),)), [file.fileno()])


async def test_a_file_that_all_may_read_may_lie_where_its_user_may_not_go(
    warden: Warden, scratch: Path
) -> None:
    if warden.greeting.uid == os.getuid():
        pytest.skip("the user of VMMs is ourselves")
    folder = scratch / "folder"
    folder.mkdir(mode=0o700)
    path = folder / "image"
    path.write_text("image")
    path.chmod(0o644)
    with path.open() as file:
        said = await see(warden, python(READ_AND_TRY_TO_WRITE, files=(str(path),)), [file.fileno()])

    assert said.pop("text") == "image"
    assert said.pop("read") == "done"
    assert "done" not in said.values(), said


async def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(
    warden: Warden, scratch: Path
) -> None:
    path = scratch / "pipe"
    os.mkfifo(path)
    path.chmod(0o644)
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as pipe:
        async with asyncio.timeout(5):
            assert await run(warden, order(TRUE, files=(str(path),)), [pipe]) == (0, "", "")
