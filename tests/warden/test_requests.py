"""Requests: what is read as one, what is refused, and that nothing else can come of any packet."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.warden.requests import (
    Connect,
    Launch,
    Limits,
    OpenFile,
    Request,
    Signal,
    parse_packet,
    parse_request,
)
from pytest_vmsandbox.warden.steps import (
    Access,
    Bind,
    Device,
    Proc,
    ReadOnly,
    Step,
    Symlink,
    Tmpfs,
    parse_steps,
    render_step,
)
from tests.warden.conftest import TRUE, order

EVERY_STEP: tuple[Step, ...] = (
    Tmpfs(target="/", size_mib=1),
    Bind(source="/usr", target="/usr"),
    Bind(source="/dev", target="/d", access=Access.READ_WRITE, devices=True),
    Device(name="null"),
    Proc(target="/proc", only_pids=False),
    Symlink(target="/bin", text="../usr/bin"),
    Tmpfs(target="/room", size_mib=2, mode=0o700),
    ReadOnly(target="/", writable=("/room",)),
)

LAUNCH = order(
    TRUE,
    "--word",
    env={"NAME": "value"},
    steps=EVERY_STEP,
    limits=Limits(address_bytes=1 << 30, memory_bytes=1 << 30, processes=9, open_files=99),
    files=("/a/file", None),
    group="g1",
)


def form_of(launch: Launch) -> dict[str, Any]:
    """What the client sends for it."""
    form = asdict(replace(launch, steps=()))
    form["steps"] = [render_step(step) for step in launch.steps]
    return json.loads(json.dumps({"request": "launch", **form}))  # type: ignore[no-any-return]  # json


FORM = form_of(LAUNCH)
CONNECT = {"request": "connect", "process": 7, "socket": "qmp"}
OPEN_FILE = {"request": "open_file", "process": 7, "file": "screen.ppm"}
SIGNAL = {"request": "signal", "process": 7, "signal": 9}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("/x"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def refuse(form: dict[str, Any], *, descriptors: int = 5) -> str:
    with pytest.raises(RequestInvalid) as caught:
        parse_request(form, descriptors=descriptors)
    return str(caught.value)


def test_what_the_client_sends_is_what_the_warden_reads() -> None:
    assert parse_request(FORM, descriptors=5) == LAUNCH


@pytest.mark.parametrize(
    ("form", "request_"),
    [
        (CONNECT, Connect(process=7, socket="qmp")),
        (OPEN_FILE, OpenFile(process=7, file="screen.ppm")),
        (SIGNAL, Signal(process=7, signal=9)),  # type: ignore[arg-type]  # an int is equal
    ],
)
def test_small_requests_are_read(form: dict[str, Any], request_: Request) -> None:
    assert parse_request(form, descriptors=0) == request_


def test_a_packet_is_a_number_and_a_form() -> None:
    assert parse_packet(b'{"number": 5, "request": "signal"}') == (5, {"request": "signal"})


@pytest.mark.parametrize(
    "packet",
    [
        *(b"", b" ", b"null", b"5", b'"text"', b"[]", b"{}", b"\0", b"\xff\xfe", b"{", b"{}{}"),
        *(b"[" * 100_000, b'{"a":' * 20_000, b'{"number":' + b"9" * 5000 + b"}"),
        *(b'{"number": 1.0}', b'{"number": true}', b'{"number": -1}', b'{"number": null}'),
        *(b'{"number": NaN}', b'{"number": Infinity}', b'{"number": "1"}', b'{"number": [1]}'),
        *(b'{"number": 9007199254740992}', b'{"number": 1e3}', b"{'number': 1}"),
    ],
    ids=repr,
)
def test_a_packet_without_a_number_is_refused(packet: bytes) -> None:
    with pytest.raises(RequestInvalid):
        parse_packet(packet)


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    packet = b'{"number": 1, "number": 2, "request": "launch", "request": "signal"}'

    assert parse_packet(packet) == (2, {"request": "signal"})


@pytest.mark.parametrize("key", sorted(FORM))
def test_a_launch_lacks_no_key(key: str) -> None:
    refuse({name: value for name, value in FORM.items() if name != key})


@pytest.mark.parametrize("form", [FORM, CONNECT, OPEN_FILE, SIGNAL])
def test_a_key_too_much_is_refused(form: dict[str, Any]) -> None:
    refuse({**form, "more": 1}, descriptors=5 if form is FORM else 0)


@pytest.mark.parametrize("kind", ["", "LAUNCH", "launch ", "mount", None, 1, ["launch"], {}])
def test_another_request_is_refused(kind: object) -> None:
    assert "launch" in refuse({**FORM, "request": kind})


WRONG: dict[str, list[object]] = {
    "who": [None, "", "root", "VMM", 0, ["vmm"], {"vmm": 1}],
    "name": [
        None,
        "",
        "A",
        "a b",
        "a\n",
        "-a",
        "a" * 33,
        "a/b",
        "..",
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
    ],
    "argv": [
        None,
        [],
        "/bin/sh",
        [""],
        ["true"],
        ["./x"],
        ["/x\0"],
        ["/x", 1],
        ["/../x"],
        {"a": 1},
    ],
    "env": [
        None,
        [],
        {"": "x"},
        {"a=b": "x"},
        {"a\0": "x"},
        {"a": "\0"},
        {"a": 1},
        {"a": None},
        "a",
    ],
    "cwd": [None, "", "x", "/..", "/a/../b", "/a\0", 1, ["/"]],
    "network": [None, "", "none", "HOST", 1, True],
    "limits": [None, {}, [], {"more": 1}],
    "files": [None, [], ["/a"], ["/a", "/b", "/c"], ["a", None], ["/a", "/.."], ["/a", 1], "ab"],
    "room": ["", "x", "/..", 1, [], False],
    "group": ["", "A", "..", "a/b", 1, [], "a" * 33, "-"],
    "steps": [None, [], {}, "x", [{}], [1], [[]], "/"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=repr
)
def test_a_wrong_value_is_refused_and_named(key: str, value: object) -> None:
    said = refuse({**FORM, key: value})

    named = {"argv": ("argv", "program"), "files": ("file",), "env": ("env", "name", "a=")}
    assert any(word in said for word in named.get(key, (key.rstrip("s"),))), said


@pytest.mark.parametrize("count", [0, 3, 4, 6, 64])
def test_a_launch_comes_with_three_descriptors_and_one_for_each_file(count: int) -> None:
    refuse(FORM, descriptors=count)


@pytest.mark.parametrize("form", [CONNECT, OPEN_FILE, SIGNAL])
def test_other_requests_come_with_no_descriptor(form: dict[str, Any]) -> None:
    refuse(form, descriptors=1)


@pytest.mark.parametrize("name", ["address_bytes", "memory_bytes", "processes", "file_bytes"])
@pytest.mark.parametrize("amount", [0, -1, 1.5, True, "1", math.nan, math.inf, 1 << 64, [1]])
def test_a_limit_is_a_whole_number_within_reason(name: str, amount: object) -> None:
    refuse({**FORM, "limits": {**FORM["limits"], name: amount}})


@pytest.mark.parametrize("process", [0, -1, True, 1.0, "7", None, 1 << 31, [7]])
@pytest.mark.parametrize("form", [CONNECT, OPEN_FILE, SIGNAL])
def test_a_process_is_a_pid(form: dict[str, Any], process: object) -> None:
    refuse({**form, "process": process}, descriptors=0)


@pytest.mark.parametrize("name", ["", ".", "..", "/x", "a/b", "../x", "x\0", 1, None, ["x"]])
@pytest.mark.parametrize("form", [CONNECT, OPEN_FILE])
def test_what_lies_in_a_room_has_a_name_and_no_path(form: dict[str, Any], name: object) -> None:
    key = "socket" if form is CONNECT else "file"

    refuse({**form, key: name}, descriptors=0)


@pytest.mark.parametrize("number", [0, 1, 2, 15.0, 19, 64, 65, -9, "9", None, True])
def test_only_two_signals_are_sent(number: object) -> None:
    refuse({**SIGNAL, "signal": number}, descriptors=0)


# Steps


@pytest.mark.parametrize("step", EVERY_STEP, ids=str)
def test_a_step_is_read_as_it_was_written(step: Step) -> None:
    root = render_step(EVERY_STEP[0])
    form = json.loads(json.dumps([root, render_step(step)]))
    if step == EVERY_STEP[0]:
        form = form[:1]

    assert parse_steps(form)[-1] == step


@pytest.mark.parametrize("step", EVERY_STEP, ids=str)
def test_a_step_has_all_its_fields_and_no_other(step: Step) -> None:
    form = render_step(step)
    for key in form:
        less = {name: value for name, value in form.items() if name != key}
        refuse({**FORM, "steps": [render_step(EVERY_STEP[0]), less]})
    refuse({**FORM, "steps": [render_step(EVERY_STEP[0]), {**form, "more": 1}]})


@pytest.mark.parametrize(
    "steps",
    [
        [Bind(source="/usr", target="/usr"), Tmpfs(target="/", size_mib=1)],
        [Proc(target="/")],
        [Device(name="null")],
        [EVERY_STEP[0], EVERY_STEP[0]],
        [EVERY_STEP[0], Bind(source="/", target="/")],
        [EVERY_STEP[0], Proc(target="/")],
        [EVERY_STEP[0], Proc(target="//")],
        [EVERY_STEP[0], Bind(source="/", target="/./")],
        [EVERY_STEP[0]] * 201,
    ],
)
def test_a_view_has_one_root_and_it_comes_first(steps: list[Step]) -> None:
    refuse({**FORM, "steps": [render_step(step) for step in steps]})


@pytest.mark.parametrize(
    ("step", "key", "values"),
    [
        (EVERY_STEP[0], "size_mib", [0, -1, 1 << 16, True, 1.0, "1", None]),
        (EVERY_STEP[0], "mode", [-1, 0o1000, 0o4755, "755", None]),
        (EVERY_STEP[1], "source", ["", "usr", "/usr/..", "/a\0", None, 1]),
        (EVERY_STEP[1], "target", ["", "usr", "/usr/..", "/a\0", None, 1]),
        (EVERY_STEP[1], "access", ["", "rw", None, 1, ["read-only"]]),
        (EVERY_STEP[1], "devices", [0, 1, None, "false"]),
        (EVERY_STEP[3], "name", ["", "sda", "mem", "null/../sda", "../null", None, ["null"]]),
        (EVERY_STEP[4], "only_pids", [0, 1, None, "true"]),
        (EVERY_STEP[5], "text", ["a\0", None, 1, "\udfff\ud800"]),
        (EVERY_STEP[7], "writable", [None, "/x", ["x"], ["/.."], [1], ["/x"] * 201]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_value_in_a_step_is_refused(step: Step, key: str, values: list[object]) -> None:
    for value in values:
        wrong = {**render_step(step), key: value}
        steps = [wrong] if step == EVERY_STEP[0] else [render_step(EVERY_STEP[0]), wrong]
        refuse({**FORM, "steps": steps})


# Whatever it is


@given(anything)
def test_whatever_stands_in_a_packet_is_read_or_refused(value: object) -> None:
    try:
        number, form = parse_packet(json.dumps(value).encode())
    except RequestInvalid:
        return
    assert number >= 0
    assert "number" not in form


@given(st.sampled_from(sorted(FORM)), anything)
def test_whatever_stands_in_a_launch_is_read_or_refused(key: str, value: object) -> None:
    try:
        read = parse_request({**FORM, key: value}, descriptors=5)
    except RequestInvalid:
        return
    assert isinstance(read, Launch)
    assert form_of(read) == {**FORM, key: value}  # nothing was turned into something else


@given(st.integers(0, len(EVERY_STEP) - 1), st.data())
def test_whatever_stands_in_a_step_is_read_or_refused(index: int, data: st.DataObject) -> None:
    forms = [render_step(step) for step in EVERY_STEP]
    key = data.draw(st.sampled_from(sorted(forms[index])))
    forms[index][key] = data.draw(anything)
    try:
        read = parse_steps(forms)
    except RequestInvalid:
        return
    assert [render_step(step) for step in read] == json.loads(
        json.dumps(forms)
    ) or key == "writable"


@pytest.mark.parametrize("key", [*sorted(FORM), "step"])
def test_what_is_too_deep_to_be_shown_is_refused_too(key: str) -> None:
    for depth in range(930, 1000):
        deep = b"[" * depth + b"]" * depth
        form = {**FORM, key: "DEEP"} if key != "step" else {**FORM, "steps": [{"step": "DEEP"}]}
        packet = json.dumps({"number": 1, **form}).encode().replace(b'"DEEP"', deep)
        try:
            _, read = parse_packet(packet)
        except RequestInvalid:
            continue
        refuse(read)
