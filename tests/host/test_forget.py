"""What is remembered of hosts does not pile up."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pytest_vmsandbox.host.facts import Accel, Capability, HostFacts, Tier, Verdict, fact_of
from pytest_vmsandbox.host.forget import KEPT, UNUSED_S, forget_old
from pytest_vmsandbox.host.remember import key_of, recall, remember


def _file(cache: Path, name: str, *, unused_s: float) -> Path:
    file = cache / name
    file.write_text("{}")
    used = time.time() - unused_s
    os.utime(file, (used, used))
    return file


def test_what_nobody_used_for_long_goes_with_its_lock(tmp_path: Path) -> None:
    old = _file(tmp_path, "host-1.json", unused_s=UNUSED_S + 60)
    its_lock = _file(tmp_path, "host-1.json.lock", unused_s=UNUSED_S + 60)
    recent = _file(tmp_path, "host-2.json", unused_s=UNUSED_S - 60)
    used_lock = _file(tmp_path, "host-2.json.lock", unused_s=UNUSED_S + 60)
    held_lock = _file(tmp_path, "host-3.json.lock", unused_s=10)
    left_draft = _file(tmp_path, ".host-abc", unused_s=2 * 86400)
    draft = _file(tmp_path, ".host-def", unused_s=10)
    no_host = _file(tmp_path, "agent-x86_64-0.lock", unused_s=UNUSED_S * 2)

    forget_old(tmp_path)

    assert [file for file in (old, its_lock, left_draft) if file.exists()] == []
    for file in (recent, used_lock, held_lock, draft, no_host):
        assert file.exists(), file.name


def test_of_very_many_those_stay_that_were_used_last(tmp_path: Path) -> None:
    for number in range(KEPT + 10):
        _file(tmp_path, f"host-{number}.json", unused_s=60 * number)

    forget_old(tmp_path)

    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"host-{number}.json" for number in range(KEPT)}


def test_what_is_recalled_counts_as_used_and_remembering_forgets_the_rest(tmp_path: Path) -> None:
    facts = {name: fact_of(name, Verdict.OK, evidence="", remedy="") for name in Capability}
    host = HostFacts(facts=facts, tier=Tier.BARE, tier_reason="", accel=Accel.TCG, accel_reason="")
    keys = [key_of(qemu=None, search_path=path, run_dir=tmp_path) for path in ("/a", "/b", "/c")]
    cache = tmp_path / "cache"
    for key in keys[:2]:
        remember(cache, key, host)
        long_ago = time.time() - 2 * UNUSED_S
        os.utime(cache / key.file_name, (long_ago, long_ago))

    assert recall(cache, keys[1]) == host
    remember(cache, keys[2], host)

    assert recall(cache, keys[0]) is None
    assert recall(cache, keys[1]) == host
    assert recall(cache, keys[2]) == host


def test_a_directory_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    forget_old(tmp_path / "nowhere")
