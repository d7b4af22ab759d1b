"""Messages: what host and agent say to each other, as values (docs/protocol.md)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address

from pytest_vmsandbox.guest.frames import PAYLOAD_MAX, FrameType, ProtocolViolated, encode_frame
from pytest_vmsandbox.guest.furnishing import NOTHING, Furnishing, encode_furnishing
from pytest_vmsandbox.guest.payload import PayloadReader, encode_text

PROTOCOL_VERSION = 3
TOKEN_SIZE = 16
REQUEST_MAX = 2 * 1024 * 1024
KEEP_MODE = 0xFFFFFFFF
NO_LIMIT = 0xFFFFFFFFFFFFFFFF
_LIST_MAX = 0xFFFF
_ERRNO_MAX = 4095  # of Linux, include/linux/err.h
_LOWEST_STATUS, _HIGHEST_STATUS = -64, 255


class ExecFlag(IntFlag):
    """How a command is set up."""

    INHERIT_ENV = 1
    STDIN = 2
    PTY = 4
    MERGE = 8


class TransferKind(IntEnum):
    """What a child of the agent is to do."""

    GET = 1
    PUT = 2
    TREE_GET = 3
    TREE_PUT = 4
    SYNC = 5
    ADDRESSES = 6


class Power(IntEnum):
    """What becomes of the machine."""

    OFF = 0
    REBOOT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSize:
    """A terminal's size in characters."""

    rows: int = 24
    columns: int = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """A command to run in the guest.

    `env` is added to the agent's own environment, or is all there is without `inherit_env`.
    `cwd` None is the agent's (`/`); `user` None is the agent's, else a name or number that the
    guest's own files know. Without `stdin` it is /dev/null. With a `pty`, stdin, stdout and stderr
    are that terminal; `merge_stderr` sends stderr where stdout goes.
    """

    argv: Sequence[str | bytes]
    env: Mapping[str, str] = field(default_factory=dict)
    inherit_env: bool = True
    cwd: str | None = None
    user: str | int | None = None
    stdin: bool = False
    pty: WindowSize | None = None
    merge_stderr: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who answered: facts that the agent states about itself and its machine.

    `sessions` counts the hosts that have introduced themselves since the agent started. `refusal`
    says which part of the identity that we wished for it could not take, and why; `furnished`
    whether it has all of the furnishing that came with it.
    """

    protocol: int
    is_init: bool = False
    sessions: int = 0
    agent_version: str = ""
    nonce: str = ""
    boot_id: str = ""
    kernel: str = ""
    architecture: str = ""
    hostname: str = ""
    restore_id: str = ""
    refusal: OSError | None = None
    furnished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the agent makes of its machine before it answers a host; what is empty stays as it is.

    `machine_id` is 32 hexadecimal digits (machine-id(5)), `unix_ns` the time in nanoseconds since
    1970, and up to 512 bytes of `entropy` go into the kernel's random pool, which is then reseeded.
    The `furnishing` is no part of it, and may be refused.
    """

    restore_id: str = ""
    hostname: str = ""
    machine_id: str = ""
    unix_ns: int = 0
    entropy: bytes = b""
    furnishing: Furnishing = NOTHING


def encode_hello(token: bytes, *, keep_processes: bool, identity: Identity) -> bytes:
    """The host introduces itself; the agent resets, and repeats the token."""
    parts = (
        token,
        struct.pack("<I", int(keep_processes)),
        encode_text(identity.restore_id),
        encode_text(identity.hostname),
        encode_text(identity.machine_id),
        struct.pack("<QI", identity.unix_ns, len(identity.entropy)),
        identity.entropy,
        encode_furnishing(identity.furnishing),
    )
    return encode_frame(FrameType.HELLO, id_=0, payload=b"".join(parts))


def parse_welcome(payload: memoryview) -> tuple[bytes, Hello]:
    """The agent's answer: the token that it repeats, and its facts."""
    fields = PayloadReader(payload)
    token, protocol = fields.take(TOKEN_SIZE), fields.u32()
    if protocol != PROTOCOL_VERSION:  # whatever else it says, it says it in another language
        return token, Hello(protocol=protocol)
    hello = Hello(
        protocol=protocol,
        is_init=bool(fields.u32()),
        sessions=fields.u32(),
        agent_version=fields.text(at_most=64),
        nonce=fields.text(at_most=64),
        boot_id=fields.text(at_most=64),
        kernel=fields.text(at_most=65),
        architecture=fields.text(at_most=65),
        hostname=fields.text(at_most=65),
        restore_id=fields.text(at_most=64),
        refusal=_parse_refusal(fields),
        furnished=bool(fields.u32()),
    )
    fields.end()
    return token, hello


def _parse_refusal(fields: PayloadReader) -> OSError | None:
    number, what = fields.u32(), fields.text(at_most=256)
    return guest_error(number, what) if number else None


def encode_exec(request: ExecRequest, *, window: int) -> bytes:
    """The payload of an EXEC; raises OSError(E2BIG) where even the agent would have no room."""
    flags = ExecFlag(0)
    flags |= ExecFlag.INHERIT_ENV if request.inherit_env else ExecFlag(0)
    flags |= ExecFlag.STDIN if request.stdin else ExecFlag(0)
    flags |= ExecFlag.PTY if request.pty else ExecFlag(0)
    flags |= ExecFlag.MERGE if request.merge_stderr else ExecFlag(0)
    size = request.pty or WindowSize(rows=0, columns=0)
    env = [f"{name}={value}" for name, value in request.env.items()]
    if any(not name or "=" in name for name in request.env):
        raise ValueError("illegal environment variable name")
    parts = [
        struct.pack("<BHHI", flags, size.rows, size.columns, window),
        encode_text("" if request.user is None else str(request.user)),
        encode_text(request.cwd or ""),
        *_encode_list(request.argv),
        *_encode_list(env),
    ]
    return b"".join(parts)


def _encode_list(texts: Sequence[str | bytes]) -> Iterator[bytes]:
    if len(texts) > _LIST_MAX:
        raise _too_long()
    yield struct.pack("<H", len(texts))
    yield from map(encode_text, texts)


def _too_long() -> OSError:
    return OSError(errno.E2BIG, os.strerror(errno.E2BIG))


def encode_request(type_: FrameType, *, id_: int, payload: bytes) -> bytes:
    """A request in as many frames as it needs: MORE, ..., and the one that says what it is."""
    if len(payload) > REQUEST_MAX:
        raise _too_long()
    frames = []
    while len(payload) > PAYLOAD_MAX:
        frames.append(encode_frame(FrameType.MORE, id_=id_, payload=payload[:PAYLOAD_MAX]))
        payload = payload[PAYLOAD_MAX:]
    return b"".join((*frames, encode_frame(type_, id_=id_, payload=payload)))


def encode_transfer(  # noqa: PLR0913 - the fields of one message
    kind: TransferKind,
    *,
    window: int,
    path: str = "",
    position: int = 0,
    limit: int = 0,
    mode: int = 0,
    owner: str = "",
    more: bytes = b"",
) -> bytes:
    """The payload of a TRANSFER; `position` is the offset of a GET and the size of a PUT."""
    return b"".join(
        (
            struct.pack("<IB", window, kind),
            encode_text(os.fsencode(path)),
            struct.pack("<QQI", position, limit, mode),
            encode_text(owner),
            more,
        )
    )


def encode_connect(address: IPv4Address | IPv6Address, port: int, *, window: int) -> bytes:
    """The payload of a CONNECT."""
    packed = address.packed
    return struct.pack("<IB", window, len(packed)) + packed + struct.pack("<H", port)


def parse_failure(payload: memoryview) -> OSError:
    """What the guest's kernel said, as the OSError that it would be here."""
    fields = PayloadReader(payload)
    number, where = fields.u32(), fields.text()
    fields.end()
    return guest_error(number, where)


def guest_error(number: int, where: str) -> OSError:
    """The OSError of the right subclass (FileNotFoundError, ...) for an errno of the guest."""
    if not 0 < number <= _ERRNO_MAX:
        raise ProtocolViolated(f"errno {number}")
    return OSError(number, os.strerror(number), where)


def parse_status(payload: memoryview) -> int:
    """The exit status, or the negative number of the signal."""
    fields = PayloadReader(payload)
    status = fields.i32()
    fields.end()
    if not _LOWEST_STATUS <= status <= _HIGHEST_STATUS:
        raise ProtocolViolated(f"exit status {status}")
    return status


def parse_number(payload: memoryview) -> int:
    """A payload that is one unsigned number."""
    fields = PayloadReader(payload)
    number = fields.u32()
    fields.end()
    return number
