"""Our markers, checked when tests are collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_vmsandbox.host.facts import Capability
    from pytest_vmsandbox.machine.spec import MachineSpec

MARKERS = (
    (
        "vm(image=, template=, memory_mib=, cpus=, disks=, network=, accel=, tier=, lifecycle=, "
        "clock=, name=): shape"
    ),
    "vm_requires(capability, ...): skip, with the reason, where the host lacks one of them",
    'vm_expect(what): the guest is meant to die: "panic", "oops" or "shutdown"',
)
# The name under which a test that runs in both has its lifecycle.
LIFECYCLE = "vm_lifecycle"
BOTH = ("booted", "restored")

_OF_ONE_TEST = frozenset({"vm", "async_vm", "vm_factory", "async_vm_factory"})
_SHARED = frozenset({"vm_module", "vm_session"})

EXPECTATIONS = ("panic", "oops", "shutdown")


def check_markers(item: pytest.Item) -> None:
    """Raise RequestInvalid when one of our markers on `item` can't be.

    Called once a test, at collection: a run without our markers imports nothing for this.
    """
    for name, check in _CHECKS.items():
        for marker in item.iter_markers(name):
            check(marker)
    if lifecycles_of(item):
        _check_both(item)


def spec_of(node: pytest.Item | pytest.Collector, base: MachineSpec) -> MachineSpec:
    """What the `vm` markers on a test, its class and its module make of `base`; nearest last."""
    for marker in reversed(list(node.iter_markers("vm"))):
        base = base.changed(_of_one_run(marker.kwargs))
    callspec = getattr(node, "callspec", None)
    if callspec is not None and LIFECYCLE in callspec.params:
        base = base.changed({"lifecycle": callspec.params[LIFECYCLE]})
    return base


def lifecycles_of(node: pytest.Item | pytest.Collector) -> tuple[str, ...]:
    """In which lifecycles a test is to run, one after the other; empty for the usual one."""
    nearest = next(
        (marker for marker in node.iter_markers("vm") if "lifecycle" in marker.kwargs), None
    )
    return BOTH if nearest is not None and nearest.kwargs["lifecycle"] == "both" else ()


def _of_one_run(wishes: Mapping[str, Any]) -> dict[str, Any]:
    """What a marker asks for, but for `lifecycle="both"`, which asks for two runs."""
    return {name: wish for name, wish in wishes.items() if (name, wish) != ("lifecycle", "both")}


def _of_each_run(wishes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a marker asks for in each of the runs that it asks for."""
    if wishes.get("lifecycle") != "both":
        return [dict(wishes)]
    return [{**wishes, "lifecycle": lifecycle} for lifecycle in BOTH]


def capabilities_of(item: pytest.Item) -> list[Capability]:
    """What `item` demands of the host."""
    return [
        capability
        for marker in item.iter_markers("vm_requires")
        for capability in _required(marker)
    ]


def expectations_of(item: pytest.Item) -> frozenset[str]:
    """How the guest of `item` may die."""
    return frozenset(
        word for marker in item.iter_markers("vm_expect") for word in _expected(marker)
    )


def _check_vm(marker: pytest.Mark) -> None:
    from pytest_vmsandbox.errors import RequestInvalid
    from pytest_vmsandbox.machine.spec import MachineSpec

    if marker.args:
        raise RequestInvalid(
            f"@pytest.mark.vm takes keyword arguments only, not {marker.args!r}",
            "for instance @pytest.mark.vm(memory_mib=256)",
        )
    for wishes in _of_each_run(marker.kwargs):
        MachineSpec().changed(wishes)


def _check_both(item: pytest.Item) -> None:
    from pytest_vmsandbox.errors import RequestInvalid

    if LIFECYCLE not in getattr(getattr(item, "callspec", None), "params", ()):
        raise RequestInvalid(
            'lifecycle="both": pytest makes no two tests of a unittest.TestCase\'s method',
            "it does of a class that is none",
        )
    asked = frozenset(getattr(item, "fixturenames", ()))
    if asked & _SHARED and not asked & _OF_ONE_TEST:
        raise RequestInvalid(
            f'lifecycle="both": {", ".join(sorted(asked & _SHARED))} is one machine for many tests',
            "vm and vm_factory make one for each",
        )


def _required(marker: pytest.Mark) -> list[Capability]:
    from pytest_vmsandbox.errors import RequestInvalid
    from pytest_vmsandbox.host.facts import Capability

    if marker.kwargs or not marker.args:
        raise RequestInvalid("@pytest.mark.vm_requires takes the names of capabilities")
    try:
        return [Capability(name) for name in marker.args]
    except ValueError as error:
        raise RequestInvalid(
            f"@pytest.mark.vm_requires: {error}", f"known are: {', '.join(Capability)}"
        ) from None


def _expected(marker: pytest.Mark) -> tuple[str, ...]:
    from pytest_vmsandbox.errors import RequestInvalid

    if marker.kwargs or not marker.args or set(marker.args) - set(EXPECTATIONS):
        raise RequestInvalid(
            f"@pytest.mark.vm_expect{marker.args!r} is no end that a guest can be meant to have",
            f"known are: {', '.join(EXPECTATIONS)}",
        )
    return marker.args


_CHECKS: dict[str, Callable[[pytest.Mark], object]] = {
    "vm": _check_vm,
    "vm_requires": _required,
    "vm_expect": _expected,
}
