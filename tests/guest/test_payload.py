from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.guest.frames import ProtocolViolated
from pytest_vmsandbox.guest.messages import parse_failure, parse_status, parse_welcome
from pytest_vmsandbox.guest.payload import PayloadReader, encode_text

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50)


@given(said=st.lists(texts, max_size=10))
def test_texts_are_read_back_as_they_were(said: list[str]) -> None:
    fields = PayloadReader(b"".join(map(encode_text, said)))
    heard = [fields.text() for _ in said]
    fields.end()

    assert heard == said


@given(raw=st.binary(max_size=50).filter(lambda raw: 0 not in raw))
def test_bytes_that_are_no_utf8_survive_as_surrogates(raw: bytes) -> None:
    heard = PayloadReader(encode_text(raw)).text()

    assert heard.encode("utf-8", "surrogateescape") == raw


@given(noise=st.binary(max_size=200))
def test_noise_is_a_value_or_a_violation(noise: bytes) -> None:
    for parse in (parse_failure, parse_status, parse_welcome):
        try:
            parse(memoryview(noise))
        except ProtocolViolated:
            continue


def test_a_text_is_never_longer_than_allowed() -> None:
    with pytest.raises(ProtocolViolated, match="at most 10"):
        PayloadReader(encode_text("x" * 11)).text(at_most=10)


def test_what_is_left_over_is_a_violation() -> None:
    with pytest.raises(ProtocolViolated, match="too many"):
        PayloadReader(b"x").end()
