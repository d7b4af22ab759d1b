"""What is remembered, for whom and for how long."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import filelock
import pytest

import pytest_vmsandbox
from pytest_vmsandbox.host.facts import (
    Accel,
    Capability,
    HostFacts,
    Tier,
    Verdict,
    fact_of,
)
from pytest_vmsandbox.host.remember import Key, key_of, recall, remember


def some_facts(verdict: Verdict = Verdict.OK) -> HostFacts:
    facts = {name: fact_of(name, verdict, evidence="seen", remedy="do") for name in Capability}
    return HostFacts(facts=facts, tier=Tier.BARE, tier_reason="", accel=Accel.TCG, accel_reason="")


@pytest.fixture
def key(tmp_path: Path) -> Key:
    qemu = tmp_path / "qemu"
    qemu.write_text("1")
    return key_of(qemu=qemu, search_path="/bin", run_dir=tmp_path)


@pytest.mark.parametrize("verdict", [Verdict.OK, Verdict.DENIED, Verdict.UNCONFIRMED])
def test_facts_are_recalled_under_their_key(tmp_path: Path, key: Key, verdict: Verdict) -> None:
    remember(tmp_path / "new" / "cache", key, some_facts(verdict))

    assert recall(tmp_path / "new" / "cache", key) == some_facts(verdict)


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another"},
        {"uid": 4242},
        {"groups": (1, 2, 3)},
        {"capabilities": "CapEff:\t0"},
        {"search_path": "/usr/bin"},
        {"run_device": -1},
        {"qemu": ("/other", 1, 1)},
        {"setup": ("/record", 1, 1)},
        {"python": ("/python", 1, 1)},
        {"our_version": "0"},
        {"probes_version": -1},
    ],
    ids=str,
)
def test_facts_of_another_key_are_not_these(
    tmp_path: Path, key: Key, change: dict[str, object]
) -> None:
    remember(tmp_path, key, some_facts())

    assert recall(tmp_path, dataclasses.replace(key, **change)) is None  # type: ignore[arg-type]  # one field each


def test_a_qemu_that_was_replaced_is_another_key(tmp_path: Path, key: Key) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("22")

    assert key_of(qemu=qemu, search_path="/bin", run_dir=tmp_path) != key


def test_another_interpreter_is_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> Key:
        return key_of(qemu=None, search_path="", run_dir=tmp_path)

    interpreter = tmp_path / "python"
    interpreter.write_text("")
    ours = key()
    monkeypatch.setattr(sys, "executable", str(interpreter))
    other = key()
    os.utime(interpreter, ns=(1, 1))

    assert len({ours, other, key()}) == 3


def test_the_key_has_the_version_that_is_installed(key: Key) -> None:
    installed = {dist.name: dist.version for dist in distributions()}

    assert key.our_version == installed.get("pytest-vmsandbox", "unknown")


def test_a_checkout_that_was_never_installed_has_a_key_too(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pytest_vmsandbox.host.remember import key_of\n"
        "print(key_of(qemu=None, search_path='', run_dir=Path('/')).our_version)"
    )
    # What it imports is linked where no metadata stands beside it.
    for package in (pytest_vmsandbox, filelock):
        (tmp_path / package.__name__).symlink_to(Path(str(package.__file__)).parent)

    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "unknown\n", done.stderr


def test_without_a_qemu_there_is_a_key_too(tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    assert key_of(qemu=None, search_path="", run_dir=tmp_path) == key_of(
        qemu=gone, search_path="", run_dir=tmp_path
    )


def test_what_ran_out_of_time_is_not_remembered(tmp_path: Path, key: Key) -> None:
    remember(tmp_path / "cache", key, some_facts(Verdict.TIMEOUT))

    assert recall(tmp_path / "cache", key) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', "\0", "1", "[" * 200_000])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, key: Key, content: str) -> None:
    (tmp_path / key.file_name).write_text(content)

    assert recall(tmp_path, key) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, key: Key) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    remember(blocked, key, some_facts())

    assert recall(blocked, key) is None


def test_only_whole_files_are_seen_and_no_drafts_stay(tmp_path: Path, key: Key) -> None:
    cache = tmp_path / "cache"
    for _ in range(3):
        remember(cache, key, some_facts())

    assert [entry.name for entry in cache.iterdir()] == [key.file_name]
    assert (cache / key.file_name).stat().st_uid == os.getuid()
