from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.guest import compiler, toolchain
from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.guest.toolchain import (
    compile_agent,
    find_compiler,
    host_architecture,
    normalise_architecture,
    source_digest,
)


def asks_for_an_interpreter(elf: bytes) -> bool:
    """Whether a 64-bit ELF file has a PT_INTERP header (elf(5)), as only dynamic ones have."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    kinds = [struct.unpack_from("<I", elf, table + size * number)[0] for number in range(count)]
    return 3 in kinds


@pytest.fixture
def only_the_hosts_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if find_compiler(architecture=host_architecture()) is None:
        pytest.skip("this host has no C compiler")


def test_the_hosts_compiler_makes_a_static_agent_that_runs(
    only_the_hosts_compiler: None, tmp_path: Path
) -> None:
    made = agent_binary(architecture=host_architecture(), cache_dir=tmp_path)
    said = subprocess.run([made, "--nonsense"], capture_output=True, text=True, check=False)

    assert made.name == f"agent-{host_architecture()}-{source_digest()}"
    assert (said.returncode, said.stderr.split()[0]) == (2, "usage:")
    assert not asks_for_an_interpreter(made.read_bytes())
    assert os.access(made, os.X_OK)


def test_it_is_built_once_however_many_ask(
    only_the_hosts_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def counting(target: Path, *, command: list[str]) -> None:
        built.append(target)
        compile_agent(target, command=command)

    monkeypatch.setattr(compiler, "compile_agent", counting)
    ask = {"architecture": host_architecture(), "cache_dir": tmp_path}
    threads = [threading.Thread(target=agent_binary, kwargs=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(built) == 1


def test_a_packaged_agent_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agent-riscv64").write_bytes(b"")
    monkeypatch.setattr(compiler, "PACKAGED", tmp_path)

    assert (
        agent_binary(architecture="riscv64", cache_dir=tmp_path / "c") == tmp_path / "agent-riscv64"
    )
    assert not (tmp_path / "c").exists()


def test_without_a_compiler_the_host_is_unfit_and_hears_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostUnfit, match="ziglang") as caught:
        agent_binary(architecture=host_architecture(), cache_dir=tmp_path)

    assert caught.value.code == "VMS-AGENT-COMPILER"


def test_the_hosts_compiler_is_not_asked_for_another_architecture(
    only_the_hosts_compiler: None,
) -> None:
    assert find_compiler(architecture="s390x") is None


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no such target')"]
    monkeypatch.setattr(compiler, "find_compiler", lambda architecture: failing)
    with pytest.raises(HostUnfit, match="no such target"):
        agent_binary(architecture="x86_64", cache_dir=tmp_path)

    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_architectures_have_one_spelling() -> None:
    assert [normalise_architecture(name) for name in ("AMD64", "arm64", "riscv64")] == [
        "x86_64",
        "aarch64",
        "riscv64",
    ]


def test_the_name_changes_with_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest()
    (tmp_path / "main.c").write_text("int main(void) { return 0; }")
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path)

    assert source_digest() != before
