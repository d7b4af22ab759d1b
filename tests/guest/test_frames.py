from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.guest.frames import (
    CAPACITY,
    FRAME_MAX,
    PAYLOAD_MAX,
    FrameParser,
    FrameType,
    ProtocolViolated,
    encode_frame,
)

Said = tuple[int, int, int, bytes]

frames = st.tuples(
    st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300)
)


def encoded(said: Said) -> bytes:
    return encode_frame(said[0], stream=said[1], id_=said[2], payload=said[3])


def feed(parser: FrameParser, data: bytes, *, step: int = CAPACITY) -> list[Said]:
    heard: list[Said] = []
    while data:
        room = parser.room()
        count = min(len(room), len(data), step)
        room[:count] = data[:count]
        data = data[count:]
        parser.filled(count)
        heard += [(f.type, f.stream, f.id, bytes(f.payload)) for f in parser.frames()]
    return heard


def believing() -> FrameParser:
    parser = FrameParser()
    parser.believe()
    return parser


@given(said=st.lists(frames, max_size=20), step=st.integers(1, 1000))
def test_what_was_said_is_heard_however_it_is_cut(said: list[Said], step: int) -> None:
    assert feed(believing(), b"".join(map(encoded, said)), step=step) == said


@pytest.mark.parametrize("step", [1000, 65536, CAPACITY])
def test_frames_of_the_largest_size_pass(step: int) -> None:
    said = [(FrameType.DATA, 1, number, bytes([number]) * PAYLOAD_MAX) for number in range(20)]

    assert feed(believing(), b"".join(map(encoded, said)), step=step) == said


def test_a_larger_payload_is_not_even_encoded() -> None:
    with pytest.raises(ValueError, match="fit"):
        encode_frame(FrameType.DATA, id_=1, payload=bytes(PAYLOAD_MAX + 1))


@given(noise=st.binary(min_size=16, max_size=2000))
def test_noise_is_a_violation_or_waits_for_more_and_never_a_frame(noise: bytes) -> None:
    parser = believing()
    try:
        heard = feed(parser, noise)
    except ProtocolViolated:
        return

    assert heard == []


@given(said=frames, position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_header_or_trailer_is_noticed(said: Said, position: int, bit: int) -> None:
    data = bytearray(encoded(said))
    outside = [*range(16), *range(len(data) - 4, len(data))]
    data[outside[position % len(outside)]] ^= 1 << bit
    try:
        heard = feed(believing(), bytes(data) + bytes(FRAME_MAX))
    except ProtocolViolated:
        return

    pytest.fail(f"heard {heard}")


WELCOME: Said = (FrameType.WELCOME, 0, 0, b"w" * 200)


@given(stale=st.binary(max_size=3000), said=frames, step=st.integers(1, 500))
def test_while_hunting_everything_before_a_welcome_is_skipped(
    stale: bytes, said: Said, step: int
) -> None:
    parser = FrameParser()
    heard = feed(parser, stale + encoded(said) + encoded(WELCOME), step=step)

    assert heard[-1] == WELCOME
    assert all(type_ == FrameType.WELCOME for type_, *_ in heard)


@pytest.mark.parametrize("kept", [3, 7, 15, 16, 30, 1000, 65550])
def test_half_a_frame_of_a_former_session_does_not_swallow_the_welcome(kept: int) -> None:
    half = encoded((FrameType.DATA, 1, 5, bytes(PAYLOAD_MAX)))[:kept]

    assert feed(FrameParser(), half + encoded(WELCOME)) == [WELCOME]


@pytest.mark.parametrize("kept", [5, 16, 100, 215])
def test_half_a_former_welcome_does_not_swallow_the_next_two(kept: int) -> None:
    half = encoded(WELCOME)[:kept]

    assert feed(FrameParser(), half + encoded(WELCOME) * 2)[-1] == WELCOME


def test_a_welcome_that_claims_to_be_huge_is_not_waited_for() -> None:
    huge = encoded((FrameType.WELCOME, 0, 0, bytes(PAYLOAD_MAX)))[:2000]

    assert feed(FrameParser(), huge + encoded(WELCOME)) == [WELCOME]


def test_room_is_never_empty_however_long_the_noise() -> None:
    parser = FrameParser()
    for _ in range(50):
        feed(parser, b"\xf5VMS" * 50_000)

        assert len(parser.room()) >= FRAME_MAX
