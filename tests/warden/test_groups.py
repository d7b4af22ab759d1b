"""Control groups: limits for all that a process starts, gone with it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.requests import Limits
from tests.warden.conftest import GROUP, SLEEP, TRUE, Streams, order, python, see


async def test_it_is_in_a_group_of_its_own_which_is_gone_afterwards(warden: Warden) -> None:
    if not warden.greeting.groups:
        pytest.skip("this user can't make control groups")
    limits = Limits(memory_bytes=64 << 20, processes=20)
    ordered = order(SLEEP, "60", group=GROUP, limits=limits)
    groups = [Path(parent) / f"vmsandbox-{GROUP}" for parent in warden.greeting.groups]
    with Streams() as streams:
        async with warden.launch(ordered, streams.descriptors) as process:
            for group in groups:
                assert (group / "cgroup.procs").read_text().split() == [str(process.pid)]
            said = [
                (group / name).read_text().strip()
                for group in groups
                for name in ("memory.limit_in_bytes", "memory.max", "pids.max")
                if (group / name).exists()
            ]
    assert set(said) == {"67108864", "20"}
    assert not any(group.exists() for group in groups)


async def test_what_it_starts_is_limited_with_it(warden: Warden) -> None:
    if "pids" not in warden.greeting.limits:
        pytest.skip("this user can't limit the number of processes")
    script = """
import json, os
children = 0
try:
    while True:
        if os.fork() == 0:
            import time; time.sleep(60)
        children += 1
except OSError as error:
    print(json.dumps([children, error.errno]))
"""
    limits = Limits(processes=12)

    assert await see(warden, python(script, group=GROUP, limits=limits)) == [11, errno.EAGAIN]


async def test_a_group_s_name_serves_one_at_a_time(warden: Warden) -> None:
    if not warden.greeting.groups:
        pytest.skip("this user can't make control groups")
    with Streams() as streams:
        async with warden.launch(order(SLEEP, "60", group=GROUP), streams.descriptors) as first:
            with pytest.raises(FileExistsError):
                async with warden.launch(order(TRUE, group=GROUP), streams.descriptors):
                    pass
            for parent in warden.greeting.groups:
                members = (Path(parent) / f"vmsandbox-{GROUP}" / "cgroup.procs").read_text()
                assert members.split() == [str(first.pid)]
