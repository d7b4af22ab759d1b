"""Rights that differ are told apart, each in a process that really has fewer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_vmsandbox.host import rights
from pytest_vmsandbox.host.rights import read_rights
from tests.people import CHECKOUT, plain_environment

READ = """
import json, sys
from dataclasses import asdict
from pytest_vmsandbox.host.rights import read_rights
from pytest_vmsandbox.linux.seccomp import deny_system_calls
if "filtered" in sys.argv:
    deny_system_calls(["mount_setattr"])
print(json.dumps(asdict(read_rights())))
"""
IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user")
WITHOUT_NAMESPACES = (
    *IN_A_NAMESPACE,
    *("sh", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"', "sh"),
)


def rights_of(*before: str, after: tuple[str, ...] = ()) -> dict[str, list[str] | str]:
    """The rights of a fresh Python that was started through `before`."""
    if before and shutil.which(before[0]) is None:
        pytest.skip(f"takes {before[0]}")
    done = subprocess.run(
        [*before, sys.executable, "-c", READ, *after],
        cwd=CHECKOUT,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"takes {before[:3]}: {done.stderr.strip()[-200:]}")
    told: dict[str, list[str] | str] = json.loads(done.stdout)
    return told


def changed_status(other: dict[str, list[str] | str]) -> set[str]:
    plain = rights_of()
    return {line.partition(":")[0] for line in set(plain["status"]) ^ set(other["status"])}


def test_two_processes_of_the_same_rights_are_not_told_apart() -> None:
    assert rights_of() == rights_of()


def test_who_may_gain_no_privileges_has_other_rights() -> None:
    assert changed_status(rights_of("setpriv", "--no-new-privs")) == {"NoNewPrivs"}


@pytest.mark.skipif(os.getuid() != 0, reason="takes root")
def test_a_smaller_bounding_set_is_seen() -> None:
    fewer = rights_of("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all")

    assert "CapBnd" in changed_status(fewer)


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="no filter for it")
def test_a_filter_of_system_calls_is_seen() -> None:
    assert {"Seccomp", "NoNewPrivs"} <= changed_status(rights_of(after=("filtered",)))


def test_another_user_namespace_and_what_it_limits_are_seen() -> None:
    ours, inside = rights_of(), rights_of(*IN_A_NAMESPACE)
    limited = rights_of(*WITHOUT_NAMESPACES)

    assert ours["user_namespace"] != inside["user_namespace"]
    assert inside["sysctls"] != limited["sysctls"]
    assert "0\n" in limited["sysctls"]


@pytest.mark.parametrize("field", ["_DEVICES", "_ACCOUNTS"])
def test_a_file_that_decides_is_seen_to_change(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(rights, field, (path,))

    seen = [read_rights()]
    path.write_text("")
    seen.append(read_rights())
    path.chmod(0o600)
    seen.append(read_rights())
    time.sleep(0.02)  # a time stamp may be as coarse as the kernel's clock ticks
    path.write_text("more")
    seen.append(read_rights())

    assert len(set(seen)) == 4


def test_where_there_is_no_proc_the_rights_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PROFILE", "_USER_NAMESPACE"):
        monkeypatch.setattr(rights, name, tmp_path / "gone")
    monkeypatch.setattr(rights, "_SYSCTLS", (tmp_path / "gone",))

    seen = read_rights()

    assert (seen.profile, seen.user_namespace, seen.sysctls) == ("", "", ("",))
