"""Descriptors with an owner."""

from __future__ import annotations

import errno
import os

import pytest

from pytest_vmsandbox.linux import OwnedFd


@pytest.fixture
def fd() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def test_an_owned_descriptor_is_an_int_and_ends_with_its_block(fd: OwnedFd) -> None:
    with fd as same:
        assert same is fd
        assert os.read(fd, 1) == b""
        assert fd.fileno() == int(fd)
        before = fd.closed

    assert (before, fd.closed) == (False, True)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        os.fstat(int(fd))
    assert caught.value.errno == errno.EBADF


def test_closing_twice_does_not_close_what_took_its_number(fd: OwnedFd) -> None:
    fd.close()
    other = os.open("/dev/null", os.O_RDONLY)
    fd.close()

    try:
        assert other == int(fd)
        assert os.read(other, 1) == b""
    finally:
        os.close(other)


def test_a_closed_descriptor_is_not_handed_out(fd: OwnedFd) -> None:
    number = int(fd)
    assert repr(fd) == f"<OwnedFd {number}>"

    fd.close()

    assert repr(fd) == f"<OwnedFd {number}, closed>"
    with pytest.raises(ValueError, match=f"descriptor {number} is closed"):
        fd.fileno()
    with pytest.raises(ValueError, match="is closed"), fd:
        pass
