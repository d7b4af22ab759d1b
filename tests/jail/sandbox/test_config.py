from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.jail.sandbox import run_sandbox
from pytest_vmsandbox.jail.sandbox.config import (
    CAPTURE,
    DEFAULT_PATH,
    EVERYTHING,
    PARAMETERS,
    ExtraMount,
    MountKind,
    SandboxConfig,
    is_at_or_below,
    parse_config,
    path_inside,
)


def extra_mounts(*forms: object) -> tuple[ExtraMount, ...]:
    forms_of_any_kind: Any = forms
    return parse_config("true", extra_mounts=forms_of_any_kind).extra_mounts


def refusal(**wrong: Any) -> str:
    with pytest.raises(RequestInvalid) as caught:
        parse_config(**{"command": "true", **wrong})
    return str(caught.value)


def test_what_is_not_said_is_the_whole_host_writable_with_its_network_and_a_path() -> None:
    config = parse_config("true")

    assert config == SandboxConfig(
        argv=("true",),
        cwd="/",
        env={"PATH": DEFAULT_PATH},
        filesystem_root="/",
        writable_paths=EVERYTHING,
        mounts=config.mounts,
        extra_mounts=(),
        network=config.network,
        stdout=CAPTURE,
        stderr=CAPTURE,
    )
    assert (config.mounts, config.network) == ("undefined", "undefined")


def test_what_is_not_said_is_what_run_sandbox_would_say() -> None:
    stated: dict[str, Any] = {
        name: parameter.default
        for name, parameter in inspect.signature(run_sandbox).parameters.items()
        if name != "command"
    }

    assert set(stated) == PARAMETERS
    assert parse_config("true", **stated) == parse_config("true")


def test_a_parameter_that_there_is_not_is_a_wrong_call() -> None:
    misspelt: dict[str, Any] = {"netwrok": "isolated", "network": "isolated"}

    with pytest.raises(TypeError, match=r"no parameter netwrok$"):
        parse_config("true", **misspelt)


def test_a_text_is_one_word_and_no_line_of_a_shell() -> None:
    assert parse_config("echo hello; ls").argv == ("echo hello; ls",)


def test_words_may_be_paths() -> None:
    assert parse_config([Path("/bin/ls"), "-l", Path("x")]).argv == ("/bin/ls", "-l", "x")


def test_an_environment_that_is_given_is_all_there_is() -> None:
    assert parse_config("true", env={"A": "1"}).env == {"A": "1"}
    assert parse_config("true", env={}).env == {}


@pytest.mark.parametrize("nothing", [None, "none", [], ()])
def test_nothing_is_writable(nothing: Any) -> None:
    assert parse_config("true", filesystem_writable_paths=nothing).writable_paths == ()


def test_of_writable_paths_one_below_another_says_nothing_new() -> None:
    paths: list[str | Path] = ["/data/a", "/database", "/data", Path("/data/a/b")]

    config = parse_config("true", filesystem_writable_paths=paths)

    assert config.writable_paths == ("/data", "/database")


def test_a_writable_root_is_everything() -> None:
    config = parse_config("true", filesystem_writable_paths=["/data", "/"])

    assert config.writable_paths == EVERYTHING


@pytest.mark.parametrize("nothing", [None, "none", "", [], ()])
def test_there_are_no_extra_mounts(nothing: Any) -> None:
    assert parse_config("true", extra_mounts=nothing).extra_mounts == ()


@pytest.mark.parametrize("none", [None, "none", ""])
def test_each_part_of_an_extra_mount_can_be_said_to_be_none(none: str | None) -> None:
    seen = extra_mounts(
        (none, "/shm", "tmpfs", none), (none, "/p", "proc", none), ("/usr", "/u", none, "bind")
    )

    assert seen == (
        ExtraMount(kind=MountKind.TMPFS, target="/shm"),
        ExtraMount(kind=MountKind.PROC, target="/p"),
        ExtraMount(kind=MountKind.BIND, target="/u", source="/usr"),
    )


def test_an_extra_mount_of_three_parts_has_no_options() -> None:
    assert extra_mounts(("proc", "/proc", "proc")) == extra_mounts(("proc", "/proc", "proc", ""))


@pytest.mark.parametrize("options", ["remount,ro", "ro,remount", "remount,bind,ro"])
def test_remount_with_ro_makes_the_target_read_only(options: str) -> None:
    (seen,) = extra_mounts((None, "/data", None, options))

    assert seen == ExtraMount(kind=MountKind.READ_ONLY, target="/data")


def test_a_source_is_followed_to_what_it_really_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")

    (seen,) = extra_mounts((tmp_path / "link", "/f", "", "bind"))

    assert seen.source == os.path.realpath(tmp_path / "file")
    assert not seen.directory


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (("proc", "/proc", "proc", "ro"), "'ro'"),
        ((None, "/shm", "tmpfs", "size=1g"), "'size=1g'"),
        (("/usr", "/u", "ext4", "bind"), "'ext4'"),
        (("/usr", "/u", "tmpfs", "bind"), "'tmpfs'"),
        (("/usr", "/u", "bind", ""), "'bind'"),
        ((None, "/u", "tmpfs", "remount,ro"), "'tmpfs'"),
        (("/usr", "/u", "", ""), "type ''"),
        (("/usr", "/u", "", "ro"), "'ro'"),
        (("/usr", "/u", "", "remount"), "'remount'"),
        (("/usr", "/u", "", "bind,ro"), "'bind,ro'"),
        (("/usr", "/u", "", "rbind"), "'rbind'"),
        (("/usr", "/u", "", "remount,ro,exec"), "exec"),
        (("/dev/sda", "/u", "ext4", ""), "'ext4'"),
        (("/usr", "relative", "", "bind"), "'relative'"),
        (("/usr", None, "", "bind"), "no target"),
        ((None, "/u", "", "bind"), "source"),
        (("usr", "/u", "", "bind"), "source"),
        (("/nowhere/at/all", "/u", "", "bind"), "/nowhere/at/all"),
        ((None, "/", "tmpfs", ""), "the root"),
        (("/usr", "/..", "", "bind"), "the root"),
        (("/usr", "/u"), "no mount"),
        (("/usr", "/u", "", "bind", ""), "no mount"),
        ("/usr", "no mount"),
        (("/usr", 7, "", "bind"), "7"),
        (("/u\0sr", "/u", "", "bind"), "NUL"),
    ],
)
def test_an_extra_mount_that_can_not_be_is_refused_by_name(form: object, named: str) -> None:
    assert named in refusal(extra_mounts=[form])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"command": ""}, "command=''"),
        ({"command": []}, "command=[]"),
        ({"command": [""]}, "command"),
        ({"command": ["a", 1]}, "command=1"),
        ({"command": None}, "command=None"),
        ({"command": b"true"}, "b'true'"),
        ({"command": "a\0b"}, "NUL"),
        ({"cwd": "data"}, "cwd='data'"),
        ({"cwd": 3}, "cwd=3"),
        ({"env": ["A=1"]}, "env"),
        ({"env": {"A": 1}}, "A=1"),
        ({"env": {"A=B": "1"}}, "A=B"),
        ({"env": {"": "1"}}, "''"),
        ({"env": {"A": "1\0"}}, "NUL"),
        ({"filesystem_root": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"filesystem_root": sys.executable}, "not a directory"),
        ({"filesystem_root": None}, "filesystem_root=None"),
        ({"filesystem_root": ""}, "filesystem_root"),
        ({"filesystem_writable_paths": "some"}, "'some'"),
        ({"filesystem_writable_paths": "/data"}, "'/data'"),
        ({"filesystem_writable_paths": ["data"]}, "'data'"),
        ({"filesystem_writable_paths": [None]}, "None"),
        ({"filesystem_writable_paths": 3}, "3"),
        ({"mounts": "private"}, "mounts='private'"),
        ({"mounts": None}, "mounts=None"),
        ({"network": "host"}, "network='host'"),
        ({"network": ["isolated"]}, "network=['isolated']"),
        ({"extra_mounts": "proc"}, "'proc'"),
        ({"extra_mounts": 3}, "3"),
        ({"stdout": subprocess.STDOUT}, "stdout=-2"),
        ({"stdout": True}, "stdout=True"),
        ({"stdout": -7}, "stdout=-7"),
        ({"stdout": 10**6}, "stdout=1000000"),
        ({"stdout": 10**30}, "stdout=1000"),
        ({"stderr": "file"}, "stderr='file'"),
        ({"cwd": "/\ud800"}, "encoded"),
    ],
)
def test_a_parameter_that_can_not_be_is_refused_by_name(
    wrong: dict[str, object], named: str
) -> None:
    assert named in refusal(**wrong)


def test_a_stream_without_a_descriptor_is_refused() -> None:
    import io

    assert "stdout" in refusal(stdout=io.BytesIO())


def test_dots_are_taken_away_and_never_lead_above_the_root() -> None:
    assert path_inside("cwd", "/../../etc/./x/..//y") == "/etc/y"
    assert path_inside("cwd", "//etc") == "/etc"
    assert path_inside("cwd", "/..") == "/"


def test_paths_are_compared_by_whole_components() -> None:
    assert is_at_or_below("/data", "/data")
    assert is_at_or_below("/data/x", "/data")
    assert is_at_or_below("/data", "/")
    assert not is_at_or_below("/database", "/data")
    assert not is_at_or_below("/data", "/data/x")


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy host, not of ours
@given(st.dictionaries(st.sampled_from(sorted(PARAMETERS)), st.none() | st.text() | st.integers()))
def test_whatever_is_given_is_read_or_refused(given_values: dict[str, Any]) -> None:
    try:
        config = parse_config("true", **given_values)
    except RequestInvalid:
        return

    assert Path(config.cwd).is_absolute()
    assert Path(config.filesystem_root).is_dir()
