"""Names of interfaces."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.linux.interface_name import check_interface_name


@pytest.mark.parametrize("name", ["br0", "net255", "a", "x" * 15, "eth0.5", "a-b"])
def test_what_the_kernel_takes_is_taken(name: str) -> None:
    assert check_interface_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "x" * 16, "a b", "a\tb", "br0\n", "é" * 8, "é", "a/b", "a:b", "-a"),
        *("tap%d", "a\0b", "\x7f"),
    ],
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="interface's name"):
        check_interface_name(name)
