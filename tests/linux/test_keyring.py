"""Session keyrings, of children."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest

from pytest_vmsandbox.linux import join_session_keyring

InChild = Callable[..., None]


def test_a_new_session_does_not_find_the_keys_of_the_former(in_child: InChild) -> None:
    def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        add_key, request_key = {"x86_64": (248, 249), "s390x": (278, 279)}.get(
            os.uname().machine, (217, 218)
        )
        session = -3  # KEY_SPEC_SESSION_KEYRING

        def find() -> int:
            return int(libc.syscall(request_key, b"user", b"vmsandbox test", None, 0))

        first = join_session_keyring()
        key = libc.syscall(add_key, b"user", b"vmsandbox test", b"secret", 6, session)
        assert key > 0
        assert find() == key
        child = os.fork()
        if child == 0:
            kept = find() == key
            second = join_session_keyring()
            os._exit(7 if kept and second != first and find() == -1 else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert find() == key

    try:
        in_child(body)
    except pytest.fail.Exception as failure:
        if "Function not implemented" in str(failure):
            pytest.skip("VMS-TEST-NO-KEYS: this kernel has no keys")
        raise
