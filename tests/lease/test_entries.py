"""What a ledger holds is what is made: under the names that others give."""

from __future__ import annotations

from pytest_vmsandbox.lease.entries import CGROUP_PREFIX
from pytest_vmsandbox.warden import groups


def test_the_reaper_knows_control_groups_by_the_name_that_the_warden_gives_them() -> None:
    """It says it a second time: what runs with privilege imports nothing of this room."""
    assert CGROUP_PREFIX == groups.PREFIX
