"""The firewall of this host, as far as people suspect it when machines do not reach each other.

Docker sets the policy of FORWARD to DROP, and has bridges pass by iptables (br_netfilter). Neither
concerns our networks, which lie in a network namespace of their own, and `doctor` says so rather
than leave it to be guessed. Nothing here is a capability: no test is skipped for it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_vmsandbox.host.trial import Trial

_PROC = Path("/proc")
_CALLS_IPTABLES = "sys/net/bridge/bridge-nf-call-iptables"
_LEGACY_TABLES = "net/ip_tables_names"

_POLICY = re.compile(r"^-P FORWARD ([A-Z]+)$", re.MULTILINE)

_NOT_FORWARDED = (
    "it does not matter here: networks between machines lie in a network namespace of their own, "
    "and what leaves by the network nat is the gateway's own and not forwarded"
)
_NOT_OURS = (
    "it does not matter here: a bridge passes by the rules of its own network namespace, and there "
    "are none in ours"
)

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that was seen: its value as a word, how it was seen, and what it means for us."""

    name: str
    value: str
    evidence: str
    matters: str

    def to_json(self) -> dict[str, str]:
        """Its form in `doctor --json` (docs/hosts.md)."""
        return asdict(self)


async def look_at_firewall(trial: Trial, *, proc: Path = _PROC) -> tuple[Note, ...]:
    """The policy of FORWARD, and whether bridges pass by iptables; nothing is changed or loaded."""
    if not trial.platform.is_linux:
        return ()
    policy, evidence = await _forward_policy(trial, proc)
    bridges, seen = _bridge_netfilter(proc)
    return (
        Note(name="forward_policy", value=policy, evidence=evidence, matters=_NOT_FORWARDED),
        Note(name="bridge_netfilter", value=bridges, evidence=seen, matters=_NOT_OURS),
    )


async def _forward_policy(trial: Trial, proc: Path) -> tuple[str, str]:
    program = trial.find("iptables")
    if program is None:
        return UNKNOWN, "no program iptables on the PATH to ask"
    if trial.uid != 0:
        return UNKNOWN, "only root may ask iptables"
    deadline = trial.begin()
    version = await trial.run([program, "--version"], deadline=deadline)
    # The older kind would load its table to answer (iptables(8)); where it is not, nothing is set.
    if "nf_tables" not in version.text and "filter" not in _tables(proc):
        return "accept", f"{program} has no table filter in the kernel"
    outcome = await trial.run([program, "-S", "FORWARD"], deadline=deadline)
    found = _POLICY.search(outcome.text) if outcome.ok else None
    if found is None:
        return UNKNOWN, str(outcome)
    return found[1].lower(), f"{program} -S FORWARD: {found[0]}"


def _tables(proc: Path) -> list[str]:
    try:
        return (proc / _LEGACY_TABLES).read_text(errors="backslashreplace").split()
    except OSError:
        return []


def _bridge_netfilter(proc: Path) -> tuple[str, str]:
    path = proc / _CALLS_IPTABLES
    try:
        value = path.read_text(errors="backslashreplace").strip()
    except FileNotFoundError:
        return "absent", f"no {path}: br_netfilter is not loaded"
    except OSError as error:
        return UNKNOWN, str(error)
    return {"0": "off", "1": "on"}.get(value, UNKNOWN), f"{path}: {value[:20]}"
