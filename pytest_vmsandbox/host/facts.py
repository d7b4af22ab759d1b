"""What this host can do: every capability with its evidence, and what was chosen from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from pytest_vmsandbox.errors import HostUnfit

# The number of the JSON form below; it grows when a reader of the older form would go wrong.
SCHEMA = 1


class Capability(StrEnum):
    """What a host may have; the words that `vm_requires` and `--vm-require` take."""

    QEMU = "qemu"
    KVM = "kvm"
    QEMU_VM_USER = "qemu_vm_user"
    SUDO = "sudo"
    SUDO_QEMU_VM = "sudo_qemu_vm"
    SETFACL = "setfacl"
    USER_NAMESPACES = "user_namespaces"
    JAIL = "jail"
    BRIDGE = "bridge"
    TAP = "tap"
    NAT = "nat"
    CGROUPS = "cgroups"
    IMAGE_BUILDER = "image_builder"


# What is missing, when it is missing: the first line of a skip.
NEEDS: Mapping[Capability, str] = MappingProxyType(
    {
        Capability.QEMU: "a QEMU that starts",
        Capability.KVM: "a KVM that boots a kernel",
        Capability.QEMU_VM_USER: "the system user qemu-vm",
        Capability.SUDO: "sudo to root without a password",
        Capability.SUDO_QEMU_VM: "sudo to qemu-vm without a password",
        Capability.SETFACL: "access control lists in the run directory",
        Capability.USER_NAMESPACES: "user namespaces that may mount",
        Capability.JAIL: "namespaces, read-only binds and pivot_root",
        Capability.BRIDGE: "bridges in a network namespace",
        Capability.TAP: "taps in a network namespace",
        Capability.NAT: "a QEMU with user-mode networking",
        Capability.CGROUPS: "a control group that limits memory or processes",
        Capability.IMAGE_BUILDER: "the programs that build images",
    }
)


class Verdict(StrEnum):
    """How a probe ended; the last word of its code."""

    OK = "ok"
    UNCONFIRMED = "unconfirmed"  # what could be tried worked, the last step is yet to come
    MISSING = "missing"  # the program, device or user is not there
    DENIED = "denied"  # it is there, and we may not
    UNUSABLE = "unusable"  # it was tried and did not do what it must
    TIMEOUT = "timeout"  # no answer in time; never remembered
    UNSUPPORTED = "unsupported"  # not on this operating system or processor


_GOOD = frozenset({Verdict.OK, Verdict.UNCONFIRMED})


class Tier(StrEnum):
    """How much privilege and isolation this host gives, best first (docs/hosts.md)."""

    ROOT = "root"
    SUDO = "sudo"
    QEMU_VM = "qemu-vm"
    USERNS = "userns"
    BARE = "bare"


class Accel(StrEnum):
    """What runs the guest's instructions; values are QEMU's words."""

    KVM = "kvm"
    TCG = "tcg"
    HVF = "hvf"


def code_of(capability: Capability, verdict: Verdict) -> str:
    """The stable code, such as ``VMS-KVM-UNUSABLE``; listed in docs/hosts.md."""
    return f"VMS-{capability}-{verdict}".replace("_", "-").upper()


def capability_of(code: str) -> Capability | None:
    """The capability that a code is about; None for a code of another kind.

    A code's beginning does not tell: ``VMS-SUDO-DENIED`` and ``VMS-SUDO-QEMU-VM-DENIED`` differ.
    But what keeps walls from being built is about them, whatever it is.
    """
    if code.startswith(_ABOUT_WALLS):
        return Capability.JAIL
    return _CAPABILITIES.get(code)


def doctor_shows(code: str) -> bool:
    """Whether `vmsandbox doctor` shows what a code is about: a capability, and nothing else."""
    return code in _CAPABILITIES


_ABOUT_WALLS = ("VMS-TIER-", "VMS-WARDEN-", "VMS-WALLS-")


_CAPABILITIES: Mapping[str, Capability] = MappingProxyType(
    {code_of(capability, verdict): capability for capability in Capability for verdict in Verdict}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing tried on this host: whether it worked, what was seen, what would change it.

    `tier` names the tier in whose way it was tried, where the answer depends on that.
    """

    capability: Capability
    present: bool
    evidence: str
    remedy: str = ""
    code: str
    tier: Tier | None = None

    @property
    def verdict(self) -> Verdict:
        """How the probe ended, as its code says."""
        return Verdict(self.code.rsplit("-", 1)[1].lower())


def fact_of(
    capability: Capability,
    verdict: Verdict,
    *,
    evidence: str,
    remedy: str = "",
    tier: Tier | None = None,
) -> Fact:
    """The fact with the code and the presence that go with the verdict.

    Whatever a program printed or a path holds, the evidence can be written as UTF-8.
    """
    present = verdict in _GOOD
    return Fact(
        capability=capability,
        present=present,
        evidence=evidence.encode(errors="backslashreplace").decode(),
        remedy="" if present else remedy,
        code=code_of(capability, verdict),
        tier=tier,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuBuild:
    """The QEMU that answered: its absolute path, and what it was built with."""

    path: str
    version: str
    machines: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    sandbox: bool = False  # it takes -sandbox on,...: built with seccomp


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Every capability of this host as this user, and what was chosen from them.

    `time_scale` says how much slower than the reference machine this one emulates; deadlines are
    multiplied by it. It is never below 1.
    """

    facts: Mapping[Capability, Fact]
    tier: Tier
    tier_reason: str
    accel: Accel
    accel_reason: str
    time_scale: float = 1.0
    qemu: QemuBuild | None = field(default=None)

    def __getitem__(self, capability: Capability) -> Fact:
        return self.facts[capability]

    def require(self, capability: Capability) -> None:
        """Return if the host has it; else raise HostUnfit with code, evidence and remedy."""
        fact = self.facts[capability]
        if not fact.present:
            raise HostUnfit(fact.code, NEEDS[capability], fact.evidence, fact.remedy)

    def with_fact(self, fact: Fact) -> HostFacts:
        """These facts with one of them replaced; what was chosen is not chosen again."""
        return replace(self, facts={**self.facts, fact.capability: fact})

    @property
    def settled(self) -> bool:
        """Whether all of it may be remembered: no probe ran out of time."""
        return all(fact.verdict is not Verdict.TIMEOUT for fact in self.facts.values())

    def to_json(self) -> dict[str, object]:
        """The stable form that `doctor --json` prints and the cache keeps (docs/hosts.md)."""
        return {
            "schema": SCHEMA,
            "tier": self.tier.value,
            "tier_reason": self.tier_reason,
            "accel": self.accel.value,
            "accel_reason": self.accel_reason,
            "time_scale": self.time_scale,
            "qemu": None if self.qemu is None else _qemu_to_json(self.qemu),
            "facts": [_fact_to_json(self.facts[capability]) for capability in Capability],
        }

    @classmethod
    def from_json(cls, form: object) -> HostFacts:
        """Read what `to_json` made; ValueError for anything else."""
        match form:
            case {
                "schema": schema,
                "tier": str(tier),
                "tier_reason": str(tier_reason),
                "accel": str(accel),
                "accel_reason": str(accel_reason),
                "time_scale": float(time_scale) | int(time_scale),
                "qemu": qemu,
                "facts": list(entries),
            } if schema == SCHEMA:
                facts = {fact.capability: fact for fact in map(_fact_from_json, entries)}
            case _:
                raise ValueError("not the facts of a host, or of another version")
        if set(facts) != set(Capability):
            raise ValueError("a capability is missing")
        return cls(
            facts=facts,
            tier=Tier(tier),
            tier_reason=tier_reason,
            accel=Accel(accel),
            accel_reason=accel_reason,
            time_scale=float(time_scale),
            qemu=None if qemu is None else _qemu_from_json(qemu),
        )


def _fact_to_json(fact: Fact) -> dict[str, object]:
    return {
        "capability": fact.capability.value,
        "present": fact.present,
        "code": fact.code,
        "evidence": fact.evidence,
        "remedy": fact.remedy,
        "tier": None if fact.tier is None else fact.tier.value,
    }


def _fact_from_json(form: object) -> Fact:
    match form:
        case {
            "capability": str(capability),
            "present": bool(present),
            "code": str(code),
            "evidence": str(evidence),
            "remedy": str(remedy),
            "tier": (str() | None) as tier,
        }:
            return Fact(
                capability=Capability(capability),
                present=present,
                evidence=evidence,
                remedy=remedy,
                code=code,
                tier=None if tier is None else Tier(tier),
            )
    raise ValueError(f"not a fact: {form!r}")


def _qemu_to_json(build: QemuBuild) -> dict[str, object]:
    return {
        "path": build.path,
        "version": build.version,
        "machines": list(build.machines),
        "accelerators": list(build.accelerators),
        "sandbox": build.sandbox,
    }


def _qemu_from_json(form: object) -> QemuBuild:
    match form:
        case {
            "path": str(path),
            "version": str(version),
            "machines": list(machines),
            "accelerators": list(accelerators),
            "sandbox": bool(sandbox),
        }:
            return QemuBuild(
                path=path,
                version=version,
                machines=tuple(map(str, machines)),
                accelerators=tuple(map(str, accelerators)),
                sandbox=sandbox,
            )
    raise ValueError(f"not a QEMU: {form!r}")
