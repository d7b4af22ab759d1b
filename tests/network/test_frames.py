"""Frames: a stream of them, taken apart however it comes, whoever sends it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.network.frames import (
    FRAME_AT_LEAST,
    FRAME_AT_MOST,
    FrameReader,
    NotAFrame,
    encode_frame,
    is_for_many,
)

FRAMES = st.lists(st.binary(min_size=FRAME_AT_LEAST, max_size=200), max_size=20)


@given(FRAMES, st.lists(st.integers(1, 64), min_size=1))
def test_a_stream_in_any_pieces_gives_the_frames_that_were_sent(
    frames: list[bytes], lengths: list[int]
) -> None:
    stream = b"".join(map(encode_frame, frames))
    reader, got, turn = FrameReader(), [], 0
    while stream:
        length = lengths[turn % len(lengths)]
        got += reader.feed(stream[:length])
        stream, turn = stream[length:], turn + 1

    assert got == frames


def test_frames_too_short_to_have_addresses_are_left_out() -> None:
    stream = b"".join(encode_frame(bytes(size)) for size in (0, 1, 13, 14))

    assert FrameReader().feed(stream) == [bytes(14)]


def test_the_longest_frame_is_one_and_a_longer_one_ends_the_stream() -> None:
    longest = bytes(FRAME_AT_MOST)
    assert FrameReader().feed(encode_frame(longest)) == [longest]

    for length in (FRAME_AT_MOST + 1, 0xFFFFFFFF):
        with pytest.raises(NotAFrame, match=str(length)):
            FrameReader().feed(length.to_bytes(4, "big"))


@given(st.lists(st.binary(max_size=300)))
def test_garbage_is_frames_or_an_error_and_nothing_is_kept_of_what_can_not_come(
    pieces: list[bytes],
) -> None:
    reader = FrameReader()
    try:
        for piece in pieces:
            assert all(len(frame) >= FRAME_AT_LEAST for frame in reader.feed(piece))
            assert len(reader._rest) <= FRAME_AT_MOST + 4
    except NotAFrame:
        pass


def test_broadcast_and_multicast_are_for_many() -> None:
    assert is_for_many(bytes.fromhex("ffffffffffff"))
    assert is_for_many(bytes.fromhex("333300000001"))
    assert not is_for_many(bytes.fromhex("02766d000002"))
