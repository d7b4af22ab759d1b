"""Views: what is made for them lies in file systems of their own, never on the host's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.requests import Who
from pytest_vmsandbox.warden.steps import Access, Bind, Step, Symlink, Tmpfs
from tests.warden.conftest import TRUE, order, run

INTO_THE_HOST: dict[str, Step] = {
    "a directory": Tmpfs(target="/host/new/er", size_mib=1),
    "a file": Bind(source="/usr/bin/true", target="/host/file"),
    "a link": Symlink(target="/host/link", text="/"),
}


@pytest.mark.parametrize("what", INTO_THE_HOST)
async def test_nothing_is_made_on_the_host(warden: Warden, scratch: Path, what: str) -> None:
    scratch.chmod(0o777)
    host = Bind(source=str(scratch), target="/host", access=Access.READ_WRITE)
    steps = (*order(TRUE).steps[:-1], host, INTO_THE_HOST[what])

    with pytest.raises(OSError, match="nothing is made on the host's file systems"):
        await run(warden, order(TRUE, who=Who.OWNER, steps=steps))

    assert list(scratch.iterdir()) == []


async def test_what_lies_on_the_host_already_is_a_place(warden: Warden, scratch: Path) -> None:
    (scratch / "place").mkdir()
    steps = (
        *order(TRUE).steps[:-1],
        Bind(source=str(scratch), target="/host"),
        Tmpfs(target="/host/place", size_mib=1),
        Tmpfs(target="/host/place/below", size_mib=1),
    )

    assert await run(warden, order(TRUE, steps=steps)) == (0, "", "")
    assert list((scratch / "place").iterdir()) == []
