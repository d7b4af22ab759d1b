from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.spec import MachineSpec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_mib", 0),
        ("memory_mib", 79),
        ("memory_mib", "256"),
        ("memory_mib", True),
        ("memory_mib", 2**30),
        ("cpus", 0),
        ("cpus", 1.0),
        ("accel", "xen"),
        ("accel", None),
        ("tier", "sudoers"),
        ("lifecycle", "cloned"),
        ("image", ""),
        ("image", 7),
        ("name", ""),
        ("name", "-vm"),
        ("name", "VM"),
        ("name", "a" * 33),
        ("name", "vm\n"),
        ("name", 5),
    ],
)
def test_a_wrong_value_is_refused_and_named(field: str, value: Any) -> None:
    with pytest.raises(RequestInvalid) as refused:
        MachineSpec().changed({field: value})

    assert f"{field}={value!r}" in str(refused.value)


def test_an_unknown_wish_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RequestInvalid, match=r"no 'memory'\n.*memory_mib"):
        MachineSpec().changed({"memory": 256})


def test_wishes_replace_and_the_rest_stays() -> None:
    changed = MachineSpec(cpus=2).changed({"memory_mib": 256, "name": "server-1"})

    assert changed == MachineSpec(cpus=2, memory_mib=256, name="server-1")


def test_an_image_may_be_a_path() -> None:
    assert MachineSpec().changed({"image": Path("/images/mine")}).image == "/images/mine"
