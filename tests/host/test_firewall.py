"""What doctor notes of this host's firewall."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.host.firewall import Note, look_at_firewall
from pytest_vmsandbox.host.trial import Trial, start_trial

if TYPE_CHECKING:
    from tests.host.conftest import Stubs

pytestmark = pytest.mark.asyncio

NFT = 'case "$1" in --version) echo "iptables v1.8.9 (nf_tables)";; *) echo "{answer}";; esac'
LEGACY = 'case "$1" in --version) echo "iptables v1.8.9 (legacy)";; *) echo "{answer}";; esac'
DOCKER = "-P FORWARD DROP\n-A FORWARD -j DOCKER-USER"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc of a kernel with neither br_netfilter nor iptables."""
    proc = tmp_path / "proc"
    (proc / "sys/net").mkdir(parents=True)
    (proc / "net").mkdir()
    return proc


def trial(stubs: Stubs, tmp_path: Path, *, uid: int = 0) -> Trial:
    return Trial(run_dir=tmp_path, search_path=str(stubs.directory), deadline_s=5.0, uid=uid)


async def noted(trial: Trial, proc: Path) -> dict[str, Note]:
    return {note.name: note for note in await look_at_firewall(trial, proc=proc)}


async def policy(trial: Trial, proc: Path) -> str:
    return (await noted(trial, proc))["forward_policy"].value


@pytest.mark.parametrize(("answer", "value"), [(DOCKER, "drop"), ("-P FORWARD ACCEPT", "accept")])
async def test_the_policy_of_forward_is_read_and_said_not_to_matter(
    stubs: Stubs, tmp_path: Path, proc: Path, answer: str, value: str
) -> None:
    stubs.put("iptables", NFT.format(answer=answer))

    note = (await noted(trial(stubs, tmp_path), proc))["forward_policy"]

    assert note.value == value
    assert f"-P FORWARD {value.upper()}" in note.evidence
    assert "does not matter" in note.matters
    assert stubs.calls("iptables") == [["--version"], ["-S", "FORWARD"]]


async def test_the_older_iptables_is_not_asked_where_it_would_load_its_table_to_answer(
    stubs: Stubs, tmp_path: Path, proc: Path
) -> None:
    stubs.put("iptables", LEGACY.format(answer=DOCKER))
    assert await policy(trial(stubs, tmp_path), proc) == "accept"
    assert stubs.calls("iptables") == [["--version"]]

    (proc / "net/ip_tables_names").write_text("nat\nfilter\n")

    assert await policy(trial(stubs, tmp_path), proc) == "drop"


async def test_who_is_not_root_does_not_know_and_does_not_ask(
    stubs: Stubs, tmp_path: Path, proc: Path
) -> None:
    stubs.put("iptables", NFT.format(answer=DOCKER))

    note = (await noted(trial(stubs, tmp_path, uid=1000), proc))["forward_policy"]

    assert note.value == "unknown"
    assert "root" in note.evidence
    assert stubs.calls("iptables") == []


@pytest.mark.parametrize("body", ["exit 4", "echo nonsense", "printf '\\377'", "kill -9 $$"])
async def test_an_iptables_that_does_not_answer_leaves_it_unknown(
    stubs: Stubs, tmp_path: Path, proc: Path, body: str
) -> None:
    (proc / "net/ip_tables_names").write_text("filter\n")
    stubs.put("iptables", body)

    assert await policy(trial(stubs, tmp_path), proc) == "unknown"


async def test_without_iptables_it_is_unknown(stubs: Stubs, tmp_path: Path, proc: Path) -> None:
    assert await policy(trial(stubs, tmp_path), proc) == "unknown"


@pytest.mark.parametrize(
    ("content", "value"), [("1\n", "on"), ("0\n", "off"), ("what\n", "unknown"), (None, "absent")]
)
async def test_whether_bridges_pass_by_iptables_is_read(
    stubs: Stubs, tmp_path: Path, proc: Path, content: str | None, value: str
) -> None:
    if content is not None:
        (proc / "sys/net/bridge").mkdir()
        (proc / "sys/net/bridge/bridge-nf-call-iptables").write_text(content)

    note = (await noted(trial(stubs, tmp_path), proc))["bridge_netfilter"]

    assert note.value == value
    assert "bridge-nf-call-iptables" in note.evidence


async def test_this_host_is_looked_at_without_a_word_of_python(tmp_path: Path) -> None:
    notes = await look_at_firewall(start_trial(run_dir=tmp_path))

    assert [note.name for note in notes] == ["forward_policy", "bridge_netfilter"]
    assert all(note.evidence and note.value for note in notes)
