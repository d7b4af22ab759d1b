from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_vmsandbox.errors import HostUnfit, RequestInvalid
from pytest_vmsandbox.jail.sandbox import (
    CAPABILITIES,
    SandboxDegraded,
    capabilities,
    degrade_config_for_capabilities,
)
from pytest_vmsandbox.jail.sandbox.config import SandboxConfig
from pytest_vmsandbox.jail.sandbox.run import Ended

WEAK = {
    "network": ("undefined",),
    "mounts": ("undefined",),
    "filesystem_writable_paths": ("all",),
}
STRONG: dict[str, Any] = {
    "network": "isolated",
    "mounts": "isolated",
    "filesystem_writable_paths": ["/tmp"],
    "cwd": "/tmp",
}


@pytest.fixture
def _no_walls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host on which no sandbox can be run."""

    def refuse(_config: SandboxConfig) -> Ended:
        raise HostUnfit("VMS-TEST", "walls", "none", "none")

    monkeypatch.setattr(capabilities, "run_with_own_warden", refuse)
    capabilities._found.cache_clear()
    yield
    capabilities._found.cache_clear()


@pytest.mark.usefixtures("_walls")
def test_a_host_with_walls_can_do_it_all_and_keeps_a_config_as_it_is() -> None:
    capabilities._found.cache_clear()

    assert dict(CAPABILITIES) == {
        "network": ("undefined", "isolated"),
        "mounts": ("undefined", "isolated"),
        "filesystem_writable_paths": ("all", "any"),
    }
    assert degrade_config_for_capabilities(STRONG) == STRONG


@pytest.mark.usefixtures("_no_walls")
def test_a_host_without_walls_can_do_nothing_of_it() -> None:
    assert dict(CAPABILITIES) == WEAK
    assert repr(CAPABILITIES) == repr(WEAK)
    assert len(CAPABILITIES) == 3


@pytest.mark.usefixtures("_no_walls")
def test_each_wall_that_is_left_out_is_warned_of() -> None:
    given = dict(STRONG)

    with pytest.warns(SandboxDegraded) as warned:
        degraded = degrade_config_for_capabilities(given)

    assert degraded == {
        "network": "undefined",
        "mounts": "undefined",
        "filesystem_writable_paths": "all",
        "cwd": "/tmp",
    }
    assert given == STRONG
    assert [str(each.message).partition("=")[0] for each in warned] == list(WEAK)
    assert {each.filename for each in warned} == {__file__}


@pytest.mark.usefixtures("_no_walls")
def test_without_warning_it_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        degraded = degrade_config_for_capabilities(STRONG, warn=False)

    assert degraded["network"] == "undefined"


@pytest.mark.usefixtures("_no_walls")
def test_what_takes_no_wall_is_kept_in_silence() -> None:
    plain = {"network": "undefined", "filesystem_writable_paths": "all", "env": {"A": "1"}}

    assert degrade_config_for_capabilities(plain) == plain
    assert degrade_config_for_capabilities({}) == {}


@pytest.mark.usefixtures("_no_walls")
def test_what_works_alone_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_network(config: SandboxConfig) -> Ended:
        if config.writable_paths == ("/",) and config.mounts == "undefined":
            return Ended(exit_code=0, out=b"", err=b"")
        raise OSError("no")

    monkeypatch.setattr(capabilities, "run_with_own_warden", only_network)

    assert dict(CAPABILITIES) == {**WEAK, "network": ("undefined", "isolated")}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"netwrok": "isolated"}, "netwrok"),
        ({"command": "true"}, "command"),
        ({"network": "none"}, "network='none'"),
        ({"filesystem_writable_paths": "some"}, "'some'"),
    ],
)
def test_a_config_that_can_not_be_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestInvalid, match=named):
        degrade_config_for_capabilities(config)
