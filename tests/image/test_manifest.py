"""manifest.json, read with suspicion."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.manifest import FileEntry, Manifest, parse_manifest

MINIMAL = {
    "format": 1,
    "name": "mine",
    "architecture": "x86_64",
    "kernel_release": "6.1.0",
    "kernel": "bzImage",
    "initramfs": "initrd.img",
}

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+~-]{0,30}", fullmatch=True)
entries = st.builds(
    FileEntry,
    size=st.integers(min_value=0, max_value=1 << 50),
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
manifests = st.builds(
    Manifest,
    name=words,
    architecture=words,
    kernel_release=words,
    kernel=words,
    initramfs=words,
    digest=st.none() | st.from_regex(r"[0-9a-f]{16,128}", fullmatch=True),
    compressed_kernel=st.none() | words,
    modules=st.none() | words,
    command_line=st.lists(st.from_regex(r"[!-~]{1,30}", fullmatch=True)).map(tuple),
    files=st.dictionaries(st.text(max_size=20), entries, max_size=4),
    made_from=st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


def parse(document: object) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), source="there/manifest.json")


@given(manifests)
def test_what_is_written_is_what_is_read(manifest: Manifest) -> None:
    assert parse_manifest(manifest.render().encode(), source="x") == manifest


def test_the_fields_that_must_be_there_are_few() -> None:
    manifest = parse(MINIMAL)

    assert manifest.kernel == "bzImage"
    assert manifest.file_names == ("bzImage", "initrd.img")


@pytest.mark.parametrize("field", [name for name in MINIMAL if name != "format"])
def test_a_missing_field_is_named_with_its_file(field: str) -> None:
    rest = {name: value for name, value in MINIMAL.items() if name != field}

    with pytest.raises(RequestInvalid, match=rf"there/manifest\.json: field '{field}' is missing"):
        parse(rest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("format", True),
        ("kernel", "../../../etc/shadow"),
        ("kernel", "/etc/shadow"),
        ("kernel", ".."),
        ("kernel", ""),
        ("kernel", "bzImage\n"),
        ("kernel", "a\0b"),
        ("kernel", 7),
        ("initramfs", ["initrd.img"]),
        ("modules", "sub/modules.img"),
        ("digest", "ABCDEF0123456789"),
        ("digest", "short"),
        ("command_line", "console=ttyS0"),
        ("command_line", ["a b"]),
        ("command_line", ["quiet\n"]),
        ("command_line", [1]),
        ("files", []),
        ("files", {"bzImage": {"size": -1, "sha256": "0" * 64}}),
        ("files", {"bzImage": {"size": True, "sha256": "0" * 64}}),
        ("files", {"bzImage": {"size": 1, "sha256": "0" * 63}}),
        ("files", {"bzImage": {"size": 1}}),
        ("files", {"bzImage": {"size": 1, "sha256": "0" * 64, "mode": 1}}),
        ("made_from", {"a": 1}),
        ("comandline", ["quiet"]),
    ],
)
def test_a_wrong_field_is_named_with_its_file(field: str, value: object) -> None:
    with pytest.raises(RequestInvalid, match=rf"there/manifest\.json: field '{field}'"):
        parse({**MINIMAL, field: value})


@given(st.sampled_from([*MINIMAL, "command_line", "files", "made_from", "digest"]), json_values)
def test_any_value_in_any_field_is_taken_or_refused(field: str, value: object) -> None:
    try:
        manifest = parse({**MINIMAL, field: value})
    except RequestInvalid:
        return

    assert all("/" not in name and not name.startswith(".") for name in manifest.file_names)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_refused(garbage: bytes) -> None:
    with pytest.raises(RequestInvalid, match="there"):
        parse_manifest(garbage, source="there")


def test_the_example_in_the_documentation_is_sound() -> None:
    page = Path(__file__).parents[2] / "docs" / "images.md"
    (example,) = re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)

    assert parse_manifest(example.encode(), source="docs/images.md").name == "mine"


def test_endless_or_bottomless_documents_are_refused() -> None:
    for data in (b"[" * 500_000, b" " * (2 << 20)):
        with pytest.raises(RequestInvalid):
            parse_manifest(data, source="there")
