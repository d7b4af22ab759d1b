"""The flags of clone(2)."""

from __future__ import annotations

from pathlib import Path

from pytest_vmsandbox.linux import CloneFlags


def test_the_namespace_flags_are_those_of_a_process_namespaces() -> None:
    kinds = {"NEWNS"} | {
        f"NEW{link.name.upper()}"
        for link in Path("/proc/self/ns").iterdir()
        if link.name != "mnt" and not link.name.endswith("_for_children")
    }

    assert {f"CLONE_{kind}" for kind in kinds} == {flag.name for flag in CloneFlags.NS_FLAGS}


def test_unshare_of_the_manual_takes_what_a_process_may_share_besides() -> None:
    besides = CloneFlags.UNSHARE_FLAGS & ~int(CloneFlags.NS_FLAGS)

    assert CloneFlags.UNSHARE_FLAGS & CloneFlags.NS_FLAGS == CloneFlags.NS_FLAGS
    assert besides == CloneFlags.FILES | CloneFlags.FS | CloneFlags.SYSVSEM


def test_flags_that_only_clone3_takes_follow_one_after_the_other() -> None:
    # The newest are in no header that is at hand here, and the kernel gives them out in order.
    wide = [flag for flag in CloneFlags if flag > 2**32 - 1]

    assert [int(flag) for flag in wide] == [1 << 32 + place for place in range(len(wide))]
    assert CloneFlags.EMPTY_MNTNS is wide[-1]
